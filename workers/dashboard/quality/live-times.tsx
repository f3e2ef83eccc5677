/** What a token took in live traffic, by the share of blocks that was out: the cost beside what was measured offline. */
import { statsSchema } from '../../../shared/admin-stats.ts';
import { admin, query } from '../api.ts';
import { quantiles } from '../components/figures.tsx';
import { Loaded } from '../components/notice.tsx';
import { Table } from '../components/table.tsx';
import { useScope } from '../context.ts';
import { number, percent, shortVersion } from '../format.ts';
import { useLoad } from '../use-load.ts';

const SPAN_ms = 30 * 86_400_000;

export function LiveTimes() {
  const { tenant } = useScope();
  const stats = useLoad(
    (signal) => {
      const from = new Date(Date.now() - SPAN_ms).toISOString();
      return admin(statsSchema, `/stats${query({ tenant, step: 'day', from })}`, { signal });
    },
    [tenant],
  );
  return (
    <Loaded load={stats}>
      {({ versions }) => (
        <Table
          caption="A token in live traffic, by blocks out, last 30 days"
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
            { title: 'Blocks out', cell: ({ sparsity }) => percent(sparsity), isNumber: true },
            { title: 'Requests', cell: ({ figures }) => number(figures.requests), isNumber: true },
            { title: 'ms a token', cell: ({ figures }) => number(figures.tpot_ms!, 2), isNumber: true },
            {
              title: 'p50 / p95 / p99',
              cell: ({ figures }) => quantiles(figures.tpot_quantiles_ms, 1),
              isNumber: true,
            },
          ]}
        />
      )}
    </Loaded>
  );
}
