/** A table with a caption: the readable side of every chart. */
import type { ComponentChildren } from 'preact';
import type { Figures } from '../../../shared/admin/experiment-wire.ts';
import { number, percent } from '../look.ts';
import { Empty } from './notice.tsx';

type Column<Row> = {
  readonly title: string;
  readonly cell: (row: Row) => ComponentChildren;
  /** Figures stand to the right. */
  readonly isNumber?: boolean;
};

export function Table<Row>(props: {
  readonly caption: string;
  readonly columns: readonly Column<Row>[];
  readonly rows: readonly Row[];
  readonly rowKey: (row: Row) => string;
  readonly empty?: string;
}) {
  const { caption, columns, rows, rowKey } = props;
  if (rows.length === 0) return <Empty>{props.empty ?? `${caption}: none yet.`}</Empty>;
  return (
    <Scroll label={caption}>
      <table class="data">
        <caption>{caption}</caption>
        <thead>
          <tr>
            {columns.map(({ title, isNumber }) => (
              <th key={title} scope="col" class={isNumber ? 'number' : undefined}>
                {title}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {rows.map((row) => (
            <tr key={rowKey(row)}>
              {columns.map(({ title, cell, isNumber }) => (
                <td key={title} class={isNumber ? 'number' : undefined}>
                  {cell(row)}
                </td>
              ))}
            </tr>
          ))}
        </tbody>
      </table>
    </Scroll>
  );
}

/** A wide thing that scrolls by itself, with the arrow keys too, which is why it takes the focus. */
export function Scroll({
  label,
  children,
}: {
  readonly label: string;
  readonly children: ComponentChildren;
}) {
  return (
    // biome-ignore lint/a11y/noNoninteractiveTabindex: without the focus, only a mouse could scroll it
    <section class="scroll" aria-label={label} tabIndex={0}>
      {children}
    </section>
  );
}

/** What is known of one thing: names and values. */
export type FactList = readonly (readonly [name: string, value: string])[];

export const Facts = ({ facts }: { readonly facts: FactList }) => (
  <dl class="facts">
    {facts.map(([name, value]) => (
      <div key={name}>
        <dt>{name}</dt>
        <dd>{value}</dd>
      </div>
    ))}
  </dl>
);

/* The columns of what was counted of requests, wherever they are shown. */

/** p50 / p95 / p99. */
export const quantiles = (values: Figures['ttft_quantiles_ms'], digits: number): string =>
  values === null ? '–' : [values.p50, values.p95, values.p99].map((ms) => number(ms, digits)).join(' / ');

export const FIGURE_COLUMNS: readonly Column<{ readonly figures: Figures }>[] = [
  { title: 'Requests', cell: ({ figures }) => number(figures.requests), isNumber: true },
  { title: 'Errors', cell: ({ figures }) => percent(figures.error_rate), isNumber: true },
  { title: 'First token, ms', cell: ({ figures }) => number(figures.ttft_ms, 0), isNumber: true },
  {
    title: 'First token, p50 / p95 / p99',
    cell: ({ figures }) => quantiles(figures.ttft_quantiles_ms, 0),
    isNumber: true,
  },
  { title: 'ms a token', cell: ({ figures }) => number(figures.tpot_ms, 1), isNumber: true },
  {
    title: 'A token, p50 / p95 / p99',
    cell: ({ figures }) => quantiles(figures.tpot_quantiles_ms, 1),
    isNumber: true,
  },
  { title: 'Tokens out', cell: ({ figures }) => number(figures.completion_tokens), isNumber: true },
  { title: 'Good ratings', cell: ({ figures }) => percent(figures.rating_up), isNumber: true },
  { title: 'Agreement', cell: ({ figures }) => percent(figures.agreement), isNumber: true },
];
