/** An evaluation as aligned text for a terminal. */
import type { Evaluation, EvaluationRow, RowCounts } from './result.ts';

const COLUMNS: readonly (readonly [title: string, cell: (row: EvaluationRow) => string])[] = [
  ['method', ({ method, clusters }) => (clusters > 1 ? `${method} (${clusters})` : method)],
  ['target', ({ targetSparsity }) => percent(targetSparsity)],
  ['out', ({ attention, ffn }) => `${number(attention)}A ${number(ffn)}F`],
  ['surrogates', ({ surrogate }) => (surrogate ? 'yes' : 'no')],
  ['KL', ({ kl, intervals }) => `${kl.toFixed(3)}${plusMinus(intervals.kl, 3)}`],
  ['top-1', ({ agreement }) => percent(agreement)],
  [
    'perplexity',
    ({ perplexity }) => (perplexity < 10_000 ? perplexity.toFixed(1) : perplexity.toExponential(1)),
  ],
  ['ms/token', ({ msPerToken }) => msPerToken.toFixed(2)],
  ['searched', ({ evaluations }) => (evaluations === null ? '' : String(evaluations))],
];

export function formatEvaluation({ rows, equalTime, notes }: Evaluation): string {
  const parts = [`Equal count, ${rows[0]!.rows} rows, ${rows[0]!.positions} positions:`, table(rows)];
  if (equalTime.length > 0) {
    const learned = rows.filter(({ method }) => method === 'learned');
    parts.push(
      '',
      'Equal time (static methods as fast as the learned set):',
      table([...learned, ...equalTime]),
    );
  }
  return [...parts, ...notes].join('\n');
}

/** What became of the rows that were read. */
export function dataLine({ read, repeated, calibrating, learnedOn, left }: RowCounts): string {
  return (
    `of ${read} rows ${repeated} are repeated, ${calibrating} calibrate, ` +
    `${learnedOn} were learned on, and ${left} can be scored`
  );
}

function table(rows: readonly EvaluationRow[]): string {
  const lines = [COLUMNS.map(([title]) => title), ...rows.map((row) => COLUMNS.map(([, cell]) => cell(row)))];
  const widths = COLUMNS.map((_, i) => Math.max(...lines.map((line) => line[i]!.length)));
  return lines
    .map((line) =>
      line
        .map((cell, i) => cell.padEnd(widths[i]!))
        .join('  ')
        .trimEnd(),
    )
    .join('\n');
}

const percent = (value: number): string => `${(100 * value).toFixed(1)} %`;
const number = (value: number): string => (Number.isInteger(value) ? String(value) : value.toFixed(1));
const plusMinus = (interval: EvaluationRow['intervals']['kl'], digits: number): string =>
  interval === null ? '' : ` [${interval.map((value) => value.toFixed(digits)).join(', ')}]`;
