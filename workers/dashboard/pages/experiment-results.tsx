/** What came of an experiment: figures a variant, and differences with intervals that hold however often one looks. */
import { useMemo } from 'preact/hooks';
import {
  type Comparison,
  type Experiment,
  type ExperimentResults,
  experimentResultsSchema,
  METRICS,
  type Metric,
} from '../../../shared/admin/experiment-wire.ts';
import type { StickyKind } from '../../../shared/mask/sticky.ts';
import { admin, query } from '../api.ts';
import { axis, Chart, type ChartOption, type Palette, tooltip } from '../components/chart.tsx';
import { Choice } from '../components/controls.tsx';
import { Empty, Loaded } from '../components/notice.tsx';
import { FIGURE_COLUMNS, Table } from '../components/table.tsx';
import { useAddress, useAddressOf, useLoad } from '../hooks.ts';
import { number, percent } from '../look.ts';

const REFRESH_ms = 15_000;

const METRIC_NAMES: Record<Metric, string> = {
  error_rate: 'share of errors',
  ttft_ms: 'ms to the first token',
  tpot_ms: 'ms/token',
  completion_tokens: 'tokens an answer',
  rating_up: 'share of good ratings',
  agreement: 'agreement with dense',
};

export function Results({ experiment }: { readonly experiment: Experiment }) {
  const [region, setRegion] = useAddress('region', '');
  const results = useLoad(
    ['results', experiment.tenant, experiment.id, region],
    (signal) => {
      const path = `/experiments/${experiment.id}/results${query({ tenant: experiment.tenant, region: region || undefined })}`;
      return admin(experimentResultsSchema, path, { signal });
    },
    REFRESH_ms,
  );
  return (
    <section aria-label={`Results of ${experiment.id}`}>
      <h2>Results of {experiment.id}</h2>
      <label>
        Only requests from, like EU, EU/DE or EU/DE/FRA (empty: everywhere)
        <input
          value={region}
          onChange={(event) => setRegion(event.currentTarget.value.trim().replace(/\/+$/, ''))}
        />
      </label>
      <Loaded load={results}>{(found) => <Picture results={found} sticky={experiment.sticky} />}</Loaded>
    </section>
  );
}

function Picture(props: { readonly results: ExperimentResults; readonly sticky: StickyKind }) {
  const { results, sticky } = props;
  const [metric, setMetric] = useAddressOf('figure', METRICS, 'tpot_ms');
  const rows = results.comparisons.filter((row) => row.metric === metric);
  const drawn = rows.filter(({ difference }) => difference !== null);
  const option = useMemo(() => intervalOption(drawn, metric), [results, metric]);
  return (
    <>
      <Table
        caption="Variants"
        rows={results.variants}
        rowKey={({ name }) => name}
        columns={[
          { title: 'Variant', cell: ({ name }) => (name === results.control ? `${name} (control)` : name) },
          { title: 'Mask set', cell: ({ mask_set }) => <code>{mask_set}</code> },
          { title: 'Weight', cell: ({ weight }) => weight, isNumber: true },
          ...FIGURE_COLUMNS,
        ]}
      />
      <Choice
        title="Compared by"
        value={metric}
        options={METRICS.map((name) => [name, METRIC_NAMES[name]])}
        onPick={setMetric}
      />
      {drawn.length === 0 ? (
        <Empty>Too few values on one side for an interval of this figure.</Empty>
      ) : (
        <Chart
          label={`Difference from ${results.control} in ${METRIC_NAMES[metric]}, with intervals`}
          option={option}
          height_px={120 + 40 * drawn.length}
        />
      )}
      <Table
        caption={`Differences from ${results.control}`}
        rows={results.comparisons}
        rowKey={(row) => `${row.variant} ${row.metric}`}
        columns={[
          { title: 'Variant', cell: (row) => row.variant },
          { title: 'Figure', cell: (row) => METRIC_NAMES[row.metric] },
          { title: results.control, cell: (row) => figure(row.control_mean), isNumber: true },
          { title: 'Variant’s', cell: (row) => figure(row.mean), isNumber: true },
          { title: 'Difference', cell: (row) => figure(row.difference), isNumber: true },
          { title: `${percent(1 - results.alpha, 0)} interval`, cell: intervalOf, isNumber: true },
          { title: 'p', cell: (row) => number(row.p_value, 4), isNumber: true },
          { title: 'Verdict', cell: (row) => row.verdict.replaceAll('_', ' ') },
        ]}
      />
      <small>
        Intervals and p-values hold at any time of looking, as often as you like, where requests do not depend
        on each other. Those of one {sticky.replaceAll('_', ' ')} resemble each other: the more of them there
        are of each, the more intervals are narrower, and p-values smaller, than they should be.
      </small>
    </>
  );
}

const figure = (value: number | null): string => number(value, 3);
const intervalOf = ({ low, high }: Comparison): string =>
  low === null || high === null ? '–' : `${figure(low)} to ${figure(high)}`;

const intervalOption =
  (rows: readonly Comparison[], metric: Metric) =>
  (palette: Palette): ChartOption => ({
    grid: { left: 140, right: 40, top: 20, bottom: 55 },
    tooltip: { ...tooltip(palette), trigger: 'item' },
    // Without a scale of its own the axis has zero in view: the question is whether an interval leaves it out.
    xAxis: axis(palette, `difference in ${METRIC_NAMES[metric]}`, { type: 'value' }),
    yAxis: {
      type: 'category',
      data: rows.map(({ variant }) => variant),
      axisLabel: { color: palette.text },
      axisLine: { lineStyle: { color: palette.text } },
    },
    series: rows.flatMap(({ variant, low, high, difference }, index) => {
      const color = palette.series[index % palette.series.length]!;
      return [
        {
          type: 'line' as const,
          symbol: 'none',
          lineStyle: { color, width: 3 },
          data: [
            [low!, variant],
            [high!, variant],
          ],
        },
        {
          type: 'scatter' as const,
          symbolSize: 12,
          itemStyle: { color },
          data: [{ name: variant, value: [difference!, variant] }],
          tooltip: { formatter: `${variant}: ${figure(difference)} (${figure(low)} to ${figure(high)})` },
        },
      ];
    }),
  });
