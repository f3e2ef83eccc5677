/** Where requests go: the share of every cluster over time, how even it is, and what ran dense and why. */
import { useMemo, useState } from 'preact/hooks';
import { COLLAPSE, type Stats, statsSchema } from '../../../shared/admin/stats-wire.ts';
import { admin, query } from '../api.ts';
import { axis, Chart, type ChartOption, legend, type Palette, tooltip } from '../components/chart.tsx';
import { Choice } from '../components/controls.tsx';
import { Empty, Loaded, Notice } from '../components/notice.tsx';
import { FIGURE_COLUMNS, quantiles, Table } from '../components/table.tsx';
import { useLoad, useScope } from '../hooks.ts';
import { number, percent, shortVersion } from '../look.ts';
import { type Series, sharesOverTime } from './figures.ts';

const REFRESH_ms = 15_000;
const HOUR_ms = 3_600_000;
const SPANS = {
  hour: { title: 'last hour', step: 'minute', length_ms: HOUR_ms },
  day: { title: 'last day', step: 'hour', length_ms: 24 * HOUR_ms },
  month: { title: 'last 30 days', step: 'day', length_ms: 30 * 24 * HOUR_ms },
} as const;
type Span = keyof typeof SPANS;

export function RoutingShares() {
  const { tenant } = useScope();
  const [span, setSpan] = useState<Span>('hour');
  const stats = useLoad(
    (signal) => {
      const { step, length_ms } = SPANS[span];
      const from = new Date(Date.now() - length_ms).toISOString();
      return admin(statsSchema, `/stats${query({ tenant, step, from })}`, { signal });
    },
    [tenant, span],
    REFRESH_ms,
  );
  return (
    <>
      <div class="row">
        <Choice
          title="Time"
          value={span}
          options={Object.entries(SPANS).map(([name, { title }]) => [name, title])}
          onPick={setSpan}
        />
      </div>
      <Loaded load={stats}>{(data) => <Picture stats={data} />}</Loaded>
    </>
  );
}

function Picture({ stats }: { readonly stats: Stats }) {
  const series = useMemo(() => sharesOverTime(stats.routing), [stats]);
  const option = useMemo(() => sharesOption(series), [series]);
  if (stats.routing.length === 0) {
    return <Empty>No requests in this time. What is counted appears some seconds after the request.</Empty>;
  }
  return (
    <>
      {stats.balance
        .filter(({ collapsed }) => collapsed)
        .map(({ version, largest_share }) => (
          <Notice key={version} kind="warning">
            Routing has collapsed: {percent(largest_share)} of the requests under {shortVersion(version)} fall
            into one cluster. Its masks were learned on other prompts than these; learn them again on prompts
            of this traffic.
          </Notice>
        ))}
      <Chart label="Share of the routed requests that each cluster gets, over time" option={option} />
      <Table
        caption="Balance"
        empty="No request fell into a cluster."
        rows={stats.balance}
        rowKey={({ version }) => version}
        columns={[
          { title: 'Version', cell: (row) => <code title={row.version}>{shortVersion(row.version)}</code> },
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
      <Table
        caption="Speed and errors by version"
        rows={stats.versions}
        rowKey={({ version, sparsity }) => `${version} ${sparsity}`}
        columns={[
          {
            title: 'Version',
            cell: ({ version }) => (version === null ? 'none' : <code>{shortVersion(version)}</code>),
          },
          {
            title: 'Blocks out',
            cell: ({ sparsity }) => (sparsity === null ? 'unknown' : percent(sparsity)),
            isNumber: true,
          },
          ...FIGURE_COLUMNS,
        ]}
      />
      {stats.backends.length > 0 && (
        <Table
          caption="Speed by backend, all tenants, by ten minutes"
          rows={stats.backends}
          rowKey={({ backend }) => backend}
          columns={[
            { title: 'Backend', cell: ({ backend }) => <code>{backend}</code> },
            { title: 'Answers', cell: ({ answers }) => number(answers), isNumber: true },
            {
              title: 'First token, p50 / p95 / p99',
              cell: ({ ttft_quantiles_ms }) => quantiles(ttft_quantiles_ms, 0),
              isNumber: true,
            },
            {
              title: 'A token, p50 / p95 / p99',
              cell: ({ tpot_quantiles_ms }) => quantiles(tpot_quantiles_ms, 1),
              isNumber: true,
            },
          ]}
        />
      )}
      <Table
        caption="Requests by cluster"
        rows={series.clusters}
        rowKey={({ name }) => name}
        columns={[
          { title: 'Version and cluster', cell: ({ name }) => name },
          { title: 'Requests', cell: ({ requests }) => number(requests), isNumber: true },
          {
            title: 'Share',
            cell: ({ requests }) => percent(requests / Math.max(1, series.requests)),
            isNumber: true,
          },
        ]}
      />
      <Table
        caption="Ran dense, and why"
        empty="No request fell back to the dense model."
        rows={stats.fallbacks}
        rowKey={({ reason }) => reason}
        columns={[
          { title: 'Reason', cell: ({ reason }) => reason.replaceAll('_', ' ') },
          { title: 'Requests', cell: ({ requests }) => number(requests), isNumber: true },
        ]}
      />
    </>
  );
}

const sharesOption =
  ({ clusters }: Series) =>
  (palette: Palette): ChartOption => ({
    grid: { left: 60, right: 30, top: 50, bottom: 40 },
    legend: legend(palette),
    tooltip: { ...tooltip(palette), trigger: 'axis', valueFormatter: (value) => percent(Number(value)) },
    xAxis: axis(palette, '', { type: 'time' }),
    yAxis: axis(palette, 'share of requests', { type: 'value', min: 0, max: 1, nameGap: 42 }),
    series: clusters.map(({ name, shares }) => ({
      type: 'line',
      name,
      stack: 'all',
      areaStyle: { opacity: 0.5 },
      showSymbol: shares.length < 60,
      data: shares.map(({ start_ms, share }) => [start_ms, share]),
    })),
  });
