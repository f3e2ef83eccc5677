/** Quality kept against what a token costs: the held-out figures of every mask set, baselines among them. */
import { useMemo, useState } from 'preact/hooks';
import { listSchema, maskSetSummarySchema } from '../../../shared/admin.ts';
import { maskSetSchema } from '../../../shared/mask-set.ts';
import { admin, query } from '../api.ts';
import { axis, Chart, type ChartOption, legend, type Palette, tooltip } from '../components/chart.tsx';
import { Empty, Loaded } from '../components/notice.tsx';
import { Table } from '../components/table.tsx';
import { useScope } from '../context.ts';
import { number, percent } from '../format.ts';
import { type Measure, paretoFront, type QualityRow, qualityRows } from '../held-out.ts';
import { useLoad } from '../use-load.ts';

/** Each set is read whole; the newest say enough. */
const SET_COUNT_MAX = 12;

export function Quality() {
  const { tenant } = useScope();
  const rows = useLoad((signal) => loadRows(tenant, signal), [tenant]);
  return (
    <Loaded load={rows}>
      {(found) =>
        found.length === 0 ? (
          <Empty>No mask set with held-out figures was uploaded yet.</Empty>
        ) : (
          <Picture rows={found} />
        )
      }
    </Loaded>
  );
}

async function loadRows(tenant: string, signal: AbortSignal): Promise<QualityRow[]> {
  const scope = query({ tenant });
  const { data } = await admin(listSchema(maskSetSummarySchema), `/mask-sets${scope}`, { signal });
  const sets = await Promise.all(
    data
      .slice(0, SET_COUNT_MAX)
      .map(({ version }) => admin(maskSetSchema, `/mask-sets/${version}${scope}`, { signal })),
  );
  return sets.flatMap(qualityRows);
}

const MEASURES: Record<Measure, string> = {
  kl: 'KL to dense (less is better)',
  agreement: 'top-1 agreement with dense (more is better)',
  perplexity: 'perplexity (less is better)',
};
const COSTS = {
  sparsity: 'blocks that run, %',
  time: 'ms a token',
} as const;
type Cost = keyof typeof COSTS;

const costOf = (cost: Cost) => (row: QualityRow) =>
  cost === 'time' ? row.ms_per_token : 100 * (1 - row.sparsity);

function Picture({ rows }: { readonly rows: readonly QualityRow[] }) {
  const [measure, setMeasure] = useState<Measure>('kl');
  const hasTimes = rows.some((row) => row.ms_per_token !== null);
  const [cost, setCost] = useState<Cost>('sparsity');
  const option = useMemo(() => paretoOption(rows, cost, measure), [rows, cost, measure]);
  return (
    <>
      <p>
        Figures on held-out prompts, as the mask sets carry them. The line joins what nothing else beats: at
        less cost, or at better quality.
      </p>
      <div class="row">
        <label>
          Quality
          <select value={measure} onChange={(event) => setMeasure(event.currentTarget.value as Measure)}>
            {Object.entries(MEASURES).map(([name, title]) => (
              <option key={name} value={name}>
                {title}
              </option>
            ))}
          </select>
        </label>
        <label>
          Cost
          <select value={cost} onChange={(event) => setCost(event.currentTarget.value as Cost)}>
            <option value="sparsity">{COSTS.sparsity}</option>
            {hasTimes && <option value="time">{COSTS.time}</option>}
          </select>
        </label>
      </div>
      <Chart
        label={`${MEASURES[measure]} against ${COSTS[cost]}, one point a method`}
        option={option}
        height_px={400}
      />
      <Table
        caption="Held-out figures"
        rows={rows}
        rowKey={(row) => JSON.stringify(row)}
        columns={[
          { title: 'Mask set', cell: (row) => row.set },
          { title: 'Method', cell: (row) => row.method },
          { title: 'Surrogates', cell: (row) => (row.surrogate ? 'yes' : 'no') },
          { title: 'Blocks out', cell: (row) => percent(row.sparsity), isNumber: true },
          { title: 'KL', cell: (row) => figure(row.kl, 3), isNumber: true },
          {
            title: 'Agreement',
            cell: (row) => (row.agreement === null ? '–' : percent(row.agreement)),
            isNumber: true,
          },
          { title: 'Perplexity', cell: (row) => figure(row.perplexity, 2), isNumber: true },
          { title: 'ms a token', cell: (row) => figure(row.ms_per_token, 2), isNumber: true },
        ]}
      />
    </>
  );
}

const figure = (value: number | null, digits: number): string =>
  value === null ? '–' : number(value, digits);

const paretoOption =
  (rows: readonly QualityRow[], cost: Cost, measure: Measure) =>
  (palette: Palette): ChartOption => {
    const at = costOf(cost);
    const point = (row: QualityRow) => [at(row)!, row[measure]!];
    const drawn = rows.filter((row) => at(row) !== null && row[measure] !== null);
    const methods = [...new Set(drawn.map(({ method }) => method))];
    return {
      grid: { left: 70, right: 30, top: 50, bottom: 55 },
      tooltip: { ...tooltip(palette), trigger: 'item' },
      legend: legend(palette),
      xAxis: axis(palette, COSTS[cost], { type: 'value', scale: true }),
      yAxis: axis(palette, MEASURES[measure], { type: 'value', scale: true, nameGap: 50 }),
      series: [
        ...methods.map((method) => ({
          type: 'scatter' as const,
          name: method,
          symbolSize: method.includes('learn') ? 16 : 11,
          data: drawn
            .filter((row) => row.method === method)
            .map((row) => ({ name: `${row.set}${row.surrogate ? ', surrogates' : ''}`, value: point(row) })),
          tooltip: { formatter: '{a}\n{b}\n{c}' },
        })),
        {
          type: 'line',
          name: 'nothing beats these',
          silent: true,
          symbol: 'none',
          lineStyle: { color: palette.text, type: 'dashed', width: 1 },
          itemStyle: { color: palette.text },
          data: paretoFront(rows, at, measure).map(point),
        },
      ],
    };
  };
