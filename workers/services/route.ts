/** From what is known of a request to its mask: pure, so that a dry run and a completion cannot differ. */
import { MaskrouteError } from '../../shared/errors.ts';
import {
  DENSE_MASK_ID,
  type MaskId,
  type ModelHash,
  maskFromSkippedLayers,
  maskId,
  type SurrogatesId,
  sparsity,
  withSurrogates,
} from '../../shared/mask.ts';
import { sameEncoder } from '../../shared/mask-set.ts';
import type { MaskField } from '../../shared/openai.ts';
import type { FallbackReason, ModelEntry } from '../../shared/protocol.ts';
import { nearestAllowed, nearestCentroid } from '../../shared/route.ts';
import type { Embedding } from './embed.ts';
import type { LiveSet } from './routing-table.ts';

/** What was chosen and why. `mask` is what the backend is told. */
export type Decision = {
  readonly mask: MaskField;
  /** Null when only the backend can know it: a mask that the client chose and this edge does not hold. */
  readonly maskId: MaskId | null;
  readonly sparsity: number | null;
  readonly set: LiveSet | null;
  readonly cluster: number | null;
  readonly distance: number | null;
  readonly similarity: number | null;
  readonly fallback: FallbackReason | null;
};

const NOT_ROUTED = { cluster: null, distance: null, similarity: null } as const;

export const denseDecision = (set: LiveSet | null, fallback: FallbackReason): Decision => ({
  ...NOT_ROUTED,
  mask: DENSE_MASK_ID,
  maskId: DENSE_MASK_ID,
  sparsity: 0,
  set,
  fallback,
});

/** The client's own mask goes through as it is; `findSparsity` knows the masks that this edge holds. */
export function requestedDecision(
  mask: MaskField,
  set: LiveSet | null,
  model: ModelEntry | undefined,
  findSparsity: (id: string) => number | undefined,
): Decision {
  if (mask === DENSE_MASK_ID) return denseDecision(set, 'requested');
  const known = typeof mask === 'string' ? heldMask(mask, findSparsity) : inlineMask(mask, model);
  return { ...NOT_ROUTED, ...known, mask, set, fallback: null };
}

const heldMask = (id: string, findSparsity: (id: string) => number | undefined) => ({
  maskId: id as MaskId,
  sparsity: findSparsity(id) ?? null,
});

function inlineMask(mask: Exclude<MaskField, string>, model: ModelEntry | undefined) {
  const unknown = { maskId: null, sparsity: null };
  if (model?.maskroute === undefined) return unknown;
  try {
    const { block_count, hash, surrogates } = model.maskroute;
    // The backend refuses surrogates that its model lacks; what it would say is not guessed here.
    if (mask.surrogate && surrogates == null) return unknown;
    const runs = maskFromSkippedLayers(block_count, mask);
    const chosen = withSurrogates(runs, mask.surrogate ? (surrogates as SurrogatesId) : null);
    return { maskId: maskId(hash as ModelHash, chosen), sparsity: sparsity(chosen) };
  } catch {
    // A layer outside the model: the backend says so better than a guess here.
    return unknown;
  }
}

/** By content hash where the backend's list has the model, else by name. */
export const isModelOf = (set: LiveSet, name: string, entry: ModelEntry | undefined): boolean =>
  entry?.maskroute === undefined ? set.model.name === name : set.model.hash === entry.maskroute.hash;

/**
 * The mask of the nearest centroid, or dense with the reason. `similarityMin` is a cosine. A mask that is sparser
 * than `sparsityMax` gives way to that of the nearest cluster whose mask is not.
 */
export function nearestDecision(
  set: LiveSet,
  embedding: Embedding,
  similarityMin: number,
  sparsityMax: number | null,
): Decision {
  if (!embedding.ok) return denseDecision(set, embedding.fallback);
  if (!sameEncoder(embedding.spec, set.encoder)) return denseDecision(set, 'encoder_mismatch');
  const nearest = nearestCentroid(embedding.vector, set.centroids);
  // The zero vector is near nothing: the encoder knew no token of the text.
  const isUnknown = embedding.vector.every((value) => value === 0);
  if (isUnknown || nearest.similarity < similarityMin) {
    return { ...denseDecision(set, 'low_similarity'), ...nearest };
  }
  const isAllowed = (cluster: number) => !isOverCeiling(set.clusters[cluster]!.sparsity, sparsityMax);
  const allowed = isAllowed(nearest.cluster)
    ? nearest
    : nearestAllowed(embedding.vector, set.centroids, isAllowed);
  if (allowed === null) return { ...denseDecision(set, 'over_ceiling'), ...nearest };
  const { mask, sparsity: skipped } = set.clusters[allowed.cluster]!;
  return { ...allowed, mask, maskId: mask, sparsity: skipped, set, fallback: null };
}

/** A ceiling of 0.3 is meant to allow 3 of 10 blocks, however the quotient rounds. */
const SPARSITY_SLACK = 1e-9;

/**
 * Whether a tenant's requests may be routed by a set, going by how far it agrees with the dense model. Publishing asks
 * the same, but a floor may be raised later, and the default set was published for nobody in particular.
 */
export const meetsFloor = ({ agreement }: Pick<LiveSet, 'agreement'>, agreementMin: number | null): boolean =>
  agreementMin === null || (agreement !== null && agreement >= agreementMin);

export const isOverCeiling = (sparsity: number, sparsityMax: number | null): boolean =>
  sparsityMax !== null && sparsity > sparsityMax + SPARSITY_SLACK;

/** @throws MaskrouteError `sparsity_over_ceiling` for a mask that is sparser than it may be, or may be so. */
export function requireAllowed(sparsity: number | null, sparsityMax: number | null): void {
  if (sparsityMax === null || (sparsity !== null && sparsity <= sparsityMax + SPARSITY_SLACK)) return;
  const found = sparsity === null ? 'of unknown sparsity' : `that skips ${Math.round(sparsity * 100)} %`;
  throw new MaskrouteError(
    'sparsity_over_ceiling',
    `This tenant's masks skip at most ${Math.round(sparsityMax * 100)} % of blocks; this is one ${found}.`,
    { param: 'mask' },
  );
}
