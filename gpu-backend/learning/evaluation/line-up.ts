/**
 * The contestants: dense, each mask set with its N masks and with its one mask, and the static methods at each
 * sparsity.
 */
import type { Mask, SurrogatesId } from '../../../shared/mask/mask.ts';
import { denseMask, withSurrogates } from '../../../shared/mask/mask.ts';
import { type MaskSet, maskSetVersion } from '../../../shared/mask/mask-set.ts';
import { average } from '../../measure.ts';
import { type BlockCounts, countsOf, skipCountFor } from '../search/budget.ts';
import type { Orders } from './baselines/search-orders.ts';
import type { Removal } from './baselines/static-orders.ts';
import { maskAlong } from './baselines/static-orders.ts';
import type { Contestant } from './contestants.ts';
import type { Baseline, StaticMethod } from './result.ts';
import { clusterMasks, oneMask } from './scored-rows.ts';
import { firstAsFast } from './timing.ts';

export type RoutedSet = {
  readonly set: MaskSet;
  /** The cluster of each scored row. */
  readonly clusters: readonly number[];
};

export type LineUp = {
  readonly rowCount: number;
  readonly blockCount: number;
  readonly sets: readonly RoutedSet[];
  readonly baselines: readonly Baseline[];
  readonly sparsities: readonly number[];
  /** `null`: holes. */
  readonly flavours: readonly (SurrogatesId | null)[];
  readonly orders: ReadonlyMap<SurrogatesId | null, Orders>;
};

export function equalCountContestants(lineUp: LineUp): { contestants: Contestant[]; notes: string[] } {
  const { flavours, sparsities } = lineUp;
  const notes: string[] = [];
  const learned = flavours.flatMap((flavour) =>
    lineUp.sets.flatMap((routed) => learnedContestants(lineUp, routed, flavour, notes)),
  );
  const fixed = flavours.flatMap((flavour) =>
    sparsities.flatMap((target) =>
      [...lineUp.orders.get(flavour)!].map(([method, removals]) => {
        const skipCount = skipCountFor(lineUp.blockCount, target);
        const masks = removals.map(({ order }) => maskAlong(order, skipCount, lineUp.blockCount));
        return staticContestant(lineUp, method, removals, masks, { flavour, target });
      }),
    ),
  );
  return { contestants: [denseContestant(lineUp), ...learned, ...fixed], notes: [...new Set(notes)] };
}

/** Each static method at the time of each learned contestant; left out where even its whole order is slower. */
export function equalTimeContestants(
  lineUp: LineUp,
  learned: readonly Contestant[],
  predictor: (surrogates: SurrogatesId | null) => (counts: BlockCounts) => number,
): Contestant[] {
  const { blockCount } = lineUp;
  return learned.flatMap((contestant) => {
    const flavour = contestant.masks[0]![0]!.surrogates ?? null;
    const predict = predictor(flavour);
    // Predicted from the same plane as the static methods' times: noise of a measured time would change the count of
    // blocks.
    const ms = average(contestant.masks.map(([mask]) => predict(countsOf(mask!))));
    return [...lineUp.orders.get(flavour)!].flatMap(([method, removals]) => {
      const masks = removals.map(({ order }) => {
        const perUnit = order[0]?.length ?? 1;
        const along = order.map((_, unit) => maskAlong(order, (unit + 1) * perUnit, blockCount));
        return firstAsFast(along, ms, predict);
      });
      if (!masks.every((mask) => mask !== undefined)) return [];
      const { maskSet, targetSparsity: target } = contestant;
      return [
        {
          ...staticContestant(lineUp, method, removals, masks, { flavour, target }),
          matched: 'time' as const,
          maskSet,
        },
      ];
    });
  });
}

function denseContestant({ rowCount, blockCount }: LineUp): Contestant {
  return {
    method: 'dense',
    matched: 'count',
    maskSet: null,
    clusters: 1,
    targetSparsity: 0,
    surrogate: false,
    evaluations: null,
    masks: forEveryRow(rowCount, [denseMask(blockCount)]),
  };
}

function learnedContestants(
  { rowCount, baselines }: LineUp,
  { set, clusters }: RoutedSet,
  flavour: SurrogatesId | null,
  notes: string[],
): Contestant[] {
  const masks = clusterMasks(set).map((mask) => withSurrogates(mask, flavour));
  const common = {
    matched: 'count' as const,
    maskSet: maskSetVersion(set),
    targetSparsity: set.targetSparsity,
    surrogate: flavour !== null,
    evaluations: null,
  };
  const learned: Contestant = {
    ...common,
    method: 'learned',
    clusters: masks.length,
    masks: clusters.map((cluster) => [masks[cluster]!]),
  };
  if (!baselines.includes('one-mask')) return [learned];
  const one = oneMask(set);
  if (one === undefined) {
    notes.push(`${set.name} does not say which one mask was learned on everything: no one-mask row for it.`);
    return [learned];
  }
  const alone = forEveryRow(rowCount, [withSurrogates(one, flavour)]);
  return [learned, { ...common, method: 'one-mask', clusters: 1, masks: alone }];
}

function staticContestant(
  { rowCount }: LineUp,
  method: StaticMethod,
  removals: readonly Removal[],
  masks: readonly Mask[],
  { flavour, target }: { readonly flavour: SurrogatesId | null; readonly target: number },
): Contestant {
  const flavoured = masks.map((mask) => withSurrogates(mask, flavour));
  return {
    method,
    matched: 'count',
    maskSet: null,
    clusters: 1,
    targetSparsity: target,
    surrogate: flavour !== null,
    evaluations: removals.reduce((sum, { evaluations }) => sum + evaluations, 0),
    masks: forEveryRow(rowCount, flavoured),
  };
}

const forEveryRow = (rowCount: number, masks: readonly Mask[]): (readonly Mask[])[] =>
  Array.from({ length: rowCount }, () => masks);
