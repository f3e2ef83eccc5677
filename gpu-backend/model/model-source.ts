/**
 * A model between import and graph: where its weights come from, and what the store keeps of it.
 * `WeightSource` is what GGUF and safetensors readers give and what architectures read.
 */
import { basename, dirname, join } from 'node:path';
import { z } from 'zod';
import { MODEL_HASH_PATTERN, SURROGATES_ID_PATTERN } from '../../shared/mask/mask.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { readJson, readRegular } from '../files.ts';

/** Families of decoders, by Hugging Face's `model_type`. What each of them means is a row of `families.ts`. */
export const ARCHITECTURES = ['llama', 'mistral', 'smollm3', 'qwen2', 'qwen3'] as const;

/** How rotary frequencies differ from those of `ropeTheta` alone; formulas in `rope.ts`. */
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
    /** Whether the range that is interpolated begins and ends at whole dimensions. */
    wholeDimensions: z.boolean(),
    /** Multiplies cos and sin, so scores by its square. */
    attentionFactor: z.number().positive(),
  }),
  /** Each frequency is divided by its own factor: how GGUF files hold Llama 3's. */
  z.strictObject({ type: z.literal('factors'), factors: z.array(z.number().positive()).min(1).max(4096) }),
]);
export type RopeScaling = z.infer<typeof ropeScalingSchema>;

/**
 * Hyper-parameters of a decoder. Widths in floats, positions in tokens. A feature that a model has not is absent, so a
 * plain Llama has none of the optional ones.
 */
export const llamaConfigSchema = z.strictObject({
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
  /** Which projections of attention add a bias: Q, K and V, or the output's as well. */
  attentionBias: z.enum(['qkv', 'qkvo']).optional(),
  /** RMS norms over each head of Q and of K, before rotary. */
  headNorms: z.literal(true).optional(),
  /** Layers whose queries see this many tokens, their own among them. */
  slidingWindow: z.strictObject({ tokens: z.int().min(1), layers: z.array(z.int().min(0)) }).optional(),
  /** Layers that turn neither Q nor K. */
  layersWithoutRope: z.array(z.int().min(0)).optional(),
});
export type ModelConfig = z.infer<typeof llamaConfigSchema>;
export type LlamaConfig = ModelConfig;

/** Dequantized weights by canonical (Hugging Face) names, e.g. `model.layers.0.self_attn.q_proj.weight`. */
export interface WeightSource {
  readonly config: ModelConfig;
  has(name: string): boolean;
  /** Shape as PyTorch has it: `[out, in]` for a projection. */
  shape(name: string): readonly number[];
  /** The whole tensor in fp32, row-major. Rotary is in the half-split ("NeoX") order, whatever the file's. */
  read(name: string): Promise<Float32Array>;
  /** Of sources that are files: what another thread needs to read a part of a tensor. */
  place?(name: string): TensorPlace;
}

/** Where a tensor lies in a file that this process has open. Plain data. */
export type TensorPlace = {
  readonly name: string;
  readonly descriptor: number;
  readonly offset: number;
  /** As GGUF numbers types. */
  readonly type: number;
  readonly shape: readonly number[];
  /** Heads of Q or K, where the file holds their rows interleaved. */
  readonly interleavedHeads: number | undefined;
};

export const WEIGHT_KINDS = ['q8', 'q4', 'f32'] as const;
export type WeightKind = (typeof WEIGHT_KINDS)[number];

/** How a backend keeps K and V between steps. What is computed is fp32 anyway. */
export const KV_TYPES = ['f32', 'f16'] as const;
export type KvType = (typeof KV_TYPES)[number];

/** Raised whenever the graph or the weights file changes: models of another format are imported again. */
export const MANIFEST_FORMAT = 'maskroute-model-v8';

/** `model.json` in a model's folder in the store, beside `model.onnx`, `weights.bin` and `tokenizer.json`. */
export const modelManifestSchema = z.strictObject({
  format: z.literal(MANIFEST_FORMAT),
  name: z.string().min(1).max(200),
  /** SHA-256 of the source's weights file. */
  hash: z.string().regex(MODEL_HASH_PATTERN),
  source: z.string(),
  weights: z.enum(WEIGHT_KINDS),
  config: llamaConfigSchema,
  chatTemplate: z.string().nullable(),
  bosTokenId: z.int().nullable(),
  /** Ids that end an answer: end of sequence, end of turn. The first is what templates call `eos_token`. */
  eosTokenIds: z.array(z.int()).min(1),
  addBos: z.boolean(),
  /** How four bits were chosen: another version, or another text, comes to other codes. */
  fourBits: z.strictObject({ version: z.int(), text: z.string() }).optional(),
  /** The table of surrogates in the graph, when one is installed (`surrogates.ts`). */
  surrogates: z
    .strictObject({
      id: z.string().regex(SURROGATES_ID_PATTERN),
      rank: z.int().min(1),
      fitted: z.string(),
      /** Whether it came with the project: a newer one takes its place. */
      preset: z.boolean(),
    })
    .optional(),
  files: z.record(z.string(), z.strictObject({ bytes: z.int(), sha256: z.string() })),
  importedAt: z.iso.datetime(),
});
export type ModelManifest = z.infer<typeof modelManifestSchema>;

/* What a long import tells whoever waits for it. */

export type ImportPhase = 'download' | 'unpack' | 'verify' | 'write' | 'convert';

export type ImportProgress = {
  readonly phase: ImportPhase;
  readonly done: number;
  /** Undefined while the size is not known. */
  readonly total: number | undefined;
  readonly unit: 'bytes' | 'percent';
};

export type ImportHooks = {
  readonly onProgress: (progress: ImportProgress) => void;
  /** One line for a person: which source was taken, what was skipped and why. */
  readonly log: (line: string) => void;
  readonly signal?: AbortSignal | undefined;
};

/* The two ways in which a model file is refused, worded alike everywhere. */

/** The file contradicts itself or its format: truncated, damaged, or made to harm. */
export const corruptModel = (reason: string, cause?: unknown): MaskrouteError =>
  new MaskrouteError('corrupt_model', `The model file is damaged: ${reason}.`, { cause });

/** The file is well-formed and asks for something that we do not compute. */
export const unsupportedModel = (reason: string): MaskrouteError =>
  new MaskrouteError('unsupported_model', `The model is not supported: ${reason}.`);

/** Names from a file go into messages short and without control characters. */
export function quoted(text: string): string {
  const short = text.length > 60 ? `${text.slice(0, 60)}…` : text;
  return JSON.stringify(short);
}

/* An opened source of weights, whatever its format. */

export type OpenModelFile = WeightSource & {
  /** What the model's hash is taken over, in order. */
  readonly weightFiles: readonly string[];
  close(): Promise<void>;
};

/* The small files beside the weights: bounded, links lead nowhere else, JSON objects but for a chat template. */

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

export const isJsonObject = (json: unknown): json is JsonObject =>
  json !== null && typeof json === 'object' && !Array.isArray(json);

function unlessAbsent(error: NodeJS.ErrnoException): undefined {
  if (error.code !== 'ENOENT') throw error;
}
