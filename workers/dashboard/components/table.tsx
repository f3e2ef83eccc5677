/** Tables with captions: the figures of charts, and searchable lists. */
import { createSortedRowModel, rowSortingFeature, tableFeatures, useTable } from '@tanstack/preact-table';
import type { ComponentChildren } from 'preact';
import { useMemo, useRef, useState } from 'preact/hooks';
import type { Figures } from '../../../shared/admin/experiment-wire.ts';
import type { List } from '../hooks.ts';
import { number, percent, shortVersion, whenExactly } from '../look.ts';
import { Search, type SearchProps } from './controls.tsx';
import { Empty, Loaded, Unreadable } from './dialog.tsx';

export type Column<Row> = {
  readonly title: string;
  readonly cell: (row: Row) => ComponentChildren;
  /** Whether to align to the right. */
  readonly isNumber?: boolean;
  /** Sort key of a row; absent: the column cannot be sorted. Null comes last. */
  readonly sort?: (row: Row) => string | number | null;
  /** The column has buttons, which stay in view when the table scrolls. */
  readonly isActions?: boolean;
};

/** A column's title and direction. */
export type Sorting = { readonly title: string; readonly isFalling: boolean };
type Sorted = { readonly by: Sorting | undefined; readonly onSort: (by: Sorting | undefined) => void };

const features = tableFeatures({ rowSortingFeature, sortedRowModel: createSortedRowModel() });

type TableProps<Row> = {
  readonly caption: string;
  readonly columns: readonly Column<Row>[];
  readonly rows: readonly Row[];
  readonly rowKey: (row: Row) => string;
  readonly empty?: string | undefined;
  /** Sorting by the edge, for lists with more rows than are loaded; absent: the table sorts its rows itself. */
  readonly sorted?: Sorted | undefined;
  /** Not all rows are loaded, so sorting these would mislead. */
  readonly isPart?: boolean;
};

/** The rows in order, with their keys. */
function useRows<Row>(props: TableProps<Row>, by: Sorting | undefined): { id: string; original: Row }[] {
  const { columns, rows, rowKey, sorted, isPart } = props;
  // Columns are new at every render, since cells depend on the page's state; a ref keeps the table's definition stable.
  const current = useRef(columns);
  current.current = columns;
  const titles = columns.map(({ title }) => title).join('\n');
  const defined = useMemo(
    () =>
      columns.map((column, index) => ({
        id: column.title,
        accessorFn: (row: Row) => current.current[index]?.sort?.(row) ?? undefined,
        enableSorting: column.sort !== undefined && isPart !== true,
        sortUndefined: 'last' as const,
        sortFn: (a: { original: Row }, b: { original: Row }) =>
          compare(current.current[index]?.sort?.(a.original), current.current[index]?.sort?.(b.original)),
      })),
    [titles, isPart],
  );
  const data = useMemo(() => [...rows], [rows]);
  const table = useTable({
    features,
    columns: defined,
    data: data as (Row & object)[],
    getRowId: rowKey,
    manualSorting: sorted !== undefined,
    state: { sorting: by === undefined ? [] : [{ id: by.title, desc: by.isFalling }] },
  } as never);
  return (table as unknown as { getRowModel(): { rows: { id: string; original: Row }[] } }).getRowModel()
    .rows;
}

export function Table<Row>(props: TableProps<Row>) {
  const { caption, columns, sorted } = props;
  const [own, setOwn] = useState<Sorting>();
  const by = sorted === undefined ? own : sorted.by;
  const onSort = sorted?.onSort ?? setOwn;
  const rows = useRows(props, by);
  if (rows.length === 0)
    return (
      <Empty>
        {props.empty ?? `No ${caption.replace(/^[A-Z](?=[a-z])/, (first) => first.toLowerCase())} yet.`}
      </Empty>
    );
  return (
    <Scroll label={caption}>
      <table class="data">
        <caption>{caption}</caption>
        <thead>
          <tr>
            {columns.map((column) => (
              <Head
                key={column.title}
                column={column}
                canSort={column.sort !== undefined && props.isPart !== true}
                by={by?.title === column.title ? by : undefined}
                onSort={onSort}
              />
            ))}
          </tr>
        </thead>
        <tbody>
          {rows.map(({ id, original }) => (
            <tr key={id}>
              {columns.map((column) => (
                <td key={column.title} class={classOf(column)}>
                  {column.cell(original)}
                </td>
              ))}
            </tr>
          ))}
        </tbody>
      </table>
    </Scroll>
  );
}

const compare = (a: string | number | null | undefined, b: string | number | null | undefined): number =>
  typeof a === 'number' && typeof b === 'number'
    ? a - b
    : String(a).localeCompare(String(b), undefined, { numeric: true });

const classOf = ({
  isNumber,
  isActions,
}: Pick<Column<never>, 'isNumber' | 'isActions'>): string | undefined =>
  isActions === true ? 'actions' : isNumber === true ? 'number' : undefined;

function Head<Row>(props: {
  readonly column: Column<Row>;
  readonly canSort: boolean;
  readonly by: Sorting | undefined;
  readonly onSort: (by: Sorting | undefined) => void;
}) {
  const { column, by } = props;
  const { title } = column;
  if (!props.canSort) {
    return (
      <th scope="col" class={classOf(column)}>
        {title}
      </th>
    );
  }
  // Numbers sort in descending order first; a third press restores the original order.
  const first = column.isNumber === true;
  const next =
    by === undefined
      ? { title, isFalling: first }
      : by.isFalling === first
        ? { title, isFalling: !first }
        : undefined;
  return (
    <th
      scope="col"
      class={classOf(column)}
      aria-sort={by === undefined ? undefined : by.isFalling ? 'descending' : 'ascending'}
    >
      <button type="button" class="sort" onClick={() => props.onSort(next)}>
        {title} <span aria-hidden="true">{by === undefined ? '↕' : by.isFalling ? '↓' : '↑'}</span>
      </button>
    </th>
  );
}

/** The text in place of rows; `q`: the search, if there is one. */
export const emptyText = <T extends string | undefined>(q: string | undefined, empty: T): string | T =>
  q ? `Nothing matches “${q}”.` : empty;

/** A paginated list: a search field, the rows loaded so far, and a button for more. */
export function ListTable<Row>(props: {
  readonly list: List<Row>;
  readonly caption: string;
  readonly columns: readonly Column<Row>[];
  readonly rowKey: (row: Row) => string;
  readonly empty?: string;
  readonly search?: SearchProps;
  readonly sorted?: Sorted;
}) {
  const { list, search } = props;
  const empty = emptyText(search?.value, props.empty);
  return (
    <>
      {search !== undefined && <Search {...search} />}
      <Loaded load={list}>
        {(rows) => (
          <>
            <Unreadable what={list.unreadable} />
            <Table
              caption={props.caption}
              columns={props.columns}
              rows={rows}
              rowKey={props.rowKey}
              isPart={list.more !== undefined && props.sorted === undefined}
              empty={empty}
              sorted={props.sorted}
            />
            {list.more !== undefined && (
              <p class="row">
                <button type="button" class="outline" onClick={list.more} aria-busy={list.isLoadingMore}>
                  Load more
                </button>
                <small>{number(rows.length)} so far</small>
              </p>
            )}
          </>
        )}
      </Loaded>
    </>
  );
}

/** A container that scrolls sideways; it is focusable so that the arrow keys scroll it. */
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

/** A time in a table, with seconds; in a narrow window in two lines, as the first column has little room. */
export const When = ({ at }: { readonly at: string }) => <time dateTime={at}>{whenExactly(at)}</time>;

/** The version of a mask set, in short; `none`: what null means. */
export const Version = ({ of, none = 'none' }: { readonly of: string | null; readonly none?: string }) =>
  of === null ? none : <code title={of}>{shortVersion(of)}</code>;

/** A text of any length, such as a prompt; a long one scrolls, also by keyboard. */
export const LongText = ({ label, text }: { readonly label: string; readonly text: string }) => (
  // biome-ignore lint/a11y/noNoninteractiveTabindex: without the focus, only a mouse could scroll it
  <section class="scroll text" aria-label={label} tabIndex={0}>
    <pre class="prose">{text}</pre>
  </section>
);

/** Facts as names and values. */
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

/* Columns of request figures, for all tables that show them. */

/** p50 / p95 / p99. */
export const quantiles = (values: Figures['ttft_quantiles_ms'], digits: number): string =>
  values === null ? '–' : [values.p50, values.p95, values.p99].map((ms) => number(ms, digits)).join(' / ');

export const quantileColumn = <Row,>(
  title: string,
  digits: number,
  of: (row: Row) => Figures['ttft_quantiles_ms'],
): Column<Row> => ({
  title: `${title}, p50 / p95 / p99`,
  cell: (row) => quantiles(of(row), digits),
  isNumber: true,
});

const figureColumn = (
  title: string,
  sort: (figures: Figures) => number | null,
  text: (value: number | null) => string,
): Column<{ readonly figures: Figures }> => ({
  title,
  cell: ({ figures }) => text(sort(figures)),
  sort: ({ figures }) => sort(figures),
  isNumber: true,
});

export const FIGURE_COLUMNS: readonly Column<{ readonly figures: Figures }>[] = [
  figureColumn('Requests', ({ requests }) => requests, number),
  figureColumn('Errors', ({ error_rate }) => error_rate, percent),
  figureColumn('First token, ms', ({ ttft_ms }) => ttft_ms, number),
  quantileColumn('First token', 0, ({ figures }) => figures.ttft_quantiles_ms),
  figureColumn(
    'ms/token',
    ({ tpot_ms }) => tpot_ms,
    (ms) => number(ms, 1),
  ),
  quantileColumn('ms/token', 1, ({ figures }) => figures.tpot_quantiles_ms),
  figureColumn('Completion tokens', ({ completion_tokens }) => completion_tokens, number),
  figureColumn('Good ratings', ({ rating_up }) => rating_up, percent),
  figureColumn('Agreement', ({ agreement }) => agreement, percent),
];
