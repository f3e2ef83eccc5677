/**
 * Quality against cost per token: a set's evaluation with baselines if it has one, else the held-out figures of the
 * sets.
 */
import { useMemo } from 'preact/hooks';
import { type Drift, driftSchema, statsSchema } from '../../../shared/admin/stats-wire.ts';
import { type Headroom, headroomNotes, headroomRows, saidOfRouting } from '../../../shared/mask/held-out.ts';
import { admin, edgeNow_ms, query } from '../api.ts';
import { Chart } from '../components/chart.tsx';
import { Choice } from '../components/controls.tsx';
import { Empty, Loaded, Notice, Unreadable } from '../components/dialog.tsx';
import { quantiles, Table, Version } from '../components/table.tsx';
import { type LiveSet, useAddressOf, useAnswer, useLiveSet, useLoad, useScope } from '../hooks.ts';
import { number, percent, shortVersion } from '../look.ts';
import { type Figures, loadFigures, type Measure, type QualityRow } from './figures.ts';
import { savedIn } from './overview.tsx';
import { COSTS, type Cost, MEASURES, paretoOption } from './pareto.ts';

export function Quality() {
  const { tenant } = useScope();
  const figures = useLoad(['figures', tenant], (signal) => loadFigures(tenant, signal));
  return (
    <>
      <Loaded load={figures}>
        {({ figures: found, unreadable }) => (
          <>
            <Unreadable what={unreadable} />
            {found.length === 0 ? (
              <Empty>No mask set with held-out figures was uploaded yet.</Empty>
            ) : (
              <Chosen figures={found} />
            )}
          </>
        )}
      </Loaded>
      <RoutingQuality />
      <LiveTimes />
    </>
  );
}

function Chosen({ figures }: { readonly figures: readonly Figures[] }) {
  const titles = figures.map(({ title }) => title);
  const [title, setTitle] = useAddressOf('figures', titles, titles[0]!);
  return (
    <>
      <div class="row">
        <Choice title="Figures" value={title} options={titles.map((one) => [one, one])} onPick={setTitle} />
      </div>
      <Picture key={title} {...figures.find((one) => one.title === title)!} />
    </>
  );
}

const ABOUT_EVALUATION =
  'Every method on the same text, which none was made on. Hollow marks leave holes where the others have surrogates.';
const ABOUT_HELD_OUT = 'Figures on held-out prompts, as the mask sets carry them.';

function Picture({ rows, isEvaluation }: Figures) {
  const [measure, setMeasure] = useAddressOf('quality', Object.keys(MEASURES) as Measure[], 'kl');
  const hasTimes = rows.some((row) => row.ms_per_token !== null);
  const costs = (Object.keys(COSTS) as Cost[]).filter((name) => name !== 'time' || hasTimes);
  const [cost, setCost] = useAddressOf('cost', costs, isEvaluation && hasTimes ? 'time' : 'sparsity');
  const option = useMemo(() => paretoOption(rows, cost, measure), [rows, cost, measure]);
  return (
    <>
      <p>
        {isEvaluation ? ABOUT_EVALUATION : ABOUT_HELD_OUT} The dashed line joins what nothing else beats: at
        less cost, or at better quality.
        {measure === 'kl' && ' The vertical line is dense, whose KL is 0.'}
      </p>
      <div class="row">
        <Choice title="Quality" value={measure} options={Object.entries(MEASURES)} onPick={setMeasure} />
        <Choice
          title="Cost"
          value={cost}
          options={costs.map((name) => [name, COSTS[name]])}
          onPick={setCost}
        />
      </div>
      <Chart
        label={`${MEASURES[measure]} against ${COSTS[cost]}, one point a method`}
        option={option}
        height_px={400}
      />
      <Rows caption={isEvaluation ? 'Evaluated methods' : 'Held-out figures'} rows={rows} />
    </>
  );
}

function Rows({ caption, rows }: { readonly caption: string; readonly rows: readonly QualityRow[] }) {
  return (
    <Table
      caption={caption}
      rows={rows}
      rowKey={(row) => JSON.stringify(row)}
      columns={[
        { title: 'Method', cell: (row) => row.method },
        { title: 'Mask set', cell: (row) => row.set ?? '–' },
        ...(rows.some(({ matched }) => matched === 'time')
          ? [{ title: 'Compared at', cell: (row: QualityRow) => MATCHED[row.matched ?? 'count'] }]
          : []),
        { title: 'Surrogates', cell: surrogatesOf },
        { title: 'Blocks skipped', cell: (row) => percent(row.sparsity), isNumber: true },
        { title: 'KL', cell: (row) => number(row.kl, 3), isNumber: true },
        { title: 'Agreement', cell: (row) => percent(row.agreement), isNumber: true },
        { title: 'Perplexity', cell: (row) => number(row.perplexity, 2), isNumber: true },
        { title: 'ms/token', cell: (row) => number(row.ms_per_token, 2), isNumber: true },
      ]}
    />
  );
}

const MATCHED = { count: 'equal blocks', time: 'equal time' } as const;

/** Nothing is skipped in the dense model. */
const surrogatesOf = ({ method, surrogate }: QualityRow): string => {
  if (method === 'dense') return '–';
  return surrogate ? 'yes' : 'no';
};

/* Time per token in live traffic, by the share of skipped blocks. */

const SPAN_ms = 30 * 86_400_000;

function LiveTimes() {
  const { tenant } = useScope();
  const stats = useLoad(['live times', tenant], (signal) => {
    const from = new Date(edgeNow_ms() - SPAN_ms).toISOString();
    return admin(statsSchema, `/stats${query({ tenant, step: 'day', from })}`, { signal });
  });
  return (
    <Loaded load={stats}>
      {({ versions, saved }) => (
        <>
          <p>Time saved against dense: {savedIn(saved)}.</p>
          <Table
            caption="ms/token in live traffic by blocks skipped, last 30 days"
            empty="No live request had its tokens timed in the last 30 days."
            rows={versions
              .flatMap(({ version, sparsity, figures }) =>
                sparsity === null || figures.tpot_ms === null ? [] : [{ version, sparsity, figures }],
              )
              .sort((a, b) => a.sparsity - b.sparsity)}
            rowKey={({ version, sparsity }) => `${version} ${sparsity}`}
            columns={[
              { title: 'Version', cell: ({ version }) => <Version of={version} /> },
              { title: 'Blocks skipped', cell: ({ sparsity }) => percent(sparsity), isNumber: true },
              { title: 'Requests', cell: ({ figures }) => number(figures.requests), isNumber: true },
              { title: 'ms/token', cell: ({ figures }) => number(figures.tpot_ms!, 2), isNumber: true },
              {
                title: 'p50 / p95 / p99',
                cell: ({ figures }) => quantiles(figures.tpot_quantiles_ms, 1),
                isNumber: true,
              },
            ]}
          />
          <small>
            The rows were measured at different times, so a difference may come from the machine. Only the
            comparison above is of the same times.
          </small>
        </>
      )}
    </Loaded>
  );
}

/*
 * Whether routing pays off, by the live set's held-out figures; and drift in live traffic, with advice to learn again.
 */

function RoutingQuality() {
  const live = useLiveSet('');
  return (
    <Loaded load={live}>
      {(found) =>
        found !== null && (
          <>
            <Pays {...found} />
            <Holds version={found.publication.version} />
          </>
        )
      }
    </Loaded>
  );
}

function Pays({ set }: LiveSet) {
  const { headroom, oneMaskReason } = saidOfRouting(set);
  return (
    <section>
      <h2>Does routing pay?</h2>
      {oneMaskReason !== null && <p>All clusters share one mask: {oneMaskReason}.</p>}
      {headroom === null ? (
        <Empty>{set.name} does not say what its routing gains over one mask.</Empty>
      ) : (
        <HeadroomTable name={set.name} headroom={headroom} />
      )}
    </section>
  );
}

function HeadroomTable({ name, headroom }: { readonly name: string; readonly headroom: Headroom }) {
  const rows = headroomRows(headroom);
  return (
    <>
      <Table
        caption={`Headroom of ${headroom.masks} masks, ${name}`}
        rows={rows}
        rowKey={({ name }) => name}
        columns={[
          { title: 'Mask', cell: ({ name }) => name },
          { title: 'KL', cell: ({ kl }) => number(kl, 4), isNumber: true },
          {
            title: '95 %',
            cell: ({ interval }) => spread(interval, (value) => number(value, 4)),
            isNumber: true,
          },
          { title: 'Against one mask', cell: ({ change }) => signed(change), isNumber: true },
          { title: 'its 95 %', cell: ({ changeInterval }) => spread(changeInterval, signed), isNumber: true },
        ]}
      />
      <p>
        {[
          `On ${headroom.rows} held-out prompts, ${headroom.positions} positions.`,
          ...headroomNotes(headroom),
        ].join(' ')}
      </p>
    </>
  );
}

const spread = (interval: readonly [number, number] | null, format: (value: number) => string): string =>
  interval === null ? '–' : `${format(interval[0])} to ${format(interval[1])}`;
const signed = (share: number): string => `${share > 0 ? '+' : ''}${percent(share)}`;

function Holds({ version }: { readonly version: string }) {
  const { tenant } = useScope();
  const drift = useAnswer(driftSchema, `/drift${query({ tenant, version })}`);
  return (
    <section>
      <h2>Does it hold in live traffic?</h2>
      <Loaded load={drift}>
        {(found) => (
          <>
            {found.proposal !== null && <Notice kind="warning">{found.proposal}</Notice>}
            <p>{farText(found)}</p>
            <Clusters {...found} />
          </>
        )}
      </Loaded>
    </section>
  );
}

function farText({ distance }: Drift): string {
  if (distance === null) return 'The mask set has no distances of its prompts from their clusters.';
  const { samples, samples_min, far_share, low, high } = distance;
  if (far_share === null)
    return `${samples} of the ${samples_min} requests needed to compare distances from the clusters were sampled so far.`;
  return (
    `${percent(far_share)} of ${samples} recent requests (${percent(low)} to ${percent(high)}) are farther from every ` +
    'cluster than 95 % of the calibration set.'
  );
}

type Mean = Drift['clusters'][number]['before'];

function Clusters({ version, clusters, pairs_min }: Drift) {
  const mean = ({ pairs, mean, low, high }: Mean) =>
    mean === null
      ? `${pairs} of ${pairs_min} comparisons`
      : `${percent(mean)} (${percent(low)} to ${percent(high)}), ${pairs}`;
  return (
    <Table
      caption={`Agreement with dense answers by cluster, ${shortVersion(version)}`}
      empty="No answer of this version was compared with a dense one yet."
      rows={clusters}
      rowKey={({ cluster }) => String(cluster)}
      columns={[
        { title: 'Cluster', cell: ({ cluster }) => cluster, isNumber: true },
        { title: 'Before', cell: ({ before }) => mean(before), isNumber: true },
        { title: 'Last day', cell: ({ recent }) => mean(recent), isNumber: true },
        { title: 'Drift', cell: ({ drifted }) => (drifted ? 'agrees less than before' : '–') },
      ]}
    />
  );
}
