/** From counts by time and cluster to shares over time, ready to be stacked. */
import type { Stats } from '../../shared/admin-stats.ts';
import { shortVersion } from './format.ts';

export type Series = {
  readonly requests: number;
  readonly clusters: readonly {
    readonly name: string;
    readonly requests: number;
    /** At every time at which there was any request, 0 where this cluster had none: stacks need all of them. */
    readonly shares: readonly { readonly start_ms: number; readonly share: number }[];
  }[];
};

export function sharesOverTime(routing: Stats['routing']): Series {
  const totals = new Map<number, number>();
  const counts = new Map<string, Map<number, number>>();
  for (const { start, version, cluster, requests } of routing) {
    const start_ms = Date.parse(start);
    totals.set(start_ms, (totals.get(start_ms) ?? 0) + requests);
    const name = cluster === null ? 'not routed' : `${shortVersion(version ?? 'none')} · ${cluster}`;
    const own = counts.get(name) ?? new Map<number, number>();
    own.set(start_ms, (own.get(start_ms) ?? 0) + requests);
    counts.set(name, own);
  }
  const times = [...totals.keys()].sort((a, b) => a - b);
  const sum = (values: Iterable<number>) => [...values].reduce((total, value) => total + value, 0);
  return {
    requests: sum(totals.values()),
    clusters: [...counts]
      .sort(([a], [b]) => a.localeCompare(b, undefined, { numeric: true }))
      .map(([name, own]) => ({
        name,
        requests: sum(own.values()),
        shares: times.map((start_ms) => ({
          start_ms,
          share: (own.get(start_ms) ?? 0) / totals.get(start_ms)!,
        })),
      })),
  };
}
