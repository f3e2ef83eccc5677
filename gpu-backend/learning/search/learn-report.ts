/**
 * `report.json`: everything that a learning run found, with all figures that a page of pictures needs. `learn` writes
 * it, `report.html` and evaluations read it, so its schema stands below both.
 */
import { z } from 'zod';
import { maskBits, skippedLayers } from '../../../shared/mask/mask.ts';
import { type MaskSet, maskSetSchema, maskSetVersion } from '../../../shared/mask/mask-set.ts';
import { informationBits } from '../data/clusters.ts';
import type { Prompts } from '../data/prompt-groups.ts';
import { type Budget, weightSkipped } from './budget.ts';
import type { BlockCost } from './effort.ts';
import type { HeldOutPair, LearnedMask, LearnedMasks } from './learn-masks.ts';
import { type HeldOutScores, poolScores } from './score-masks.ts';
import type { Lead } from './workbench.ts';

const REPORT_FORMAT = 'maskroute-learn-report-v1';

const kindTable = z.array(z.object({ kind: z.string(), counts: z.array(z.number()) }));

const scores = z.object({
  positions: z.number(),
  /** KL(dense ‖ masked), nats a position. */
  kl: z.number(),
  agreement: z.number(),
  perplexity: z.number(),
  densePerplexity: z.number(),
});

const candidate = z.object({
  /** Where a mask came from: `rank`, `greedy`, `gates`, with `+swaps` after exchanges; `one mask`; `cluster 3`. */
  source: z.string(),
  bits: z.string(),
  /** On the prompts that the choice is made on. */
  kl: z.number(),
});

const learnedMask = z.object({
  bits: z.string(),
  skipAttention: z.array(z.number()),
  skipFfn: z.array(z.number()),
  /** Rise of the KL without each block: from the dense model, or, for a cluster, under the mask for everybody. */
  worth: z.array(z.number()),
  /** The gates' learning curve, an entry a training step. */
  curve: z.array(z.object({ loss: z.number(), expectedSparsity: z.number() })),
  /** KL under gates as training draws them, and under the best bits that they stand for, on the same text. */
  gates: z.object({ stochastic_kl: z.number(), binary_kl: z.number() }),
  /** All that competed, the chosen one first. */
  candidates: z.array(candidate),
  source: z.string(),
  /**
   * How far the best candidate led the mask for everybody on other text: it was taken when that was more than its
   * standard error (null: there was one batch). Absent where that mask was the best itself, or had no rival.
   */
  lead: z.object({ mean_kl: z.number(), standardError_kl: z.number().nullable() }).optional(),
  heldOut: scores.nullable(),
});

export const learnReportSchema = z.object({
  format: z.literal(REPORT_FORMAT),
  version: z.string(),
  name: z.string(),
  createdAt: z.string(),
  model: maskSetSchema.shape.model,
  encoder: maskSetSchema.shape.encoder,
  targetSparsity: z.number(),
  reachedSparsity: z.number(),
  surrogate: z.boolean(),
  budget: z.object({
    cost: z.enum(['blocks', 'time']),
    /** What a block of a kind weighs: 1, or measured milliseconds of a decoded token. */
    weights: z.object({ attention: z.number(), ffn: z.number() }),
    /** Share of the weights that the masks leave out, by the clusters' shares. */
    reached: z.number(),
    allowed: z.array(z.object({ attention: z.number(), ffn: z.number() })),
  }),
  learned: maskSetSchema.shape.learned,
  heldOut: maskSetSchema.shape.heldOut,
  /** Prompts of each kind by cluster. */
  kinds: z.object({ fit: kindTable, heldOut: kindTable }),
  /** Between cluster and kind. */
  information_bits: z.object({ fit: z.number(), heldOut: z.number() }),
  routing: z.object({
    largestShare: z.number(),
    entropy_bits: z.number(),
    /** 1: all clusters are equally large. */
    balance: z.number(),
    /** Mean silhouette of a sample of the prompts; null with one cluster. */
    silhouette: z.number().nullable(),
    /** The two centroids nearest to each other. */
    nearest: z.object({ clusters: z.tuple([z.number(), z.number()]), distance: z.number() }).nullable(),
    /** Why nearly all requests would go to one mask; null when they would not. */
    collapse: z.string().nullable(),
  }),
  /** Numbers of clusters that `--clusters auto` compared. */
  clusterCounts: z.array(
    z.object({ clusters: z.number(), silhouette: z.number(), largestShare: z.number(), balance: z.number() }),
  ),
  oneMask: learnedMask,
  clusters: z.array(
    learnedMask.extend({
      label: z.string(),
      share: z.number(),
      mask: z.string(),
      /** Prompts to learn from, own ones and those borrowed from the nearest clusters. */
      rows: z.number(),
      borrowedRows: z.number(),
      /** The centroid along the two main directions of the prompts. */
      position: z.tuple([z.number(), z.number()]),
    }),
  ),
});
export type LearnReport = z.infer<typeof learnReportSchema>;
export type LearnedMaskReport = z.infer<typeof learnedMask>;

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
