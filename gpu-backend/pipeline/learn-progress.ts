/** Where a run is: results of each stage against the most that it can come to. A stage that ends early jumps ahead. */
import type { Budget } from '../training/budget.ts';
import type { MaskStage } from './learn-masks.ts';
import type { LearnEffort } from './settings.ts';
import { STEP_PARTS } from './workbench.ts';

export type LearnProgress =
  | { readonly stage: 'read' | 'embed' }
  | {
      readonly stage: MaskStage;
      readonly done: number;
      readonly total: number;
      /** The cluster that is worked on. */
      readonly cluster: number | undefined;
    };

/** Draws and counts tried after learning gates, and masks that a choice compares at most beside other clusters'. */
const GATE_RESULTS = 11;
const CHOICE_RESULTS = 6;

export function trackProgress(
  onProgress: (progress: LearnProgress) => void,
  effort: LearnEffort,
  clusterCount: number,
  budget: Budget,
) {
  const blocks = budget.blockWeights.length;
  const rounds = ({ rounds, exchanges }: LearnEffort['cluster']) => rounds * (blocks + exchanges + 1);
  const search = (one: LearnEffort['cluster']) =>
    blocks + 2 + STEP_PARTS * one.gateSteps + GATE_RESULTS + one.exchanges + rounds(one);
  const perStep: Record<MaskStage, number> = {
    'one mask': search(effort.one) + rounds(effort.one) + effort.one.greedyEvaluations + CHOICE_RESULTS,
    masks: search(effort.cluster) + effort.cluster.exchanges,
    choose: CHOICE_RESULTS + clusterCount,
    measure: 1,
  };
  let at = { stage: 'one mask' as MaskStage, cluster: undefined as number | undefined, done: 0 };
  const report = () => {
    const { stage, cluster } = at;
    const size = perStep[stage];
    const done = (cluster ?? 0) * size + Math.min(at.done, size);
    onProgress({ stage, done, total: size * (cluster === undefined ? 1 : clusterCount), cluster });
  };
  return {
    onStage(stage: MaskStage, cluster?: number) {
      at = { stage, cluster, done: 0 };
      report();
    },
    onResult() {
      at.done++;
      report();
    },
  };
}
