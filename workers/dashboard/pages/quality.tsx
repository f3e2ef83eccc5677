/**
 * Quality kept against what a token costs: an evaluation with its baselines where a set has one, else the held-out
 * figures that the sets carry.
 */

import { useMemo } from 'preact/hooks';
import { statsSchema } from '../../../shared/admin/stats-wire.ts';
import { admin, query } from '../api.ts';
import { Chart } from '../components/chart.tsx';
import { Choice } from '../components/controls.tsx';
import { Empty, Loaded } from '../components/notice.tsx';
import { quantiles, Table } from '../components/table.tsx';
import { useAddressOf, useLoad, useScope } from '../hooks.ts';
import { number, percent, shortVersion } from '../look.ts';
import { savedIn } from './overview.tsx';
import { COSTS, type Cost, MEASURES, paretoOption } from './pareto.ts';
import { type Figures, loadFigures, type Measure, type QualityRow } from './quality-figures.ts';
import { RoutingQuality } from './routing-quality.tsx';

export function Quality() {
  const { tenant } = useScope();
  const figures = useLoad(['figures', tenant], (signal) => loadFigures(tenant, signal));
  return (
    <>
      <Loaded load={figures}>
        {(found) =>
          found.length === 0 ? (
            <Empty>No mask set with held-out figures was uploaded yet.</Empty>
          ) : (
            <Chosen figures={found} />
          )
        }
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
        {measure === 'kl' && ' The upright line is dense, whose KL is 0.'}
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

/* What a token took in live traffic, by the share of blocks that was out: the cost beside what was measured offline. */

const SPAN_ms = 30 * 86_400_000;

function LiveTimes() {
  const { tenant } = useScope();
  const stats = useLoad(['live times', tenant], (signal) => {
    const from = new Date(Date.now() - SPAN_ms).toISOString();
    return admin(statsSchema, `/stats${query({ tenant, step: 'day', from })}`, { signal });
  });
  return (
    <Loaded load={stats}>
      {({ versions, saved }) => (
        <>
          {saved !== undefined && <p>Time saved against dense: {savedIn(saved)}.</p>}
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
              {
                title: 'Version',
                cell: ({ version }) => (version === null ? 'none' : <code>{shortVersion(version)}</code>),
              },
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
            These were measured at different minutes, so a difference between two rows may be the machine’s.
            Only the comparison above is of the same moments.
          </small>
        </>
      )}
    </Loaded>
  );
}
