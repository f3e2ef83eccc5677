/** Routing: each cluster's share over time, the balance, and fallbacks to dense with their reasons. */
import { useMemo } from 'preact/hooks';
import { COLLAPSE, type Stats } from '../../../shared/admin/stats-wire.ts';
import type { MaskSet } from '../../../shared/mask/mask-set.ts';
import { noneIfNotFound } from '../api.ts';
import { axis, Chart, type ChartOption, legend, type Palette, steps, tooltip } from '../components/chart.tsx';
import { Choice, type Range, startOf_ms, useRange } from '../components/controls.tsx';
import { Loaded, Notice } from '../components/dialog.tsx';
import { FIGURE_COLUMNS, quantileColumn, Table, Version } from '../components/table.tsx';
import { loadMaskSet, useAddress, useLoad, useScope } from '../hooks.ts';
import { number, percent, shortVersion } from '../look.ts';
import { type Series, sharesOverTime, versionsIn } from './figures.ts';
import { NoRequests, useStats } from './overview.tsx';

export function RoutingShares() {
  const { range, picker } = useRange();
  const stats = useStats(range);
  return (
    <>
      <div class="row">{picker}</div>
      <Loaded load={stats}>{(data) => <Picture stats={data} range={range} />}</Loaded>
    </>
  );
}

/** The URL's value for requests without a mask set. */
const NONE = 'none';

function Picture({ stats, range }: { readonly stats: Stats; readonly range: Range }) {
  const [named, setNamed] = useAddress('version', '');
  const versions = useMemo(() => versionsIn(stats.routing), [stats]);
  const version = versions.find((one) => (one ?? NONE) === named) ?? versions[0] ?? null;
  if (stats.routing.length === 0) {
    return <NoRequests />;
  }
  return (
    <>
      {stats.balance
        .filter(({ collapsed }) => collapsed)
        .map((row) => (
          <Notice key={row.version} kind="warning">
            Routing has collapsed: {percent(row.largest_share)} of the requests under{' '}
            {shortVersion(row.version)} fall into one cluster. Its masks were learned on other prompts than
            these; learn them again on prompts of this traffic.
          </Notice>
        ))}
      <div class="row">
        <Choice
          title="Version"
          value={version ?? NONE}
          options={versions.map((one) => [one ?? NONE, one === null ? 'no mask set' : shortVersion(one)])}
          onPick={setNamed}
        />
      </div>
      <Shares stats={stats} version={version} range={range} />
      <Balance rows={stats.balance} />
      <Versions rows={stats.versions} />
      {stats.backends.length > 0 && <Backends rows={stats.backends} />}
      <Fallbacks rows={stats.fallbacks} />
    </>
  );
}

function Balance({ rows }: { readonly rows: Stats['balance'] }) {
  return (
    <>
      <Table
        caption="Balance"
        empty="No request was routed to a cluster."
        rows={rows}
        rowKey={({ version }) => version}
        columns={[
          { title: 'Version', cell: ({ version }) => <Version of={version} /> },
          { title: 'Requests', cell: (row) => number(row.requests), isNumber: true },
          { title: 'Clusters', cell: (row) => row.clusters, isNumber: true },
          { title: 'Largest share', cell: (row) => percent(row.largest_share), isNumber: true },
          {
            title: 'Entropy',
            cell: (row) => `${number(row.entropy_bits, 2)} of ${number(Math.log2(row.clusters), 2)} bits`,
            isNumber: true,
          },
          { title: 'State', cell: (row) => (row.collapsed ? 'collapsed' : 'fine') },
        ]}
      />
      <small>
        A version counts as collapsed when one of several clusters gets {percent(COLLAPSE.share, 0)} or more
        of at least {COLLAPSE.requests_min} requests.
      </small>
    </>
  );
}

const Versions = ({ rows }: { readonly rows: Stats['versions'] }) => (
  <Table
    caption="Speed and errors by version; measured at different times, so a difference may come from the machine"
    empty="No requests in this time."
    rows={rows}
    rowKey={({ version, sparsity }) => `${version} ${sparsity}`}
    columns={[
      { title: 'Version', cell: ({ version }) => <Version of={version} /> },
      {
        title: 'Blocks skipped',
        cell: ({ sparsity }) => (sparsity === null ? 'unknown' : percent(sparsity)),
        isNumber: true,
      },
      ...FIGURE_COLUMNS,
    ]}
  />
);

type BackendSpeed = Stats['backends'][number];

const Backends = ({ rows }: { readonly rows: readonly BackendSpeed[] }) => (
  <Table
    caption="Speed by backend, all tenants; measured at different times, so a difference may come from the load"
    empty="No requests in this time."
    rows={rows}
    rowKey={({ backend }) => backend}
    columns={[
      { title: 'Backend', cell: ({ backend }) => <code>{backend}</code> },
      { title: 'Answers', cell: ({ answers }) => number(answers), isNumber: true },
      quantileColumn('First token', 0, (row: BackendSpeed) => row.ttft_quantiles_ms),
      quantileColumn('ms/token', 1, (row: BackendSpeed) => row.tpot_quantiles_ms),
    ]}
  />
);

const Fallbacks = ({ rows }: { readonly rows: Stats['fallbacks'] }) => (
  <Table
    caption="Requests that ran dense, by reason"
    empty="No request fell back to the dense model."
    rows={rows}
    rowKey={({ reason }) => reason}
    columns={[
      { title: 'Reason', cell: ({ reason }) => reason.replaceAll('_', ' ') },
      { title: 'Requests', cell: ({ requests }) => number(requests), isNumber: true },
    ]}
  />
);

/** One version at a time, since cluster numbers of different versions are unrelated. */
function Shares(props: { readonly stats: Stats; readonly version: string | null; readonly range: Range }) {
  const { stats, version, range } = props;
  const { tenant } = useScope();
  const set = useLoad(['mask set', tenant, version], (signal) =>
    version === null ? Promise.resolve(null) : loadMaskSet(version, tenant, signal).catch(noneIfNotFound),
  );
  const known = set.state === 'ready' ? set.data : null;
  const series = useMemo(() => {
    const from_ms = startOf_ms(range);
    return sharesOverTime(stats.routing, version, { from_ms, step_ms: range.step_ms, steps: range.steps });
  }, [stats, version, range.name]);
  const option = useMemo(() => sharesOption(series, known, range), [series, known, range.name]);
  return (
    <>
      <Chart label="Share of the routed requests that each cluster gets, over time" option={option} />
      <Table
        caption="Requests by cluster"
        empty="No requests in this time."
        rows={series.clusters}
        rowKey={({ cluster }) => String(cluster)}
        columns={[
          { title: 'Cluster', cell: ({ cluster }) => clusterName(cluster, known) },
          {
            title: 'Requests',
            cell: ({ requests }) => number(requests),
            sort: ({ requests }) => requests,
            isNumber: true,
          },
          {
            title: 'Share',
            cell: ({ requests }) => percent(requests / Math.max(1, series.requests)),
            isNumber: true,
          },
          {
            title: 'Share of calibration',
            cell: ({ cluster }) =>
              percent(cluster === null ? null : (known?.clusters[cluster]?.share ?? null)),
            isNumber: true,
          },
        ]}
      />
    </>
  );
}

const clusterName = (cluster: number | null, set: MaskSet | null): string => {
  if (cluster === null) return 'not routed';
  const label = set?.clusters[cluster]?.label;
  return label === undefined ? String(cluster) : `${cluster}: ${label}`;
};

/** In a step without requests there is no share. */
const shareIn = (value: unknown): string => percent(typeof value === 'number' ? value : null);

const sharesOption =
  ({ clusters, starts_ms }: Series, set: MaskSet | null, { step_ms }: Range) =>
  (palette: Palette): ChartOption => ({
    grid: { left: 60, right: 30, top: 50, bottom: 40 },
    legend: legend(palette),
    tooltip: { ...tooltip(palette), trigger: 'axis', valueFormatter: shareIn },
    xAxis: steps(palette, starts_ms, step_ms),
    yAxis: axis(palette, 'share of requests', { type: 'value', min: 0, max: 1, nameGap: 42 }),
    series: clusters.map(({ cluster, shares }) => ({
      type: 'bar',
      name: clusterName(cluster, set),
      stack: 'all',
      barCategoryGap: '10%',
      data: [...shares],
    })),
  });
