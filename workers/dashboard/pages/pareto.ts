/** The chart of quality against cost: dense and the learned masks stand out, baselines are told apart. */
import { axis, type ChartOption, legend, type Palette, tooltip } from '../components/chart.tsx';
import { type Measure, paretoFront, type QualityRow } from './figures.ts';

export const MEASURES: Record<Measure, string> = {
  kl: 'KL to dense (less is better)',
  agreement: 'top-1 agreement with dense (more is better)',
  perplexity: 'perplexity (less is better)',
};
export const COSTS = {
  sparsity: 'blocks that run, %',
  time: 'ms/token',
} as const;
export type Cost = keyof typeof COSTS;

const costOf = (cost: Cost) => (row: QualityRow) =>
  cost === 'time' ? row.ms_per_token : 100 * (1 - row.sparsity);

/** In the palette: vermilion, which no baseline gets. */
const LEARNED_COLOUR = 5;
const BASELINE_COLOURS = [0, 1, 2, 3, 4, 6];
/** With six colours it takes twelve baselines until two look the same. */
const SYMBOLS = ['rect', 'triangle', 'circle', 'arrow'];

const isLearned = (method: string): boolean => method.startsWith('learn');

function markOf(method: string, index: number, palette: Palette) {
  const label = { show: true, position: 'left' as const, color: palette.text, formatter: method };
  if (method === 'dense') return { symbol: 'diamond', symbolSize: 18, color: palette.text, label };
  if (isLearned(method)) {
    return { symbol: 'circle', symbolSize: 18, color: palette.series[LEARNED_COLOUR]!, label };
  }
  const color = palette.series[BASELINE_COLOURS[index % BASELINE_COLOURS.length]!]!;
  return { symbol: SYMBOLS[index % SYMBOLS.length]!, symbolSize: 11, color, label: { show: false } };
}

/** A logarithmic axis for figures of different orders of magnitude; base 2, since few differ by a factor of ten. */
const LOG = { type: 'log', logBase: 2 } as const;

/** One series a method; hollow marks are masks that leave holes. */
export const paretoOption =
  (rows: readonly QualityRow[], cost: Cost, measure: Measure) =>
  (palette: Palette): ChartOption => {
    const at = costOf(cost);
    const isLog = measure !== 'agreement';
    const known = rows.filter((row) => at(row) !== null && row[measure] !== null);
    const hasPlace = (row: QualityRow) => measure !== 'kl' || (row.method !== 'dense' && row.kl! > 0);
    const drawn = known.filter(hasPlace);
    const methods = [...new Set(drawn.map(({ method }) => method))];
    const baselines = methods.filter((method) => method !== 'dense' && !isLearned(method));
    const point = (row: QualityRow) => [at(row)!, row[measure]!];
    // Every set has figures of dense.
    const costsOfDense = new Set(known.filter((row) => !hasPlace(row)).map((row) => at(row)!));
    return {
      grid: { left: 70, right: 60, top: 50, bottom: 55 },
      tooltip: { ...tooltip(palette), trigger: 'item' },
      legend: { ...legend(palette), itemWidth: 14, itemHeight: 12 },
      xAxis: axis(palette, COSTS[cost], { type: 'value', scale: true }),
      yAxis: axis(palette, MEASURES[measure], {
        ...(isLog ? LOG : { type: 'value', scale: true }),
        nameGap: 50,
      }),
      series: [
        ...methods.map((method) => {
          const { color, ...mark } = markOf(method, baselines.indexOf(method), palette);
          const hollow = { color: palette.background, borderColor: color, borderWidth: 2 };
          return {
            type: 'scatter' as const,
            name: method,
            ...mark,
            itemStyle: { color, opacity: 1 },
            data: drawn
              .filter((row) => row.method === method)
              .map((row) => ({
                name: describe(row),
                value: point(row),
                ...(row.surrogate || method === 'dense' ? {} : { itemStyle: hollow }),
              })),
            tooltip: { formatter: '{a}\n{b}\n{c}' },
          };
        }),
        ...[...costsOfDense].map((dense) => uprightLine(dense, drawn.map(point), palette)),
        {
          type: 'line',
          name: 'nothing beats these',
          silent: true,
          symbol: 'none',
          lineStyle: { color: palette.text, type: 'dashed', width: 1 },
          itemStyle: { color: palette.text },
          data: paretoFront(drawn, at, measure).map(point),
        },
      ],
    };
  };

/** Dense has KL 0, which has no place on a logarithmic axis: a vertical line shows its cost. */
function uprightLine(at: number, points: readonly number[][], palette: Palette) {
  const name = 'dense';
  const values = points.map(([, value]) => value!);
  return {
    type: 'line' as const,
    name,
    silent: true,
    symbol: 'none',
    lineStyle: { color: palette.text, width: 2 },
    itemStyle: { color: palette.text },
    endLabel: { show: true, formatter: name, color: palette.text },
    data: values.length === 0 ? [] : [Math.min(...values), Math.max(...values)].map((value) => [at, value]),
  };
}

const describe = ({ set, method, surrogate, matched }: QualityRow): string =>
  [
    ...(set === null ? [] : [set]),
    ...(method === 'dense' ? [] : [surrogate ? 'surrogates' : 'holes']),
    ...(matched === 'time' ? ['as fast as learned'] : []),
  ].join(', ');
