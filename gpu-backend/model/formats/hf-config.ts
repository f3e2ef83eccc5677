/**
 * `ModelConfig` from a Hugging Face config.json. Fields that it leaves out have transformers' defaults for the family.
 * Settings that would change the computation and are not supported are refused by name.
 */
import { isDeepStrictEqual } from 'node:util';
import { z } from 'zod';
import { check, isJsonObject } from '../../../shared/wire/parse-body.ts';
import {
  type Architecture,
  architectureNamed,
  checkConfig,
  FAMILIES,
  GLOBAL_EVERY,
  gemmaFactors,
  layersOf,
  slidingWindowOf,
} from '../families.ts';
import {
  corruptModel,
  type JsonObject,
  type ModelConfig,
  quoted,
  type RopeScaling,
  unsupportedModel,
} from '../model-source.ts';
import { yarnAttentionFactor } from '../rope.ts';

/** Older files have rope settings in `rope_scaling` and beside it, newer files all of them in `rope_parameters`. */
const ropeSchema = z.looseObject({
  rope_type: z.string().nullish(),
  type: z.string().nullish(),
  rope_theta: z.number().nullish(),
  factor: z.number().nullish(),
  low_freq_factor: z.number().nullish(),
  high_freq_factor: z.number().nullish(),
  original_max_position_embeddings: z.number().nullish(),
  attention_factor: z.number().nullish(),
  beta_fast: z.number().nullish(),
  beta_slow: z.number().nullish(),
  mscale: z.number().nullish(),
  mscale_all_dim: z.number().nullish(),
  truncate: z.boolean().nullish(),
  partial_rotary_factor: z.number().nullish(),
});
/** Layers with a sliding window have settings of their own in some families. */
const ropesSchema = ropeSchema.extend({
  full_attention: ropeSchema.nullish(),
  sliding_attention: ropeSchema.nullish(),
});
type Rope = z.infer<typeof ropeSchema>;

const configSchema = z.looseObject({
  hidden_size: z.number(),
  intermediate_size: z.number(),
  num_hidden_layers: z.int(),
  num_attention_heads: z.number(),
  num_key_value_heads: z.number().nullish(),
  head_dim: z.number().nullish(),
  vocab_size: z.number(),
  max_position_embeddings: z.number().nullish(),
  rms_norm_eps: z.number().nullish(),
  rope_theta: z.number().nullish(),
  rope_scaling: ropeSchema.nullish(),
  rope_parameters: ropesSchema.nullish(),
  rope_local_base_freq: z.number().nullish(),
  hidden_act: z.string().nullish(),
  hidden_activation: z.string().nullish(),
  attention_bias: z.boolean().nullish(),
  mlp_bias: z.boolean().nullish(),
  tie_word_embeddings: z.boolean().nullish(),
  partial_rotary_factor: z.number().nullish(),
  use_sliding_window: z.boolean().nullish(),
  sliding_window: z.int().nullish(),
  sliding_window_pattern: z.int().min(1).nullish(),
  max_window_layers: z.int().nullish(),
  layer_types: z.array(z.string()).max(512).nullish(),
  no_rope_layers: z.array(z.number()).max(512).nullish(),
  no_rope_layer_interval: z.int().min(1).nullish(),
  embedding_multiplier: z.number().nullish(),
  residual_multiplier: z.number().nullish(),
  attention_multiplier: z.number().nullish(),
  logits_scaling: z.number().nullish(),
  query_pre_attn_scalar: z.number().positive().nullish(),
  attn_logit_softcapping: z.number().nullish(),
  final_logit_softcapping: z.number().nullish(),
  use_bidirectional_attention: z.boolean().nullish(),
});
type Config = z.infer<typeof configSchema>;

/** @throws MaskrouteError `unsupported_model` or `corrupt_model`. */
export function configFromHuggingFace(json: JsonObject): ModelConfig {
  const architecture = architectureNamed(json.model_type);
  const text = textPart(json);
  if ((json.quantization_config ?? text.quantization_config ?? null) !== null) {
    throw unsupportedModel('its weights are quantized already (quantization_config)');
  }
  const family = FAMILIES[architecture];
  const checked = check(configSchema, { ...family.defaults.fields, ...text }, 'the file');
  if (checked.kind === 'bad') throw corruptModel(`config.json: ${checked.message}`);
  const { value: config } = checked;
  refuseUnhonoured(config, family.activation);
  const { defaults, biases, headNorms, postNorms } = family;
  const headCount = config.num_attention_heads;
  const contextTokens = config.max_position_embeddings ?? defaults.contextTokens;
  // In a file, null means as many as heads; transformers' default is only for a field that is missing.
  const kvHeadsDefault = config.num_key_value_heads === null ? undefined : defaults.kvHeadCount;
  const headSizeDefault = config.head_dim === null ? undefined : defaults.headSize;
  const rope = config.rope_parameters?.full_attention ?? config.rope_parameters ?? config.rope_scaling ?? {};
  const scaling = ropeScaling(rope, architecture, contextTokens);
  // A newer file that somebody gave an older file's scaling: transformers takes it, and loses the base that is in the other.
  const { rope_scaling: older } = config;
  if (older && !isDeepStrictEqual(ropeScaling(older, architecture, contextTokens), scaling))
    throw unsupportedModel('rope_scaling and rope_parameters in config.json, which differ');
  const layersWithoutRope = ropelessLayers(config, architecture);
  const windowLayers = layersWithWindow(config, architecture, layersWithoutRope);
  const headSize = config.head_dim ?? headSizeDefault ?? config.hidden_size / headCount;
  const asked = biases === 'asked' && config.attention_bias === true ? 'qkvo' : undefined;
  return checkConfig({
    architecture,
    layerCount: config.num_hidden_layers,
    hiddenSize: config.hidden_size,
    ffnSize: config.intermediate_size,
    headCount,
    kvHeadCount: config.num_key_value_heads ?? kvHeadsDefault ?? headCount,
    headSize,
    vocabularySize: config.vocab_size,
    contextTokens,
    ropeTheta: rope.rope_theta ?? config.rope_theta ?? defaults.ropeTheta,
    rmsEpsilon: config.rms_norm_eps ?? defaults.rmsEpsilon,
    tiedEmbeddings: config.tie_word_embeddings ?? defaults.tiedEmbeddings,
    ropeScaling: scaling,
    attentionBias: biases === 'qkv' ? 'qkv' : asked,
    headNorms: headNorms || undefined,
    postNorms: postNorms || undefined,
    activation: family.activation === 'silu' ? undefined : 'gelu-tanh',
    slidingWindow: slidingWindow(config, architecture, windowLayers, contextTokens),
    localRope: localRope(config, architecture, windowLayers),
    layersWithoutRope: layersWithoutRope.length === 0 ? undefined : layersWithoutRope,
    factors: factorsOf(config, architecture),
  });
}

/** What config.json says of the part that reads text: of a model that reads images, too, another part is about them. */
export function textPart(json: JsonObject): JsonObject {
  const { otherName } = FAMILIES[architectureNamed(json.model_type)];
  if (json.model_type !== otherName) return json;
  return isJsonObject(json.text_config) ? json.text_config : {};
}

function factorsOf(config: Config, architecture: Architecture): ModelConfig['factors'] {
  switch (FAMILIES[architecture].factors) {
    case 'none':
      return undefined;
    case 'asked':
      return {
        embedding: config.embedding_multiplier ?? 1,
        blocks: config.residual_multiplier ?? 1,
        scores: config.attention_multiplier ?? 1,
        logits: 1 / (config.logits_scaling ?? 1),
      };
    case 'gemma':
      return gemmaFactors(config.hidden_size, config.query_pre_attn_scalar ?? 256);
  }
}

function refuseUnhonoured(config: Config, activation: string): void {
  // transformers reads one of these names in each family.
  const named = activation === 'silu' ? config.hidden_act : config.hidden_activation;
  if ((named ?? activation) !== activation) throw unsupportedModel(`the activation ${quoted(named!)}`);
  for (const name of ['attn_logit_softcapping', 'final_logit_softcapping'] as const)
    if (typeof config[name] === 'number') throw unsupportedModel(`soft-capping (${name})`);
  if (config.use_bidirectional_attention) throw unsupportedModel('attention to later tokens');
  if (config.mlp_bias) throw unsupportedModel('biases in its FFN projections');
  const ropes = config.rope_parameters;
  const all = [config, config.rope_scaling, ropes, ropes?.full_attention, ropes?.sliding_attention];
  for (const settings of all) {
    const partial = settings?.partial_rotary_factor ?? 1;
    if (partial !== 1) throw unsupportedModel(`partial rotary embeddings (partial_rotary_factor ${partial})`);
  }
  const kinds = new Set(config.layer_types ?? []);
  for (const kind of ['full_attention', 'sliding_attention']) kinds.delete(kind);
  if (kinds.size > 0) throw unsupportedModel(`layers of the kind ${quoted([...kinds][0]!)}`);
}

function ropeScaling(rope: Rope, architecture: Architecture, contextTokens: number): RopeScaling | undefined {
  const named = rope.rope_type ?? rope.type ?? 'default';
  const type = FAMILIES[architecture].longropeNames.includes(named) ? 'longrope' : named;
  const required = (name: keyof Rope): number => {
    const value = rope[name];
    if (typeof value === 'number') return value;
    throw corruptModel(`config.json: its rope scaling ${quoted(type)} has no ${name}`);
  };
  switch (type) {
    case 'default':
    // Dynamic scaling has no effect within the trained context, and longer contexts are not served.
    case 'dynamic':
      return undefined;
    case 'linear':
      return { type, factor: required('factor') };
    case 'llama3':
      return {
        type,
        factor: required('factor'),
        lowFrequencyFactor: required('low_freq_factor'),
        highFrequencyFactor: required('high_freq_factor'),
        originalContextTokens: rope.original_max_position_embeddings ?? contextTokens,
      };
    case 'yarn': {
      const originalContextTokens = rope.original_max_position_embeddings ?? contextTokens;
      const factor = rope.factor ?? contextTokens / originalContextTokens;
      const { mscale, mscale_all_dim: mscaleAll } = rope;
      const inferred =
        mscale && mscaleAll
          ? yarnAttentionFactor(factor, mscale) / yarnAttentionFactor(factor, mscaleAll)
          : yarnAttentionFactor(factor);
      return {
        type,
        factor,
        originalContextTokens,
        betaFast: rope.beta_fast || 32,
        betaSlow: rope.beta_slow || 1,
        wholeDimensions: rope.truncate ?? true,
        attentionFactor: rope.attention_factor ?? inferred,
      };
    }
    default:
      throw unsupportedModel(`rope scaling ${quoted(type)}`);
  }
}

/** The layers without rotary embedding. In `no_rope_layers`, 0 marks such a layer and 1 the others. */
function ropelessLayers(config: Config, architecture: Architecture): number[] {
  const { ropelessEvery } = FAMILIES[architecture];
  if (ropelessEvery === undefined) return [];
  const listed = config.no_rope_layers;
  const every = config.no_rope_layer_interval ?? ropelessEvery;
  return layersOf(config.num_hidden_layers, (layer) =>
    listed ? (listed[layer] ?? 1) === 0 : (layer + 1) % every === 0,
  );
}

/** The layers that shall have a sliding window, also where `sliding_window` is null and they see all tokens. */
function layersWithWindow(
  config: Config,
  architecture: Architecture,
  ropeless: readonly number[],
): readonly number[] {
  const { window } = FAMILIES[architecture];
  const isAsked = window === 'all' || window === 'between-global' || config.use_sliding_window === true;
  if (window === 'none' || !isAsked) return [];
  const kinds = config.layer_types;
  const upper = config.max_window_layers ?? 28;
  const every = config.sliding_window_pattern ?? GLOBAL_EVERY;
  return layersOf(config.num_hidden_layers, (layer) => {
    if (kinds) return kinds[layer] === 'sliding_attention';
    if (window === 'upper') return layer >= upper;
    if (window === 'between-global') return (layer + 1) % every !== 0;
    return window === 'all' || ropeless.includes(layer);
  });
}

function slidingWindow(
  config: Config,
  architecture: Architecture,
  layers: readonly number[],
  contextTokens: number,
): ModelConfig['slidingWindow'] {
  if (config.sliding_window === null) return undefined;
  const { windowTokens } = FAMILIES[architecture].defaults;
  return slidingWindowOf(config.sliding_window ?? windowTokens, layers, contextTokens);
}

function localRope(
  config: Config,
  architecture: Architecture,
  layers: readonly number[],
): ModelConfig['localRope'] {
  const { localRopeTheta } = FAMILIES[architecture].defaults;
  if (localRopeTheta === undefined || layers.length === 0) return undefined;
  const own = config.rope_parameters?.sliding_attention;
  const type = own?.rope_type ?? 'default';
  if (type !== 'default')
    throw unsupportedModel(`rope scaling ${quoted(type)} in layers with a sliding window`);
  return { theta: own?.rope_theta ?? config.rope_local_base_freq ?? localRopeTheta, layers: [...layers] };
}
