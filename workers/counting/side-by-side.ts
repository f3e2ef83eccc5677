/**
 * Compares versions: the variants of an experiment, with intervals, and the newest publication with the version that it
 * replaces.
 */
import type {
  Comparison,
  ExperimentDefinition,
  ExperimentResults,
  Figures,
  Latencies,
  Metric,
  Sums,
} from '../../shared/admin/experiment-wire.ts';
import {
  compareMeans,
  compareShares,
  type Difference,
  type Moments,
  meanOf,
  quantilesOf,
  sharesOf,
} from '../../shared/admin/statistics.ts';
import type { ReleaseComparison } from '../../shared/admin/stats-wire.ts';
import { type Database, isoTime } from '../db/d1.ts';
import { type MinuteSums, minuteSumsOfVersion } from '../db/outcomes.ts';
import type { LiveState } from '../db/publication-rows.ts';

const NO_VALUES: Moments = { count: 0, sum: 0, sq: 0 };
const NOTHING: Sums = {
  requests: 0,
  errors: 0,
  prompt_tokens: 0,
  ratings: 0,
  ratings_up: 0,
  ttft_ms: NO_VALUES,
  tpot_ms: NO_VALUES,
  completion_tokens: NO_VALUES,
  agreement: NO_VALUES,
};

export function experimentResults(
  experiment: string,
  { variants, alpha }: Pick<ExperimentDefinition, 'variants' | 'alpha'>,
  region: string,
  sums: ReadonlyMap<string, Sums>,
  latencies: ReadonlyMap<string, Latencies>,
): ExperimentResults {
  const sumsOf = (name: string) => sums.get(name) ?? NOTHING;
  const [control, ...others] = variants;
  // Bonferroni correction: with three variants each of the two comparisons gets half of alpha.
  const alphaEach = alpha / others.length;
  return {
    experiment,
    control: control!.name,
    region,
    alpha,
    variants: variants.map(({ name, mask_set, weight }) => ({
      name,
      mask_set,
      weight,
      figures: figuresOf(sumsOf(name), latencies.get(name)),
    })),
    comparisons: others.flatMap(({ name }) =>
      Object.entries(MEASURES).map(([metric, measure]) =>
        comparison(name, metric as Metric, measure, sumsOf(control!.name), sumsOf(name), alphaEach),
      ),
    ),
  };
}

export const figuresOf = (sums: Sums, latencies: Latencies | undefined): Figures => ({
  requests: sums.requests,
  errors: sums.errors,
  error_rate: ratio(sums.errors, sums.requests),
  ttft_ms: meanOf(sums.ttft_ms),
  tpot_ms: meanOf(sums.tpot_ms),
  ttft_quantiles_ms: latencies === undefined ? null : quantilesOf(latencies.ttft),
  tpot_quantiles_ms: latencies === undefined ? null : quantilesOf(latencies.tpot),
  prompt_tokens: sums.prompt_tokens,
  completion_tokens: sums.completion_tokens.sum,
  completion_tokens_mean: meanOf(sums.completion_tokens),
  ratings: sums.ratings,
  rating_up: ratio(sums.ratings_up, sums.ratings),
  compared: sums.agreement.count,
  agreement: meanOf(sums.agreement),
});

const ratio = (sum: number, count: number): number | null => (count === 0 ? null : sum / count);

type Measure = {
  readonly of: (sums: Sums) => Moments;
  readonly compare: typeof compareMeans;
  readonly better: 'lower' | 'higher' | 'neither';
};
const MEASURES: Record<Metric, Measure> = {
  error_rate: {
    of: ({ requests, errors }) => sharesOf(requests, errors),
    compare: compareShares,
    better: 'lower',
  },
  ttft_ms: { of: ({ ttft_ms }) => ttft_ms, compare: compareMeans, better: 'lower' },
  tpot_ms: { of: ({ tpot_ms }) => tpot_ms, compare: compareMeans, better: 'lower' },
  completion_tokens: {
    of: ({ completion_tokens }) => completion_tokens,
    compare: compareMeans,
    better: 'neither',
  },
  rating_up: {
    of: ({ ratings, ratings_up }) => sharesOf(ratings, ratings_up),
    compare: compareShares,
    better: 'higher',
  },
  agreement: { of: ({ agreement }) => agreement, compare: compareMeans, better: 'higher' },
};

function comparison(
  variant: string,
  metric: Metric,
  { of, compare, better }: Measure,
  control: Sums,
  sums: Sums,
  alpha: number,
): Comparison {
  const [a, b] = [of(control), of(sums)];
  const found = compare(a, b, alpha);
  const none = { difference: null, low: null, high: null, p_value: null };
  return {
    variant,
    metric,
    control_mean: meanOf(a),
    mean: meanOf(b),
    ...(found ?? none),
    verdict: found === null ? 'too_few' : verdict(found, better),
  };
}

function verdict({ low, high }: Difference, better: Measure['better']): Comparison['verdict'] {
  if (low <= 0 && high >= 0) return 'undecided';
  if (better === 'neither') return 'differs';
  return high < 0 === (better === 'lower') ? 'better' : 'worse';
}

/* A publication compared with the version that it replaces, in the minutes in which both had answers. */

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
  const minutes = [...first!.keys()].filter((minute) => second === undefined || second.has(minute));
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
  const [requests, errors] = [total('requests'), total('errors')];
  return {
    version,
    requests,
    errors,
    error_rate: ratio(errors, requests),
    ttft_ms: ratio(total('ttft_sum'), total('ttft_count')),
    tpot_ms: ratio(total('tpot_sum'), total('tpot_count')),
  };
}
