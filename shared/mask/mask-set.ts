/**
 * A mask set: k centroids and their k masks, for one model and one encoder. It is immutable; its version is the hash of
 * its content. This schema is what `learn` writes, what the admin API accepts and what the edge reads back from D1.
 */
import { sha256 } from '@noble/hashes/sha2.js';
import { bytesToHex, utf8ToBytes } from '@noble/hashes/utils.js';
import { z } from 'zod';
import { listOf } from '../wire/fields.ts';
import { isJsonObject } from '../wire/parse-body.ts';
import {
  BLOCK_COUNT_MAX,
  MASK_ID_PATTERN,
  type Mask,
  MODEL_HASH_PATTERN,
  type ModelHash,
  maskFromBits,
  maskId,
  SURROGATES_ID_PATTERN,
  type SurrogatesId,
  sparsity,
  withSurrogates,
} from './mask.ts';

const CLUSTER_COUNT_MAX = 256;
const DIMENSIONS_MAX = 4096;
/** Centroids are stored as 32-bit floats; larger numbers would become infinite. */
const FLOAT32_MAX = (2 - 2 ** -23) * 2 ** 127;

export const encoderSpecSchema = z.strictObject({
  /** For example `static`, `@cf/baai/bge-small-en-v1.5`, `sentence-transformers/all-MiniLM-L6-v2`. */
  id: z.string().min(1).max(200),
  /** The exact version of the encoder: a content hash or a hub revision. */
  revision: z.string().min(1).max(100),
  pooling: z.enum(['mean', 'cls', 'weighted-mean']),
  dimensions: z.int().min(1).max(DIMENSIONS_MAX),
});
export type EncoderSpec = z.infer<typeof encoderSpecSchema>;

export const sameEncoder = (a: EncoderSpec, b: EncoderSpec): boolean =>
  a.id === b.id && a.revision === b.revision && a.pooling === b.pooling && a.dimensions === b.dimensions;

/** A name that people give and that may be part of a file's name. */
export const plainName = z
  .string()
  .regex(
    /^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/,
    'expected letters, digits, points, dashes and underscores, at most 64',
  );

const clusterSchema = z.strictObject({
  /** The centroid, `dimensions` numbers; vectors are L2-normalised before the distance is taken. */
  centroid: listOf(z.number().min(-FLOAT32_MAX).max(FLOAT32_MAX), { min: 1, max: DIMENSIONS_MAX }),
  /** The mask's bits, as `maskBits` writes them. */
  bits: z.string().max(BLOCK_COUNT_MAX / 4),
  mask: z.string().regex(MASK_ID_PATTERN, 'expected "dense" or a mask id'),
  /** Share of the calibration set that fell into this cluster. */
  share: z.number().min(0).max(1),
  /** A short label for people: the most common kinds of prompt in the cluster. */
  label: z.string().max(200).optional(),
});

export const maskSetSchema = z
  .strictObject({
    format: z.literal('maskroute-mask-set-v1'),
    name: plainName,
    model: z.strictObject({
      name: z.string().min(1).max(200),
      hash: z.string().regex(MODEL_HASH_PATTERN, 'expected 64 hexadecimal digits'),
      blockCount: z.int().min(2).max(BLOCK_COUNT_MAX),
    }),
    encoder: encoderSpecSchema,
    clusters: z.array(clusterSchema).min(1).max(CLUSTER_COUNT_MAX),
    targetSparsity: z.number().min(0).max(1),
    /** Mean over clusters, weighted by share. */
    reachedSparsity: z.number().min(0).max(1),
    /** Whether skipped blocks are replaced by surrogates. */
    surrogate: z.boolean(),
    /** The table of surrogates that the masks were learned with; present exactly when `surrogate` is true. */
    surrogates: z.string().regex(SURROGATES_ID_PATTERN, 'expected s_ and 24 hexadecimal digits').optional(),
    /** How it was made: method, seed, calibration counts, constants. */
    learned: z.record(z.string(), z.json()),
    /** Figures on held-out data, by method where there are several. */
    heldOut: z.record(z.string(), z.json()),
    createdAt: z.iso.datetime(),
  })
  .superRefine((set, context) => {
    if (set.surrogate !== (set.surrogates !== undefined)) {
      const message = set.surrogate ? 'it has surrogates, but no table' : 'it names a table, but uses none';
      context.addIssue({ code: 'custom', message, path: ['surrogates'] });
    }
    set.clusters.forEach((cluster, index) => {
      const fail = (message: string) =>
        context.addIssue({ code: 'custom', message, path: ['clusters', index] });
      if (cluster.centroid.length !== set.encoder.dimensions) {
        fail(`the centroid has ${cluster.centroid.length} dimensions, the encoder ${set.encoder.dimensions}`);
      }
      try {
        const id = maskId(set.model.hash as ModelHash, clusterMask(set, cluster));
        if (id !== cluster.mask) fail(`the mask id is ${cluster.mask}, its bits say ${id}`);
      } catch (error) {
        fail((error as Error).message);
      }
    });
  });
export type MaskSet = z.infer<typeof maskSetSchema>;
type MaskSetCluster = MaskSet['clusters'][number];

/** `v_` and 24 hexadecimal digits: the hash of the set's canonical JSON. */
export const maskSetVersion = (set: MaskSet): string => versionOfJson(canonicalJson(set));

/** `json` is canonical. */
export const versionOfJson = (json: string): string =>
  `v_${bytesToHex(sha256(utf8ToBytes(json))).slice(0, 24)}`;

/** JSON with sorted keys, so that equal content has equal text. */
export function canonicalJson(value: unknown): string {
  return JSON.stringify(value, (_key, inner: unknown) =>
    isJsonObject(inner)
      ? Object.fromEntries(Object.entries(inner).sort(([a], [b]) => (a < b ? -1 : 1)))
      : inner,
  );
}

/** A cluster's mask, with the set's surrogates. @throws RangeError when its bits fit no model of that size. */
const clusterMask = (
  set: { readonly model: { readonly blockCount: number }; readonly surrogates?: string | undefined },
  cluster: { readonly bits: string },
): Mask =>
  withSurrogates(
    maskFromBits(set.model.blockCount, cluster.bits),
    set.surrogates as SurrogatesId | undefined,
  );

export const clusterSparsity = (set: MaskSet, cluster: MaskSetCluster): number =>
  sparsity(maskFromBits(set.model.blockCount, cluster.bits));

/* A mask set's own quality figures, which `learn` measured on held-out prompts. */

/** Top-1 agreement with the dense model, 0 to 1; null when the set does not say. */
export function heldOutAgreement({ heldOut }: Pick<MaskSet, 'heldOut'>): number | null {
  return learnedSchema.safeParse(heldOut.learned).data?.agreement ?? null;
}
const learnedSchema = z.object({ agreement: z.number().min(0).max(1) });
