/**
 * The schema of `report.json`: everything that a learning run found, with all figures that `report.html` needs. `learn`
 * writes it; `report.html` and evaluations read it.
 */

import { z } from 'zod';
import { headroomSchema } from '../../../shared/mask/held-out.ts';
import { maskBits, skippedLayers } from '../../../shared/mask/mask.ts';
import { type MaskSet, maskSetSchema, maskSetVersion } from '../../../shared/mask/mask-set.ts';
import { informationBits } from '../data/clusters.ts';
import type { Prompts } from '../data/prompt-groups.ts';
import { type Budget, weightSkipped } from './budget.ts';
import type { BlockCost } from './effort.ts';
import type { HeldOutRow, LearnedMasks, SharingFigures } from './learn-masks.ts';
import { type HeldOutScores, heldOutScores } from './score-masks.ts';
import type { FoundMask } from './search-in-turns.ts';
import type { Candidate } from './search-masks.ts';

const REPORT_FORMAT = 'maskroute-learn-report-v2';

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
  /** Where a mask came from: `rank`, `greedy`, `gates`, with `+swaps` after exchanges; `swaps on 5 clusters`. */
  source: z.string(),
  bits: z.string(),
  /** KL on the prompts of the choice. */
  kl: z.number(),
});

const learnedMask = z.object({
  bits: z.string(),
  skipAttention: z.array(z.number()),
  skipFfn: z.array(z.number()),
  /**
   * Rise of the KL when each block is removed: from the dense model or, for a group of clusters, from the mask for
   * everybody.
   */
  worth: z.array(z.number()),
  /** The gates' learning curve, an entry a training step. */
  curve: z.array(z.object({ loss: z.number(), expectedSparsity: z.number() })),
  /**
   * KL under gates drawn as in training, and under the best binary mask made from them, on the same text; null without
   * gates.
   */
  gates: z.object({ stochastic_kl: z.number(), binary_kl: z.number() }).nullable(),
  source: z.string(),
  /** Of the calibration prompts, the share whose clusters have this mask. */
  share: z.number(),
});

const clusterSchema = z.object({
  label: z.string(),
  share: z.number(),
  /** Index into `masks`, and that mask. */
  maskIndex: z.number(),
  mask: z.string(),
  bits: z.string(),
  skipAttention: z.array(z.number()),
  skipFfn: z.array(z.number()),
  /** Prompts to learn from. */
  rows: z.number(),
  /** The centroid along the two main directions of the prompts. */
  position: z.tuple([z.number(), z.number()]),
  heldOut: scores.nullable(),
});

const sharingSchema = z.object({
  /** Turns of searching and assigning masks, and prompts that were measured for it. */
  turns: z.number(),
  rows: z.number(),
  /** All candidate masks, by their KL over all of these prompts. */
  pool: z.array(candidate),
  /** KL of 1, 2, … masks on prompts that did not decide the assignment. */
  validated_kl: z.array(z.number()),
  /** What routing gains on held-out prompts; null where none is held out, or where there was one mask to begin with. */
  headroom: headroomSchema.nullable(),
  /** Why there is one mask for all clusters; null when there are several. */
  reason: z.string().nullable(),
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
  /** Mutual information of cluster and kind. */
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
  /** The mask for everybody; its `candidates` are what it was chosen from, by rising KL. */
  oneMask: learnedMask.extend({ candidates: z.array(candidate), heldOut: scores.nullable() }),
  /** All masks in use, the one for everybody first. */
  masks: z.array(learnedMask),
  /** Null with a single cluster. */
  sharing: sharingSchema.nullable(),
  clusters: z.array(clusterSchema),
});
export type LearnReport = z.infer<typeof learnReportSchema>;
export type LearnedMaskReport = z.infer<typeof learnedMask>;

export function buildReport(
  maskSet: MaskSet,
  prompts: Prompts,
  learned: LearnedMasks,
  budget: Budget,
  cost: BlockCost,
): LearnReport {
  const { name, model, encoder, targetSparsity, reachedSparsity, surrogate, createdAt } = maskSet;
  const [attention, ffn] = budget.blockWeights as [number, number];
  const maskOf = (cluster: number) => learned.masks[learned.clusters[cluster]!]!.mask;
  const shareOf = (index: number) =>
    maskSet.clusters.reduce((sum, { share }, i) => sum + (learned.clusters[i] === index ? share : 0), 0);
  const reached = maskSet.clusters.reduce(
    (sum, { share }, i) => sum + share * weightSkipped(maskOf(i), budget),
    0,
  );
  const { fit, heldOut: held } = prompts.kinds;
  const masks = learned.masks.map((found, index) => maskReport(found, shareOf(index)));
  return {
    format: REPORT_FORMAT,
    version: maskSetVersion(maskSet),
    name,
    createdAt,
    model,
    encoder,
    targetSparsity,
    reachedSparsity,
    surrogate,
    budget: { cost, weights: { attention, ffn }, reached, allowed: [...budget.allowed] },
    learned: maskSet.learned,
    heldOut: maskSet.heldOut,
    kinds: prompts.kinds,
    information_bits: { fit: informationBits(fit), heldOut: informationBits(held) },
    routing: prompts.health,
    clusterCounts: [...prompts.counts],
    oneMask: {
      ...masks[0]!,
      candidates: learned.candidates.map(candidateReport),
      heldOut: scoresOf(learned.heldOut, 'one') ?? null,
    },
    masks,
    sharing: learned.sharing === undefined ? null : sharingReport(learned.sharing),
    clusters: maskSet.clusters.map(({ share, label = '', mask, bits }, cluster) => {
      const [x, y] = prompts.positions[cluster]!;
      const rows = learned.heldOut.filter((row) => row.cluster === cluster);
      return {
        label,
        share,
        mask,
        bits,
        maskIndex: learned.clusters[cluster]!,
        ...skippedLayers(maskOf(cluster)),
        rows: prompts.clusters.sizes[cluster]!,
        position: [x, y],
        heldOut: scoresOf(rows, 'learned') ?? null,
      };
    }),
  };
}

function maskReport({ mask, source, search }: FoundMask, share: number): LearnedMaskReport {
  const { gates } = search;
  return {
    bits: maskBits(mask),
    ...skippedLayers(mask),
    worth: [...search.worth],
    curve: gates?.curve.map((entry) => ({ ...entry })) ?? [],
    gates: gates === undefined ? null : { stochastic_kl: gates.stochastic, binary_kl: gates.best.cost },
    source,
    share,
  };
}

const candidateReport = ({ source, mask, kl }: Candidate) => ({ source, bits: maskBits(mask), kl });

const sharingReport = ({ turns, rows, pool, validated, headroom, reason }: SharingFigures) => ({
  turns,
  rows,
  reason,
  headroom: headroom ?? null,
  pool: pool.map(candidateReport),
  validated_kl: validated.map(({ kl }) => kl),
});

/** JSON's type has lists but no tuples. */
type HeadroomJson = MaskSet['heldOut'][string];

/** Held-out figures by method, over prompts drawn evenly from all that are held out. */
export function heldOutFigures(
  { heldOut, clusters, sharing }: LearnedMasks,
  { nearest }: Pick<Prompts, 'nearest'>,
): MaskSet['heldOut'] {
  const [learned, one] = [scoresOf(heldOut, 'learned'), scoresOf(heldOut, 'one')];
  if (learned === undefined || one === undefined) return { nearest };
  const figures = ({ densePerplexity: _, ...own }: HeldOutScores) => own;
  return {
    dense: { positions: learned.positions, perplexity: learned.densePerplexity },
    learned: figures(learned),
    'one-mask': figures(one),
    clusters: clusters.map(
      (_, cluster) =>
        scoresOf(
          heldOut.filter((row) => row.cluster === cluster),
          'learned',
        ) ?? null,
    ),
    ...(sharing?.headroom === undefined ? {} : { headroom: sharing.headroom as HeadroomJson }),
    nearest,
  };
}

function scoresOf(rows: readonly HeldOutRow[], which: 'learned' | 'one'): HeldOutScores | undefined {
  if (rows.length === 0) return undefined;
  return heldOutScores(
    rows.map((row) => row[which]),
    rows.map(({ dense }) => dense),
  );
}
