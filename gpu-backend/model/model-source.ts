/**
 * Types that readers of model files, the store and the graphs share: a model's configuration, its manifest, and
 * `WeightSource`, which readers of GGUF and safetensors files implement; and helpers for model files.
 */
import { basename, dirname, join } from 'node:path';
import { z } from 'zod';
import {
  MODEL_HASH_PATTERN,
  type ModelHash,
  SURROGATES_ID_PATTERN,
  type SurrogatesId,
} from '../../shared/mask/mask.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { isJsonObject } from '../../shared/wire/parse-body.ts';
import { readJson, readRegular } from '../files.ts';

/** Families of decoders, by Hugging Face's `model_type`; each has a row in `families.ts`. */
export const ARCHITECTURES = [
  'llama',
  'mistral',
  'smollm3',
  'qwen2',
  'qwen3',
  'granite',
  'phi3',
  'gemma3_text',
] as const;

/** Rope scaling; `rope.ts` has the formulas. */
const ropeScalingSchema = z.discriminatedUnion('type', [
  z.strictObject({ type: z.literal('linear'), factor: z.number().positive() }),
  z.strictObject({
    type: z.literal('llama3'),
    factor: z.number().positive(),
    lowFrequencyFactor: z.number().positive(),
    highFrequencyFactor: z.number().positive(),
    originalContextTokens: z.int().min(1),
  }),
  z.strictObject({
    type: z.literal('yarn'),
    factor: z.number().positive(),
    originalContextTokens: z.int().min(1),
    betaFast: z.number().positive(),
    betaSlow: z.number().positive(),
    /** Whether the bounds of the interpolation are rounded to whole dimensions (transformers' `truncate`). */
    wholeDimensions: z.boolean(),
    /** Multiplies cos and sin, and so scores by its square. */
    attentionFactor: z.number().positive(),
  }),
  /** Each frequency is divided by its own factor; GGUF files have Llama 3's scaling in this form. */
  z.strictObject({ type: z.literal('factors'), factors: z.array(z.number().positive()).min(1).max(4096) }),
]);
export type RopeScaling = z.infer<typeof ropeScalingSchema>;

/**
 * Hyper-parameters of a decoder. Widths in floats, positions in tokens. Optional fields are features that some families
 * add; a plain Llama has none.
 */
export const modelConfigSchema = z.strictObject({
  architecture: z.enum(ARCHITECTURES),
  layerCount: z.int().min(1).max(512),
  hiddenSize: z.int().min(1),
  ffnSize: z.int().min(1),
  headCount: z.int().min(1),
  kvHeadCount: z.int().min(1),
  headSize: z.int().min(1),
  vocabularySize: z.int().min(1),
  contextTokens: z.int().min(1),
  ropeTheta: z.number().positive(),
  rmsEpsilon: z.number().positive(),
  tiedEmbeddings: z.boolean(),
  ropeScaling: ropeScalingSchema.optional(),
  /** Attention projections with a bias: Q, K and V, or the output too. */
  attentionBias: z.enum(['qkv', 'qkvo']).optional(),
  /** RMS norms over each head of Q and of K, before rotary embedding. */
  headNorms: z.literal(true).optional(),
  /** Layers with a sliding window of so many tokens, the query's own included. */
  slidingWindow: z.strictObject({ tokens: z.int().min(1), layers: z.array(z.int().min(0)) }).optional(),
  /** Layers without rotary embedding. */
  layersWithoutRope: z.array(z.int().min(0)).optional(),
  /** Layers whose rotary embedding has a base of its own and no scaling. */
  localRope: z.strictObject({ theta: z.number().positive(), layers: z.array(z.int().min(0)) }).optional(),
  /** The activation of FFNs; unless given, SiLU. */
  activation: z.literal('gelu-tanh').optional(),
  /** RMS norms of what each block gives, before the sum with the stream. */
  postNorms: z.literal(true).optional(),
  /** Factors of Granite and Gemma. Weights have them as soon as they are read (`DecoderTensor.scale`), so no graph does. */
  factors: z
    .strictObject({
      embedding: z.number().positive(),
      /** On the output of every block. */
      blocks: z.number().positive(),
      /** On the products of queries and keys, in place of 1/√headSize. */
      scores: z.number().positive(),
      logits: z.number().positive(),
    })
    .optional(),
});
export type ModelConfig = z.infer<typeof modelConfigSchema>;

/**
 * Dequantized weights by canonical names, e.g. `model.layers.0.self_attn.q_proj.weight`: those of a Llama on Hugging Face,
 * however a family names and stacks them in its files. What a family adds to them, and its factors, are in the weights.
 * The norms behind blocks are `model.layers.0.self_attn.post_norm.weight` and `model.layers.0.mlp.post_norm.weight`.
 */
export interface WeightSource {
  readonly config: ModelConfig;
  /** Shape in PyTorch's order: `[out, in]` for a projection. */
  shape(name: string): readonly number[];
  /** The whole tensor in fp32, row-major. Rows of Q and K are in half-split ("NeoX") order, whatever the file's order. */
  read(name: string): Promise<Float32Array>;
}

/** Weights in open files: any thread can read a part of a tensor. */
export interface FileSource extends WeightSource {
  place(name: string): TensorPlace;
}

/** The position of a tensor in a file that this process has open. Plain data, so that it can go to other threads. */
export type TensorPlace = {
  readonly name: string;
  readonly descriptor: number;
  readonly offset: number;
  /** The type's id in GGUF. */
  readonly type: number;
  readonly shape: readonly number[];
  /** The heads of Q or K when the file interleaves their rows; else undefined. */
  readonly interleavedHeads: number | undefined;
  /** What is added to the file's values, before the factor. */
  readonly added: number;
  /** The factor on the file's values. */
  readonly scale: number;
};

export const WEIGHT_KINDS = ['q8', 'q4', 'q8-columns', 'f32'] as const;
export type WeightKind = (typeof WEIGHT_KINDS)[number];
/** Kinds that are calibrated on text. */
const CALIBRATED_KINDS = ['q4', 'q8-columns'] as const;
export type CalibratedKind = (typeof CALIBRATED_KINDS)[number];
export const isCalibrated = (kind: WeightKind): kind is CalibratedKind =>
  (CALIBRATED_KINDS as readonly string[]).includes(kind);

/** Types of the KV cache. On the CPU, attention computes in fp32 in any case. */
export const KV_TYPES = ['f32', 'f16'] as const;
export type KvType = (typeof KV_TYPES)[number];

/** Raised whenever the format of the graphs or the weights file changes; models of another format are imported again. */
export const MANIFEST_FORMAT = 'maskroute-model-v9';

const calibrationSchema = z.strictObject({ version: z.int(), text: z.string() });

/** `model.json` in a model's folder in the store, beside `model.onnx`, `weights.bin` and `tokenizer.json`. */
export const modelManifestSchema = z.strictObject({
  format: z.literal(MANIFEST_FORMAT),
  name: z.string().min(1).max(200),
  /** SHA-256 of the source's weights file. */
  hash: z
    .string()
    .regex(MODEL_HASH_PATTERN)
    .transform((hash) => hash as ModelHash),
  source: z.string(),
  weights: z.enum(WEIGHT_KINDS),
  config: modelConfigSchema,
  chatTemplate: z.string().nullable(),
  bosTokenId: z.int().nullable(),
  /** Ids that end an answer: end of sequence, end of turn. The first is what templates call `eos_token`. */
  eosTokenIds: z.array(z.int()).min(1),
  addBos: z.boolean(),
  /** q4's quantizer version and calibration text; the codes depend on both. */
  fourBits: calibrationSchema.optional(),
  /** The same of q8-columns. */
  columns: calibrationSchema.optional(),
  /** The table of surrogates in the graph, when one is installed (`surrogates.ts`). */
  surrogates: z
    .strictObject({
      id: z
        .string()
        .regex(SURROGATES_ID_PATTERN)
        .transform((id) => id as SurrogatesId),
      rank: z.int().min(1),
      fitted: z.string(),
      /** Whether it came with the project, and may be replaced by a newer preset. */
      preset: z.boolean(),
    })
    .optional(),
  files: z.record(z.string(), z.strictObject({ bytes: z.int(), sha256: z.string() })),
  importedAt: z.iso.datetime(),
});
export type ModelManifest = z.infer<typeof modelManifestSchema>;

/** The calibration of the weights, whatever their kind; undefined when their kind has none. */
export const calibrationIn = ({ fourBits, columns }: Pick<ModelManifest, 'fourBits' | 'columns'>) =>
  fourBits ?? columns;

/* Progress of an import. */

export type ImportPhase = 'download' | 'unpack' | 'verify' | 'write' | 'convert';

export type ImportProgress = {
  readonly phase: ImportPhase;
  readonly done: number;
  /** Undefined while the size is unknown. */
  readonly total: number | undefined;
  readonly unit: 'bytes' | 'percent';
};

export type ImportHooks = {
  readonly onProgress: (progress: ImportProgress) => void;
  /** Gets lines for the user, such as the source that is used, and why another failed. */
  readonly log: (line: string) => void;
  readonly signal?: AbortSignal | undefined;
};

/* The two errors for a refused model file. */

/** The file contradicts itself or its format: it is truncated, damaged or malicious. */
export const corruptModel = (reason: string, cause?: unknown): MaskrouteError =>
  new MaskrouteError('corrupt_model', `The model file is damaged: ${reason}.`, { cause });

/** The file is well-formed, but has a feature that no family here supports. */
export const unsupportedModel = (reason: string): MaskrouteError =>
  new MaskrouteError('unsupported_model', `The model is not supported: ${reason}.`);

/** A name from a file, for messages: shortened and escaped. */
export function quoted(text: string): string {
  const short = text.length > 60 ? `${text.slice(0, 60)}…` : text;
  return JSON.stringify(short);
}

/** An opened model file or folder, whatever its format. */
export type OpenModelFile = FileSource & {
  /** The files that the model's hash is computed from, in order. */
  readonly weightFiles: readonly string[];
  close(): Promise<void>;
};

/* Reads the small files beside the weights: bounded in size, without links that lead out of the folder. */

export type JsonObject = Readonly<Record<string, unknown>>;

/** `undefined` when there is no such file. @throws MaskrouteError `invalid_argument`, as `readRegular`. */
export const readModelText = (folder: string, name: string, bytesMax: number): Promise<string | undefined> =>
  readRegular(join(folder, name), bytesMax, dirname(join(folder, name))).then(
    (bytes) => bytes.toString('utf8'),
    unlessAbsent,
  );

/** `undefined` when there is no such file. @throws MaskrouteError `corrupt_model`, `invalid_argument`. */
export async function readModelJson(
  folder: string,
  name: string,
  bytesMax: number,
): Promise<JsonObject | undefined> {
  const file = join(folder, name);
  const refuse = (reason: string, cause?: unknown) => corruptModel(`${basename(name)} ${reason}`, cause);
  const json = await readJson(file, bytesMax, refuse, dirname(file)).catch(unlessAbsent);
  if (json === undefined || isJsonObject(json)) return json;
  throw refuse('is not a JSON object');
}

/** @throws MaskrouteError `corrupt_model` when it is missing, too. */
export async function requireModelJson(folder: string, name: string, bytesMax: number): Promise<JsonObject> {
  const json = await readModelJson(folder, name, bytesMax);
  if (json === undefined) throw corruptModel(`its folder has no ${basename(name)}`);
  return json;
}

function unlessAbsent(error: NodeJS.ErrnoException): undefined {
  if (error.code !== 'ENOENT') throw error;
}
