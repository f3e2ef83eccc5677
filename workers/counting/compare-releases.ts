/** How the newest publication does beside what it replaces, in the minutes that both have in common. */
import type { ReleaseComparison } from '../../shared/admin/stats-wire.ts';
import { type Database, isoTime } from '../db/d1.ts';
import { type MinuteSums, minuteSumsOfVersion } from '../db/outcomes.ts';
import type { LiveState } from '../db/publication-rows.ts';

const LOOKS_BACK_ms = 86_400_000;

export async function compareReleases(
  db: Database,
  { tenant, version, base, schedule }: LiveState,
  now_ms: number,
): Promise<ReleaseComparison> {
  const from_ms = Math.max(Math.min(schedule.activateAt_ms, now_ms), now_ms - LOOKS_BACK_ms);
  const versions = base === null || base.version === version ? [version] : [version, base.version];
  const found = await Promise.all(versions.map((of) => minuteSumsOfVersion(db, of, tenant, from_ms)));
  const [first, second] = found;
  const isShared = (minute: number) => second === undefined || (first!.has(minute) && second.has(minute));
  const minutes = [...first!.keys()].filter(isShared);
  return {
    from: isoTime(from_ms),
    minutes: minutes.length,
    sides: versions.map((of, index) =>
      sideOf(
        of,
        minutes.map((minute) => found[index]!.get(minute)!),
      ),
    ),
  };
}

function sideOf(version: string, sums: readonly MinuteSums[]): ReleaseComparison['sides'][number] {
  const total = (name: keyof MinuteSums) => sums.reduce((sum, row) => sum + row[name], 0);
  const mean = (sum: number, count: number) => (count === 0 ? null : sum / count);
  const [requests, errors] = [total('requests'), total('errors')];
  return {
    ...{ version, requests, errors },
    error_rate: mean(errors, requests),
    ttft_ms: mean(total('ttft_sum'), total('ttft_count')),
    tpot_ms: mean(total('tpot_sum'), total('tpot_count')),
  };
}
