/** `LlamaConfig` from a Hugging Face config.json. Defaults are those of transformers' LlamaConfig. */
import { z } from 'zod';
import { check } from '../../shared/parse-body.ts';
import { checkConfig, unsupportedArchitecture } from './llama-config.ts';
import { corruptModel, unsupportedModel } from './model-errors.ts';
import type { JsonObject } from './read-json.ts';
import type { LlamaConfig } from './types.ts';

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
export function configFromHuggingFace(json: JsonObject): LlamaConfig {
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
