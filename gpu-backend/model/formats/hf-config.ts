/**
 * `ModelConfig` from a Hugging Face config.json. What a file leaves out is what transformers takes for its family;
 * whatever would change the computation and is not honoured here is refused by name.
 */
import { z } from 'zod';
import { check } from '../../../shared/wire/parse-body.ts';
import {
  type Architecture,
  architectureNamed,
  checkConfig,
  FAMILIES,
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

/** Rope settings stand in `rope_scaling` in older files, with everything else in `rope_parameters` in newer ones. */
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
  rope_parameters: ropeSchema.nullish(),
  hidden_act: z.string().nullish(),
  attention_bias: z.boolean().nullish(),
  mlp_bias: z.boolean().nullish(),
  tie_word_embeddings: z.boolean().nullish(),
  partial_rotary_factor: z.number().nullish(),
  use_sliding_window: z.boolean().nullish(),
  sliding_window: z.int().nullish(),
  max_window_layers: z.int().nullish(),
  layer_types: z.array(z.string()).max(512).nullish(),
  no_rope_layers: z.array(z.number()).max(512).nullish(),
  no_rope_layer_interval: z.int().min(1).nullish(),
});
type Config = z.infer<typeof configSchema>;

/** @throws MaskrouteError `unsupported_model` or `corrupt_model`. */
export function configFromHuggingFace(json: JsonObject): ModelConfig {
  const architecture = architectureNamed(json.model_type);
  if (json.quantization_config !== undefined && json.quantization_config !== null) {
    throw unsupportedModel('its weights are quantized in their own way (quantization_config)');
  }
  const checked = check(configSchema, json, 'the file');
  if (checked.kind === 'bad') throw corruptModel(`config.json: ${checked.message}`);
  const { value: config } = checked;
  refuseUnhonoured(config);
  const { defaults, biases, headNorms } = FAMILIES[architecture];
  const headCount = config.num_attention_heads;
  const contextTokens = config.max_position_embeddings ?? defaults.contextTokens;
  // A file that says null means as many as heads; transformers' own number is for a file that is silent.
  const kvHeadsDefault = config.num_key_value_heads === null ? undefined : defaults.kvHeadCount;
  const headSizeDefault = config.head_dim === null ? undefined : defaults.headSize;
  const rope = config.rope_parameters ?? config.rope_scaling ?? {};
  const layersWithoutRope = ropelessLayers(config, architecture);
  const asked = biases === 'asked' && config.attention_bias === true ? 'qkvo' : undefined;
  return checkConfig({
    architecture,
    layerCount: config.num_hidden_layers,
    hiddenSize: config.hidden_size,
    ffnSize: config.intermediate_size,
    headCount,
    kvHeadCount: config.num_key_value_heads ?? kvHeadsDefault ?? headCount,
    headSize: config.head_dim ?? headSizeDefault ?? config.hidden_size / headCount,
    vocabularySize: config.vocab_size,
    contextTokens,
    ropeTheta: rope.rope_theta ?? config.rope_theta ?? defaults.ropeTheta,
    rmsEpsilon: config.rms_norm_eps ?? 1e-6,
    tiedEmbeddings: config.tie_word_embeddings ?? defaults.tiedEmbeddings,
    ropeScaling: ropeScaling(rope, contextTokens),
    attentionBias: biases === 'qkv' ? 'qkv' : asked,
    headNorms: headNorms || undefined,
    slidingWindow: slidingWindow(config, architecture, layersWithoutRope, contextTokens),
    layersWithoutRope: layersWithoutRope.length === 0 ? undefined : layersWithoutRope,
  });
}

function refuseUnhonoured(config: Config): void {
  if ((config.hidden_act ?? 'silu') !== 'silu') {
    throw unsupportedModel(`the activation ${quoted(config.hidden_act!)}`);
  }
  if (config.mlp_bias) throw unsupportedModel('biases in its FFN projections');
  const partial = config.partial_rotary_factor ?? config.rope_parameters?.partial_rotary_factor ?? 1;
  if (partial !== 1) throw unsupportedModel('partial rotary embeddings');
  const kinds = new Set(config.layer_types ?? []);
  for (const kind of ['full_attention', 'sliding_attention']) kinds.delete(kind);
  if (kinds.size > 0) throw unsupportedModel(`layers of the kind ${quoted([...kinds][0]!)}`);
}

function ropeScaling(rope: Rope, contextTokens: number): RopeScaling | undefined {
  const type = rope.rope_type ?? rope.type ?? 'default';
  const required = (name: keyof Rope): number => {
    const value = rope[name];
    if (typeof value === 'number') return value;
    throw corruptModel(`config.json: its rope scaling ${quoted(type)} has no ${name}`);
  };
  switch (type) {
    case 'default':
    // Dynamic scaling begins where the context of this server ends.
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

/** In `no_rope_layers` a 1 stands for a layer that has rotary. */
function ropelessLayers(config: Config, architecture: Architecture): number[] {
  const { ropelessEvery } = FAMILIES[architecture];
  if (ropelessEvery === undefined) return [];
  const listed = config.no_rope_layers;
  const every = config.no_rope_layer_interval ?? ropelessEvery;
  return layersOf(config.num_hidden_layers, (layer) =>
    listed ? (listed[layer] ?? 1) === 0 : (layer + 1) % every === 0,
  );
}

function slidingWindow(
  config: Config,
  architecture: Architecture,
  ropeless: readonly number[],
  contextTokens: number,
): ModelConfig['slidingWindow'] {
  const { window, defaults } = FAMILIES[architecture];
  const asked = window === 'all' || config.use_sliding_window === true;
  if (window === 'none' || !asked || config.sliding_window === null) return undefined;
  const kinds = config.layer_types;
  const upper = config.max_window_layers ?? 28;
  const layers = layersOf(config.num_hidden_layers, (layer) => {
    if (kinds) return kinds[layer] === 'sliding_attention';
    if (window === 'upper') return layer >= upper;
    return window === 'all' || ropeless.includes(layer);
  });
  return slidingWindowOf(config.sliding_window ?? defaults.windowTokens, layers, contextTokens);
}
