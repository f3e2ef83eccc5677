/**
 * The order in which each static method takes blocks out. Every order serves all sparsities: the first n units are
 * the method's mask at that count.
 */
import type { Mask } from '../../../shared/mask.ts';
import { permutation, seededRandom } from '../../calibration/random.ts';
import type { StaticMethod } from '../methods.ts';
import type { Removal } from './greedy.ts';
import { greedyRemoval } from './greedy.ts';
import type { Similarities } from './similarity.ts';
import { blockUnits, highestFirst, layerUnits, range } from './units.ts';

/** What a mask costs on the calibration samples, means a position in nats. */
export type SearchCosts = { readonly kl: number; readonly loss: number };

export type OrderContext = {
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
export const RANDOM_SEEDS = [1, 2, 3] as const;

/** One order; `random` has several, to be averaged over. */
export async function staticOrders(method: StaticMethod, context: OrderContext): Promise<Removal[]> {
  const { layerCount } = context;
  const blockCount = 2 * layerCount;
  const measured = (order: readonly (readonly number[])[]): Removal[] => [{ order, evaluations: 1 }];
  switch (method) {
    case 'shortgpt':
      return measured(layerUnits(highestFirst((await context.similarities()).layers)));
    case 'llm-drop': {
      const { blocks } = await context.similarities();
      const layers = highestFirst(blocks.filter((_, block) => block % 2 === 0));
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
        order: blockUnits([...permutation(blockCount, seededRandom(seed))]),
        evaluations: 0,
      }));
  }
}

function greedy(context: OrderContext, units: number[][], by: keyof SearchCosts): Promise<Removal> {
  const { layerCount, skipCountMax, evaluationsMax, onEvaluation, signal } = context;
  return greedyRemoval({
    blockCount: 2 * layerCount,
    units,
    steps: Math.min(units.length, Math.round(skipCountMax / units[0]!.length)),
    evaluationsMax,
    cost: async (mask) => (await context.costs(mask))[by],
    ...(onEvaluation && { onEvaluation }),
    signal,
  });
}
