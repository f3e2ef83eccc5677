/** What `learn` found, for people and for the mask set's own record. */

import { skippedLayers } from '../../shared/mask.ts';
import type { MaskSet } from '../../shared/mask-set.ts';
import { maskSetVersion } from '../../shared/mask-set.ts';
import type { KindTable } from './cluster.ts';
import { informationBits } from './cluster.ts';
import type { HeldOutScores } from './held-out.ts';
import { poolScores } from './held-out.ts';
import type { ClusterResult } from './search-clusters.ts';

export type KindTables = { readonly fit: KindTable; readonly heldOut: KindTable };

export type LearnReport = {
  readonly version: string;
  readonly name: string;
  readonly model: MaskSet['model'];
  readonly encoder: MaskSet['encoder'];
  readonly targetSparsity: number;
  readonly reachedSparsity: number;
  readonly learned: MaskSet['learned'];
  readonly heldOut: MaskSet['heldOut'];
  /** Prompts of each kind by cluster. */
  readonly kinds: KindTables;
  /** Between cluster and kind. */
  readonly information_bits: { readonly fit: number; readonly heldOut: number };
  readonly clusters: readonly {
    readonly share: number;
    readonly label: string;
    readonly mask: string;
    /** The cluster on whose prompts the mask was found, or `all`. */
    readonly source: number | 'all';
    readonly skipAttention: readonly number[];
    readonly skipFfn: readonly number[];
    /** KL to the dense model when one block alone is missing, by block. */
    readonly alone: readonly number[];
    readonly heldOut: HeldOutScores | null;
  }[];
};

export function buildReport(
  maskSet: MaskSet,
  kinds: KindTables,
  results: readonly ClusterResult[],
): LearnReport {
  const { name, model, encoder, targetSparsity, reachedSparsity, learned, heldOut } = maskSet;
  return {
    version: maskSetVersion(maskSet),
    ...{ name, model, encoder, targetSparsity, reachedSparsity, learned, heldOut, kinds },
    information_bits: { fit: informationBits(kinds.fit), heldOut: informationBits(kinds.heldOut) },
    clusters: maskSet.clusters.map(({ share, label, mask }, i) => ({
      share,
      label: label ?? '',
      mask,
      source: results[i]!.source,
      ...skippedLayers(results[i]!.mask),
      alone: results[i]!.alone,
      heldOut: results[i]!.heldOut ?? null,
    })),
  };
}

/** Held-out figures by method, each cluster weighted by its share of the calibration prompts. */
export function heldOutFigures(
  method: string,
  sizes: Uint32Array,
  results: readonly ClusterResult[],
): MaskSet['heldOut'] {
  const parts = results.flatMap(({ heldOut }, cluster) =>
    heldOut === undefined ? [] : [{ scores: heldOut, weight: sizes[cluster]! }],
  );
  if (parts.length === 0) return {};
  const { positions, kl, agreement, perplexity, densePerplexity } = poolScores(parts);
  return {
    dense: { positions, perplexity: densePerplexity },
    [method]: { positions, kl, agreement, perplexity },
    clusters: results.map(({ heldOut }) => (heldOut === undefined ? null : { ...heldOut })),
  };
}
