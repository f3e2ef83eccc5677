/** A folder with config.json and safetensors weights, in one file or several, as a `WeightSource`. */
import { readdir } from 'node:fs/promises';
import { join } from 'node:path';
import { z } from 'zod';
import { check } from '../../../shared/wire/parse-body.ts';
import {
  corruptModel,
  type JsonObject,
  type LlamaConfig,
  type OpenModelFile,
  readModelJson,
  requireModelJson,
  unsupportedModel,
} from '../model-source.ts';
import { checkConfig, unsupportedArchitecture } from './gguf-config.ts';
import { quoted } from './gguf-header.ts';
import { checkLlamaTensors, llamaTensors } from './llama-tensors.ts';
import { openSafetensors, type SafetensorsFile } from './safetensors.ts';

const CONFIG_BYTES_MAX = 4 * 1024 * 1024;
const INDEX_BYTES_MAX = 32 * 1024 * 1024;
const INDEX_FILE = 'model.safetensors.index.json';
const SHARD_COUNT_MAX = 1000;

/** @throws MaskrouteError `corrupt_model`, `unsupported_model`, `invalid_argument` for a file that is not a regular one. */
export async function openSafetensorsFolder(folder: string): Promise<OpenModelFile> {
  const config = configFromHuggingFace(await requireModelJson(folder, 'config.json', CONFIG_BYTES_MAX));
  const names = await weightFileNames(folder);
  const files: SafetensorsFile[] = [];
  const close = async () => {
    await Promise.all(files.map((file) => file.close()));
  };
  try {
    for (const name of names) files.push(await openSafetensors(join(folder, name), folder));
    const fileOf = new Map<string, SafetensorsFile>();
    for (const file of files) {
      for (const name of file.names) {
        if (fileOf.has(name)) throw corruptModel(`tensor ${quoted(name)} comes twice`);
        if (!isIgnored(name, config.tiedEmbeddings)) fileOf.set(name, file);
      }
    }
    const shapes = new Map([...fileOf].map(([name, file]) => [name, file.shape(name)]));
    checkLlamaTensors(llamaTensors(config), shapes, (tensor) => tensor.name);
    const find = (name: string) => {
      const file = fileOf.get(name);
      if (file === undefined) throw new RangeError(`the model has no tensor ${name}`);
      return file;
    };
    return {
      config,
      weightFiles: names.map((name) => join(folder, name)),
      has: (name) => fileOf.has(name),
      shape: (name) => find(name).shape(name),
      read: (name) => find(name).read(name),
      close,
    };
  } catch (error) {
    await close();
    throw error;
  }
}

/** Old files carry the rotary table, which follows from the configuration; a tied head repeats the embedding. */
const isIgnored = (name: string, tied: boolean): boolean =>
  name.endsWith('.rotary_emb.inv_freq') || (tied && name === 'lm_head.weight');

/** Sorted, so that the model's hash does not depend on the order in a folder. */
async function weightFileNames(folder: string): Promise<string[]> {
  const entries = new Set(await readdir(folder));
  const index = await readModelJson(folder, INDEX_FILE, INDEX_BYTES_MAX);
  if (index === undefined) {
    if (entries.has('model.safetensors')) return ['model.safetensors'];
    throw corruptModel('its folder has neither model.safetensors nor its index');
  }
  const names = [...new Set(Object.values((index.weight_map as object | undefined) ?? {}))].sort();
  if (names.length === 0 || names.length > SHARD_COUNT_MAX)
    throw corruptModel(`${INDEX_FILE} names no files`);
  for (const name of names) {
    // A name is looked up in the folder's own list: an index cannot point out of it.
    if (typeof name !== 'string' || !name.endsWith('.safetensors') || !entries.has(name)) {
      throw corruptModel(`${INDEX_FILE} names ${quoted(String(name))}, which is not there`);
    }
  }
  return names as string[];
}

/* `LlamaConfig` from a Hugging Face config.json. Defaults are those of transformers' LlamaConfig. */

/** Rope settings stand in `rope_scaling` in older files, with everything else in `rope_parameters` in newer ones. */
const ropeSchema = z.looseObject({
  rope_type: z.string().nullish(),
  type: z.string().nullish(),
  rope_theta: z.number().nullish(),
});

const configSchema = z.looseObject({
  model_type: z.string(),
  hidden_size: z.number(),
  intermediate_size: z.number(),
  num_hidden_layers: z.number(),
  num_attention_heads: z.number(),
  num_key_value_heads: z.number().nullish(),
  head_dim: z.number().nullish(),
  vocab_size: z.number(),
  max_position_embeddings: z.number().default(2048),
  rms_norm_eps: z.number().default(1e-6),
  rope_theta: z.number().nullish(),
  rope_scaling: ropeSchema.nullish(),
  rope_parameters: ropeSchema.nullish(),
  hidden_act: z.string().default('silu'),
  attention_bias: z.boolean().nullish(),
  mlp_bias: z.boolean().nullish(),
  tie_word_embeddings: z.boolean().nullish(),
  partial_rotary_factor: z.number().nullish(),
});

/** @throws MaskrouteError `unsupported_model` or `corrupt_model`. */
function configFromHuggingFace(json: JsonObject): LlamaConfig {
  if (json.model_type !== 'llama') throw unsupportedArchitecture(String(json.model_type ?? 'none'));
  const checked = check(configSchema, json, 'the file');
  if (checked.kind === 'bad') throw corruptModel(`config.json: ${checked.message}`);
  const { value: config } = checked;
  const rope = config.rope_parameters ?? config.rope_scaling ?? undefined;
  const ropeType = rope?.rope_type ?? rope?.type ?? 'default';
  if (ropeType !== 'default') throw unsupportedModel(`rope scaling ${JSON.stringify(ropeType)}`);
  if (config.hidden_act !== 'silu')
    throw unsupportedModel(`the activation ${JSON.stringify(config.hidden_act)}`);
  if (config.attention_bias || config.mlp_bias) throw unsupportedModel('biases in its projections');
  if ((config.partial_rotary_factor ?? 1) !== 1) throw unsupportedModel('partial rotary embeddings');
  return checkConfig({
    architecture: 'llama',
    layerCount: config.num_hidden_layers,
    hiddenSize: config.hidden_size,
    ffnSize: config.intermediate_size,
    headCount: config.num_attention_heads,
    kvHeadCount: config.num_key_value_heads ?? config.num_attention_heads,
    headSize: config.head_dim ?? config.hidden_size / config.num_attention_heads,
    vocabularySize: config.vocab_size,
    contextTokens: config.max_position_embeddings,
    ropeTheta: rope?.rope_theta ?? config.rope_theta ?? 10_000,
    rmsEpsilon: config.rms_norm_eps,
    tiedEmbeddings: config.tie_word_embeddings ?? false,
  });
}
