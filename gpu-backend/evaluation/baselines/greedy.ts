/**
 * Greedy removal: at each step the unit (a block, or a layer's two) whose absence costs least, together with what is
 * out already, goes next. SLEB (Song et al., 2024) takes layers by the loss on text, BlockPruner (Zhong et al.,
 * 2024) blocks by perplexity, FinerCut (Zhang et al., 2024) blocks by the change of the output distribution.
 *
 * All are given the same number of evaluations. Where a full search needs more, only the units that looked
 * cheapest when last tried are tried again: their costs change little from step to step.
 */
import type { Mask } from '../../../shared/mask.ts';
import { maskWithout } from '../../calibration/rank-blocks.ts';

export type GreedyOptions = {
  readonly blockCount: number;
  /** Each a list of blocks that go together. */
  readonly units: readonly (readonly number[])[];
  /** Units to take out. */
  readonly steps: number;
  /** Costs taken at most; at least one a unit for the first step, and one for each step after it. */
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

/** Units tried at each step: all of them where the budget allows, else equally many. */
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

/** Ties go to the unit that stands first. Rejects when `signal` aborts. */
export async function greedyRemoval(options: GreedyOptions): Promise<Removal> {
  const { blockCount, units, steps, signal } = options;
  const tried = candidatesAStep(units.length, steps, options.evaluationsMax);
  const lastCost = Array<number>(units.length).fill(Number.NEGATIVE_INFINITY);
  const out: number[] = [];
  let evaluations = 0;
  for (let step = 0; step < Math.min(steps, units.length); step++) {
    const open = units.map((_, unit) => unit).filter((unit) => !out.includes(unit));
    const candidates = open
      .sort((a, b) => lastCost[a]! - lastCost[b]! || a - b)
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
