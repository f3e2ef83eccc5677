/** The overview: requests, errors, latencies, tokens, and whether masks save time. */
import { useMemo } from 'preact/hooks';
import { ratedSchema } from '../../../shared/admin/requests-wire.ts';
import { type Saved, type Stats, statsSchema } from '../../../shared/admin/stats-wire.ts';
import { admin, query } from '../api.ts';
import { axis, Chart, type ChartOption, legend, type Palette, steps, tooltip } from '../components/chart.tsx';
import { type Range, startOf_ms, useRange } from '../components/controls.tsx';
import { Empty, Loaded } from '../components/dialog.tsx';
import { type FactList, Facts, ListTable, quantiles, Table, When } from '../components/table.tsx';
import { useList, useLoad, useScope } from '../hooks.ts';
import { number, percent } from '../look.ts';

const REFRESH_ms = 15_000;

/** Statistics of a range, refreshed automatically. */
export function useStats(range: Range) {
  const { tenant } = useScope();
  return useLoad(
    ['stats', tenant, range.name],
    (signal) => {
      const from = new Date(startOf_ms(range)).toISOString();
      return admin(statsSchema, `/stats${query({ tenant, step: range.step, from })}`, { signal });
    },
    REFRESH_ms,
  );
}

export function Overview() {
  const { range, picker } = useRange();
  const stats = useStats(range);
  return (
    <>
      <div class="row">{picker}</div>
      <Loaded load={stats}>{(found) => <Picture stats={found} range={range} />}</Loaded>
      <Comments />
    </>
  );
}

function Picture({ stats, range }: { readonly stats: Stats; readonly range: Range }) {
  const option = useMemo(() => requestsOption(stats, range), [stats, range.name]);
  if (stats.routing.length === 0) {
    return <NoRequests />;
  }
  return (
    <>
      <Facts facts={factsOf(stats)} />
      <Chart label="Requests over time, successful and failed" option={option} height_px={260} />
      <Table
        caption="Requests by mask"
        empty="No requests in this time."
        rows={stats.masks}
        rowKey={({ mask }) => mask}
        columns={[
          { title: 'Mask', cell: ({ mask }) => <code>{mask}</code> },
          {
            title: 'Blocks skipped',
            cell: ({ sparsity }) => percent(sparsity),
            sort: ({ sparsity }) => sparsity,
            isNumber: true,
          },
          {
            title: 'Requests',
            cell: ({ requests }) => number(requests),
            sort: ({ requests }) => requests,
            isNumber: true,
          },
          {
            title: 'Share',
            cell: ({ requests }) => percent(requests / Math.max(1, stats.total.requests)),
            isNumber: true,
          },
        ]}
      />
    </>
  );
}

export const NoRequests = () => (
  <Empty>No requests in this time. Requests appear here after some seconds.</Empty>
);

function factsOf({ total, saved }: Stats): FactList {
  return [
    ['Requests', number(total.requests)],
    ['Errors', `${percent(total.error_rate)} (${number(total.errors)})`],
    ['First token, p50 / p95 / p99', `${quantiles(total.ttft_quantiles_ms, 0)} ms`],
    ['ms/token, p50 / p95 / p99', `${quantiles(total.tpot_quantiles_ms, 1)} ms`],
    ['Prompt tokens', number(total.prompt_tokens)],
    ['Completion tokens', number(total.completion_tokens)],
    ['Time saved against dense', savedIn(saved)],
  ];
}

/** The time saved, from answers that ran again masked and dense right after each other. */
export function savedIn({ pairs, pairs_min, mean, low, high }: Saved): string {
  if (mean === null) return `not comparable yet (${number(pairs)} of ${pairs_min} comparisons)`;
  return `${percent(mean)} of ms/token (95 % interval ${percent(low)} to ${percent(high)}, ${number(pairs)} comparisons)`;
}

const requestsOption =
  ({ routing }: Stats, range: Range) =>
  (palette: Palette): ChartOption => {
    const from_ms = startOf_ms(range);
    const starts_ms = Array.from({ length: range.steps }, (_, step) => from_ms + step * range.step_ms);
    const good = starts_ms.map((): number | null => null);
    const bad = starts_ms.map((): number | null => null);
    for (const { start, requests, errors } of routing) {
      const step = Math.floor((Date.parse(start) - from_ms) / range.step_ms);
      if (step < 0 || step >= range.steps) continue;
      good[step] = (good[step] ?? 0) + requests - errors;
      bad[step] = (bad[step] ?? 0) + errors;
    }
    const bars = (name: string, data: (number | null)[], color: string) => ({
      type: 'bar' as const,
      stack: 'all',
      name,
      data,
      itemStyle: { color },
    });
    return {
      grid: { left: 60, right: 20, top: 40, bottom: 40 },
      legend: legend(palette),
      tooltip: { ...tooltip(palette), trigger: 'axis' },
      xAxis: steps(palette, starts_ms, range.step_ms),
      yAxis: axis(palette, 'requests', { type: 'value', minInterval: 1, nameGap: 42 }),
      series: [bars('answered', good, palette.series[0]!), bars('failed', bad, palette.series[5]!)],
    };
  };

function Comments() {
  const { tenant } = useScope();
  const list = useList(
    ratedSchema,
    '/ratings',
    { tenant: tenant || undefined, commented: 'true' },
    { every_ms: REFRESH_ms },
  );
  return (
    <ListTable
      caption="Comments on answers, newest first"
      list={list}
      empty="No rating has a comment yet."
      rowKey={({ request, created_at }) => `${request} ${created_at}`}
      columns={[
        { title: 'When', cell: ({ created_at }) => <When at={created_at} /> },
        { title: 'Rating', cell: ({ rating }) => (rating > 0 ? 'good' : 'bad') },
        { title: 'Comment', cell: ({ comment }) => <span class="prose">{comment}</span> },
        { title: 'Tenant', cell: ({ tenant: of }) => of },
        { title: 'Request', cell: ({ request }) => <code>{request}</code> },
      ]}
    />
  );
}
