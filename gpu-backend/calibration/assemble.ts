/** Clusters and their masks as a mask set, checked by the schema that the edge will check it by. */

import type { Mask, ModelHash, SurrogatesId } from '../../shared/mask.ts';
import { maskBits, maskId, sparsity, withSurrogates } from '../../shared/mask.ts';
import type { EncoderSpec, MaskSet } from '../../shared/mask-set.ts';
import { maskSetSchema } from '../../shared/mask-set.ts';
import type { Clusters, KindTable } from './cluster.ts';
import { clusterLabel } from './cluster.ts';

/** Digits of a centroid's numbers: far below what moves a prompt to another cluster. */
const CENTROID_DIGITS = 6;

export type MaskSetParts = {
  readonly name: string;
  readonly model: MaskSet['model'];
  readonly encoder: EncoderSpec;
  readonly clusters: Clusters;
  readonly kinds: KindTable;
  /** One a cluster. */
  readonly masks: readonly Mask[];
  /** The table that the masks were learned with. */
  readonly surrogates?: SurrogatesId;
  readonly targetSparsity: number;
  readonly learned: MaskSet['learned'];
  readonly heldOut: MaskSet['heldOut'];
  readonly createdAt: Date;
};

/** @throws ZodError when the parts contradict each other. */
export function assembleMaskSet(parts: MaskSetParts): MaskSet {
  const { clusters, encoder, masks, model, surrogates } = parts;
  const total = clusters.sizes.reduce((sum, size) => sum + size, 0);
  const entries = masks.map((mask, cluster) => ({
    centroid: Array.from(
      clusters.centroids.subarray(cluster * encoder.dimensions, (cluster + 1) * encoder.dimensions),
      (value) => Number(value.toPrecision(CENTROID_DIGITS)),
    ),
    bits: maskBits(mask),
    mask: maskId(model.hash as ModelHash, withSurrogates(mask, surrogates)),
    share: clusters.sizes[cluster]! / total,
    label: clusterLabel(parts.kinds, cluster),
  }));
  return maskSetSchema.parse({
    format: 'maskroute-mask-set-v1',
    name: parts.name,
    model,
    encoder,
    clusters: entries,
    targetSparsity: parts.targetSparsity,
    reachedSparsity: entries.reduce((sum, { share }, i) => sum + share * sparsity(masks[i]!), 0),
    surrogate: surrogates !== undefined,
    ...(surrogates === undefined ? {} : { surrogates }),
    learned: parts.learned,
    heldOut: parts.heldOut,
    createdAt: parts.createdAt.toISOString(),
  });
}
