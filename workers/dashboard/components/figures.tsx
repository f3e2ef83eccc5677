/** The columns of what was counted of requests, wherever they are shown. */
import type { Figures } from '../../../shared/experiment-results.ts';
import { number, percent } from '../format.ts';
import type { Column } from './table.tsx';

const share = (value: number | null): string => (value === null ? '–' : percent(value));
const mean = (value: number | null, digits: number): string => (value === null ? '–' : number(value, digits));

export const FIGURE_COLUMNS: readonly Column<{ readonly figures: Figures }>[] = [
  { title: 'Requests', cell: ({ figures }) => number(figures.requests), isNumber: true },
  { title: 'Errors', cell: ({ figures }) => share(figures.error_rate), isNumber: true },
  { title: 'First token, ms', cell: ({ figures }) => mean(figures.ttft_ms, 0), isNumber: true },
  { title: 'ms a token', cell: ({ figures }) => mean(figures.tpot_ms, 1), isNumber: true },
  { title: 'Tokens out', cell: ({ figures }) => number(figures.completion_tokens), isNumber: true },
  { title: 'Good ratings', cell: ({ figures }) => share(figures.rating_up), isNumber: true },
  { title: 'Agreement', cell: ({ figures }) => share(figures.agreement), isNumber: true },
];
