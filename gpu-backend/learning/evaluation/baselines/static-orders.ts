/**
 * The order in which each static method removes blocks. An order gives a mask for every sparsity: the first n units are
 * removed.
 */
import type { Mask } from '../../../../shared/mask/mask.ts';
import { highestFirst, lowestFirst } from '../../../measure.ts';
import { createRandom, permutation } from '../../../random.ts';
import { maskWithout } from '../../search/budget.ts';
import type { StaticMethod } from '../result.ts';
import type { Similarities } from './similarity.ts';

/** What a mask costs on the calibration samples: means over positions, nats. */
export type SearchCosts = { readonly kl: number; readonly loss: number };

type OrderContext = {
  readonly layerCount: number;
  /** Blocks out at the highest sparsity asked for. */
  readonly skipCountMax: number;
  readonly evaluationsMax: number;
  similarities(): Promise<Similarities>;
  costs(mask: Mask): Promise<SearchCosts>;
  readonly onEvaluation?: () => void;
  readonly signal?: AbortSignal | undefined;
};

/** Orders of `random`, one a seed. */
const RANDOM_SEEDS = [1, 2, 3] as const;

/** One order; `random` has several, to be averaged over. */
export async function staticOrders(method: StaticMethod, context: OrderContext): Promise<Removal[]> {
  const { layerCount } = context;
  const blockCount = 2 * layerCount;
  const measured = (order: readonly (readonly number[])[]): Removal[] => [{ order, evaluations: 1 }];
  switch (method) {
    case 'shortgpt':
      return measured(layerUnits(mostAlike((await context.similarities()).layers)));
    case 'llm-drop': {
      const { blocks } = await context.similarities();
      const layers = mostAlike(blocks.filter((_, block) => block % 2 === 0));
      return measured(blockUnits(layers.map((layer) => 2 * layer)));
    }
    case 'sleb':
      // The first and the last layer stay, as in the paper.
      return [await greedy(context, layerUnits(range(layerCount).slice(1, -1)), 'loss')];
    case 'blockpruner':
      return [await greedy(context, blockUnits(range(blockCount)), 'loss')];
    case 'finercut':
      return [await greedy(context, blockUnits(range(blockCount)), 'kl')];
    case 'last-k':
      return [{ order: layerUnits(range(layerCount).reverse()), evaluations: 0 }];
    case 'random':
      return RANDOM_SEEDS.map((seed) => ({
        order: blockUnits([...permutation(blockCount, createRandom(seed))]),
        evaluations: 0,
      }));
  }
}

function greedy(context: OrderContext, units: number[][], by: keyof SearchCosts): Promise<Removal> {
  const { layerCount, skipCountMax, evaluationsMax, onEvaluation, signal } = context;
  return greedyRemoval({
    blockCount: 2 * layerCount,
    units,
    // There may be no layers between the first and the last.
    steps: Math.min(units.length, Math.round(skipCountMax / (units[0]?.length ?? 1))),
    evaluationsMax,
    cost: async (mask) => (await context.costs(mask))[by],
    ...(onEvaluation && { onEvaluation }),
    signal,
  });
}

/**
 * The mask that removes units in order until nearest to `skipCount` blocks (halves round up: methods that remove whole
 * layers cannot meet an odd count). Beyond the end of the order, all its units are removed.
 */
export function maskAlong(
  order: readonly (readonly number[])[],
  skipCount: number,
  blockCount: number,
): Mask {
  const perUnit = order[0]?.length ?? 1;
  return maskWithout(blockCount, order.slice(0, Math.round(skipCount / perUnit)).flat());
}

const layerUnit = (layer: number): number[] => [2 * layer, 2 * layer + 1];
const layerUnits = (layers: readonly number[]): number[][] => layers.map(layerUnit);
const blockUnits = (blocks: readonly number[]): number[][] => blocks.map((block) => [block]);
const mostAlike = (similarities: readonly number[]): number[] =>
  highestFirst(similarities.keys(), (index) => similarities[index]!);
const range = (count: number): number[] => Array.from({ length: count }, (_, i) => i);

type GreedyOptions = {
  readonly blockCount: number;
  /** Each unit is a list of blocks that are removed together. */
  readonly units: readonly (readonly number[])[];
  /** Units to take out. */
  readonly steps: number;
  /** Most cost evaluations; at least one a unit for the first step and one for each later step. */
  readonly evaluationsMax: number;
  /** Lower is better. */
  cost(mask: Mask): Promise<number>;
  readonly onEvaluation?: () => void;
  readonly signal?: AbortSignal | undefined;
};

export type Removal = {
  /** Units in the order in which they were taken out. */
  readonly order: readonly (readonly number[])[];
  readonly evaluations: number;
};

/**
 * Greedy removal: each step removes the unit (a block, or a layer's two blocks) whose removal, in addition to the
 * earlier ones, costs least; ties go to the first unit. SLEB (Song et al., 2024) takes layers by the loss on text,
 * BlockPruner (Zhong et al., 2024) blocks by perplexity, FinerCut (Zhang et al., 2024) blocks by the change of the
 * output distribution.
 *
 * All methods have the same number of evaluations. Where a full search needs more, a step tries only the units that
 * were cheapest when last tried: costs change little from step to step. Rejects when `signal` aborts.
 */
export async function greedyRemoval(options: GreedyOptions): Promise<Removal> {
  const { blockCount, units, steps, signal } = options;
  const tried = candidatesAStep(units.length, steps, options.evaluationsMax);
  const lastCost = Array<number>(units.length).fill(Number.NEGATIVE_INFINITY);
  const out: number[] = [];
  let evaluations = 0;
  for (let step = 0; step < Math.min(steps, units.length); step++) {
    const open = units.map((_, unit) => unit).filter((unit) => !out.includes(unit));
    const candidates = lowestFirst(open, (unit) => lastCost[unit]!)
      .slice(0, step === 0 ? units.length : tried)
      .sort((a, b) => a - b);
    for (const unit of candidates) {
      signal?.throwIfAborted();
      const blocks = [...out, unit].flatMap((index) => units[index]!);
      lastCost[unit] = await options.cost(maskWithout(blockCount, blocks));
      evaluations++;
      options.onEvaluation?.();
    }
    out.push(candidates.reduce((best, unit) => (lastCost[unit]! < lastCost[best]! ? unit : best)));
  }
  return { order: out.map((unit) => units[unit]!), evaluations };
}

/** Units tried at each step: all of them where `evaluationsMax` allows, otherwise equally many at each. */
export function candidatesAStep(unitCount: number, steps: number, evaluationsMax: number): number {
  const needed = (candidates: number) => {
    let count = unitCount;
    for (let step = 1; step < steps; step++) count += Math.min(candidates, unitCount - step);
    return count;
  };
  let candidates = unitCount;
  while (candidates > 1 && needed(candidates) > evaluationsMax) candidates--;
  return candidates;
}
