/** The columns of what was counted of requests, wherever they are shown. */
import type { Figures } from '../../../shared/experiment-results.ts';
import { number, percent } from '../format.ts';
import type { Column } from './table.tsx';

const share = (value: number | null): string => (value === null ? '–' : percent(value));
/** p50 / p95 / p99. */
export const quantiles = (values: Figures['ttft_quantiles_ms'], digits: number): string =>
  values === null ? '–' : [values.p50, values.p95, values.p99].map((ms) => number(ms, digits)).join(' / ');
const mean = (value: number | null, digits: number): string => (value === null ? '–' : number(value, digits));

export const FIGURE_COLUMNS: readonly Column<{ readonly figures: Figures }>[] = [
  { title: 'Requests', cell: ({ figures }) => number(figures.requests), isNumber: true },
  { title: 'Errors', cell: ({ figures }) => share(figures.error_rate), isNumber: true },
  { title: 'First token, ms', cell: ({ figures }) => mean(figures.ttft_ms, 0), isNumber: true },
  {
    title: 'First token, p50 / p95 / p99',
    cell: ({ figures }) => quantiles(figures.ttft_quantiles_ms, 0),
    isNumber: true,
  },
  { title: 'ms a token', cell: ({ figures }) => mean(figures.tpot_ms, 1), isNumber: true },
  {
    title: 'A token, p50 / p95 / p99',
    cell: ({ figures }) => quantiles(figures.tpot_quantiles_ms, 1),
    isNumber: true,
  },
  { title: 'Tokens out', cell: ({ figures }) => number(figures.completion_tokens), isNumber: true },
  { title: 'Good ratings', cell: ({ figures }) => share(figures.rating_up), isNumber: true },
  { title: 'Agreement', cell: ({ figures }) => share(figures.agreement), isNumber: true },
];
