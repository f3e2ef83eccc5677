/** What a run found, as `report.json` has it (`calibration/learn-report.ts` is the schema). */
import { maskBits, skippedLayers } from '../../shared/mask.ts';
import type { MaskSet } from '../../shared/mask-set.ts';
import { maskSetVersion } from '../../shared/mask-set.ts';
import { informationBits } from '../calibration/cluster.ts';
import type { HeldOutScores } from '../calibration/held-out.ts';
import { poolScores } from '../calibration/held-out.ts';
import type { LearnedMaskReport, LearnReport } from '../calibration/learn-report.ts';
import { REPORT_FORMAT } from '../calibration/learn-report.ts';
import type { Budget } from '../training/budget.ts';
import { weightSkipped } from '../training/budget.ts';
import type { HeldOutPair, LearnedMask, LearnedMasks } from './learn-masks.ts';
import type { Prompts } from './prompts.ts';
import type { BlockCost } from './settings.ts';
import type { Lead } from './workbench.ts';

export function buildReport(
  maskSet: MaskSet,
  prompts: Prompts,
  { one, clusters, heldOut }: LearnedMasks,
  budget: Budget,
  cost: BlockCost,
): LearnReport {
  const { name, model, encoder, targetSparsity, reachedSparsity, learned, surrogate, createdAt } = maskSet;
  const [attention, ffn] = budget.blockWeights as [number, number];
  const reached = maskSet.clusters.reduce(
    (sum, { share }, i) => sum + share * weightSkipped(clusters[i]!.mask, budget),
    0,
  );
  const { fit, heldOut: held } = prompts.kinds;
  return {
    format: REPORT_FORMAT,
    version: maskSetVersion(maskSet),
    ...{ name, createdAt, model, encoder, targetSparsity, reachedSparsity, surrogate },
    budget: { cost, weights: { attention, ffn }, reached, allowed: [...budget.allowed] },
    ...{ learned, heldOut: maskSet.heldOut, kinds: prompts.kinds },
    information_bits: { fit: informationBits(fit), heldOut: informationBits(held) },
    routing: prompts.health,
    clusterCounts: [...prompts.counts],
    oneMask: maskReport(one, pooled(heldOut, prompts, 'one')),
    clusters: maskSet.clusters.map(({ share, label = '', mask }, cluster) => {
      const { search, choice, borrowedRows, position } = prompts.groups[cluster]!;
      return {
        ...maskReport(clusters[cluster]!, heldOut[cluster]?.learned),
        ...{ label, share, mask, borrowedRows },
        rows: search.length + choice.length,
        position: [position[0], position[1]],
      };
    }),
  };
}

function maskReport(learned: LearnedMask, heldOut: HeldOutScores | undefined): LearnedMaskReport {
  const { mask, source, search, candidates, lead } = learned;
  const { curve, stochastic, best } = search.gates;
  return {
    bits: maskBits(mask),
    ...skippedLayers(mask),
    worth: [...search.worth],
    curve: curve.map((entry) => ({ ...entry })),
    gates: { stochastic_kl: stochastic, binary_kl: best.cost },
    candidates: candidates.map((one) => ({ source: one.source, bits: maskBits(one.mask), kl: one.kl })),
    source,
    ...(lead === undefined ? {} : { lead: leadReport(lead) }),
    heldOut: heldOut ?? null,
  };
}

const leadReport = ({ mean, standardError }: Lead) => ({
  mean_kl: mean,
  standardError_kl: Number.isFinite(standardError) ? standardError : null,
});

/** Held-out figures by method, each cluster weighted by its share of the calibration prompts. */
export function heldOutFigures(
  heldOut: readonly (HeldOutPair | undefined)[],
  prompts: Prompts,
): MaskSet['heldOut'] {
  const [learned, one] = [pooled(heldOut, prompts, 'learned'), pooled(heldOut, prompts, 'one')];
  if (learned === undefined || one === undefined) return {};
  const figures = ({ positions, kl, agreement, perplexity }: HeldOutScores) => ({
    ...{ positions, kl, agreement, perplexity },
  });
  return {
    dense: { positions: learned.positions, perplexity: learned.densePerplexity },
    learned: figures(learned),
    'one-mask': figures(one),
    clusters: heldOut.map((pair) => (pair === undefined ? null : { ...pair.learned })),
  };
}

function pooled(
  heldOut: readonly (HeldOutPair | undefined)[],
  { clusters }: Prompts,
  which: keyof HeldOutPair,
): HeldOutScores | undefined {
  const parts = heldOut.flatMap((pair, cluster) =>
    pair === undefined ? [] : [{ scores: pair[which], weight: clusters.sizes[cluster]! }],
  );
  return parts.length === 0 ? undefined : poolScores(parts);
}
