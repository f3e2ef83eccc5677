/** The mask of each row under a mask set, picked as the edge picks it: the set's encoder, the nearest centroid. */
import { MaskrouteError } from '../../shared/errors.ts';
import type { Mask } from '../../shared/mask.ts';
import { maskFromBits } from '../../shared/mask.ts';
import type { MaskSet } from '../../shared/mask-set.ts';
import { sameEncoder } from '../../shared/mask-set.ts';
import { nearestCentroid, packCentroids } from '../../shared/route.ts';
import type { OpenEncoder } from '../calibration/encoders.ts';

/** The cluster of each text. @throws MaskrouteError `encoder_mismatch` when `open` is not the set's encoder. */
export async function routeTexts(
  set: MaskSet,
  { encoder }: OpenEncoder,
  texts: readonly string[],
  signal?: AbortSignal,
): Promise<number[]> {
  if (!sameEncoder(set.encoder, encoder.spec)) {
    throw new MaskrouteError(
      'encoder_mismatch',
      `The mask set ${set.name} routes by ${set.encoder.id} ${set.encoder.revision}, ` +
        `this encoder is ${encoder.spec.id} ${encoder.spec.revision}; name the set's own with --encoder.`,
    );
  }
  const centroids = packCentroids(set.clusters.map(({ centroid }) => centroid));
  const vectors = await encoder.embed(texts, signal);
  return vectors.map((vector) => nearestCentroid(vector, centroids).cluster);
}

export const clusterMasks = (set: MaskSet): Mask[] =>
  set.clusters.map(({ bits }) => maskFromBits(set.model.blockCount, bits));

/**
 * The mask that was learned on everything: the set's own when it has one cluster, else from its record.
 * @throws MaskrouteError `invalid_mask_set` when the record, which no schema reads, has bits for another model.
 */
export function oneMask(set: MaskSet): Mask | undefined {
  if (set.clusters.length === 1) return clusterMasks(set)[0]!;
  const bits = set.learned.oneMask;
  if (typeof bits !== 'string') return undefined;
  try {
    return maskFromBits(set.model.blockCount, bits);
  } catch (cause) {
    const reason = `${set.name}: learned.oneMask: ${(cause as Error).message}.`;
    throw new MaskrouteError('invalid_mask_set', reason, { cause });
  }
}
