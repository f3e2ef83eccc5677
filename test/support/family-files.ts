/** A random model of any family as files: a Hugging Face folder, or GGUF as llama.cpp's converter writes it. */
import {
  type DecoderTensor,
  decoderTensors,
  FAMILIES,
  layersOf,
  storedShapes,
} from '../../gpu-backend/model/families.ts';
import type { ModelConfig, WeightSource } from '../../gpu-backend/model/model-source.ts';
import { ropeFrequencies } from '../../gpu-backend/model/rope.ts';
import type { GgufParts, Tensor, Value } from './gguf.ts';
import { floats, tinyLlama } from './gguf.ts';
import { writeSafetensors } from './safetensors.ts';

type Weights = Map<string, { shape: readonly number[]; data: Float32Array }>;

export async function readAll(source: WeightSource): Promise<Weights> {
  const weights: Weights = new Map();
  for (const { name, shape } of decoderTensors(source.config)) {
    weights.set(name, { shape, data: await source.read(name) });
  }
  return weights;
}

/** The tensors as a family's files have them: in stacks, and without what readers add and its factors. */
export async function storedTensors(
  source: WeightSource,
  format: 'safetensors' | 'GGUF' = 'safetensors',
): Promise<Weights> {
  const nameOf = ({ hubName, ggufName }: DecoderTensor) => (format === 'GGUF' ? ggufName : hubName);
  const tensors = decoderTensors(source.config);
  const stored: Weights = new Map();
  for (const [name, shape] of storedShapes(tensors, nameOf)) {
    const parts = tensors.filter((tensor) => nameOf(tensor) === name);
    const values = await Promise.all(
      parts.map(async (part) => {
        const data = await source.read(part.name);
        const added = format === 'GGUF' ? 0 : part.hubAdded;
        return data.map((value) => value / part.scale - added);
      }),
    );
    const data = new Float32Array(values.reduce((sum, { length }) => sum + length, 0));
    let at = 0;
    for (const part of values) {
      data.set(part, at);
      at += part.length;
    }
    stored.set(name, { shape, data });
  }
  return stored;
}

/** In `shards` files with an index, or in one. */
export function safetensorsFiles(weights: Weights, shards: number): Record<string, Uint8Array> {
  if (shards === 1) return { 'model.safetensors': writeSafetensors(weights) };
  const number = (value: number) => String(value).padStart(5, '0');
  const files: Record<string, Uint8Array> = {};
  const map: Record<string, string> = {};
  for (let shard = 0; shard < shards; shard++) {
    const name = `model-${number(shard + 1)}-of-${number(shards)}.safetensors`;
    const own = [...weights].filter((_, i) => i % shards === shard);
    for (const [tensor] of own) map[tensor] = name;
    files[name] = writeSafetensors(new Map(own));
  }
  files['model.safetensors.index.json'] = new TextEncoder().encode(JSON.stringify({ weight_map: map }));
  return files;
}

const u32 = (value: number): Value => ({ type: 'u32', value });
const f32 = (value: number): Value => ({ type: 'f32', value });
const text = (value: string): Value => ({ type: 'string', value });

/** What GGUF says of any family's shape, without the architecture's name before each key. */
export const ggufShape = (config: ModelConfig): Record<string, Value> => ({
  block_count: u32(config.layerCount),
  context_length: u32(config.contextTokens),
  embedding_length: u32(config.hiddenSize),
  feed_forward_length: u32(config.ffnSize),
  'attention.head_count': u32(config.headCount),
  'attention.head_count_kv': u32(config.kvHeadCount),
  'attention.key_length': u32(config.headSize),
  'attention.value_length': u32(config.headSize),
  'attention.layer_norm_rms_epsilon': f32(config.rmsEpsilon),
  'rope.freq_base': f32(config.ropeTheta),
});

/** What it says of windows, the rotary embedding in them, and its scaling in other layers. */
export const attentionMetadata = (config: ModelConfig): Record<string, Value> => ({
  ...(config.slidingWindow && { 'attention.sliding_window': u32(config.slidingWindow.tokens) }),
  ...(config.localRope && {
    'rope.freq_base_swa': f32(config.localRope.theta),
    'attention.sliding_window_pattern': u32(windowPattern(config)),
  }),
  ...scalingMetadata(config),
});

/** With the byte tokenizer of the tiny Llama; Mistral's files say llama. */
export async function ggufParts(source: WeightSource): Promise<GgufParts> {
  const { config } = source;
  const { otherName } = FAMILIES[config.architecture];
  const architecture = config.architecture === 'mistral' ? 'llama' : (otherName ?? config.architecture);
  const own: Record<string, Value> = {
    ...ggufShape(config),
    ...attentionMetadata(config),
    ...factorsMetadata(config),
  };
  const metadata = new Map<string, Value>([
    ['general.architecture', text(architecture)],
    ...Object.entries(own).map(([key, value]): [string, Value] => [`${architecture}.${key}`, value]),
    ...[...tinyLlama().metadata].filter(([key]) => key.startsWith('tokenizer.')),
  ]);
  const heads = new Map(
    decoderTensors(config).map(({ ggufName, interleavedHeads }) => [ggufName, interleavedHeads]),
  );
  const weights = await storedTensors(source, 'GGUF');
  const tensors = Array.from(weights, ([name, { shape, data }]): Tensor => {
    const interleaved = heads.get(name);
    const stored = interleaved === undefined ? data : interleave(data, interleaved, shape[1] ?? 1);
    return { name, shape, type: 0, data: floats(stored) };
  });
  return { metadata, tensors: [...tensors, ...ropeFactors(config)] };
}

function scalingMetadata({ ropeScaling }: ModelConfig): Record<string, Value> {
  if (ropeScaling?.type !== 'linear' && ropeScaling?.type !== 'yarn') return {};
  return {
    'rope.scaling.type': text(ropeScaling.type),
    'rope.scaling.factor': f32(ropeScaling.factor),
    ...(ropeScaling.type === 'yarn' && {
      'rope.scaling.original_context_length': u32(ropeScaling.originalContextTokens),
    }),
  };
}

/** Every n-th layer is global; 0 where none is, as llama.cpp reads it. */
const windowPattern = ({ localRope, layerCount }: ModelConfig): number =>
  layersOf(layerCount).findIndex((layer) => !localRope!.layers.includes(layer)) + 1;

const factorsMetadata = ({ architecture, factors }: ModelConfig): Record<string, Value> =>
  factors === undefined || FAMILIES[architecture].factors !== 'asked'
    ? {}
    : {
        embedding_scale: f32(factors.embedding),
        residual_scale: f32(factors.blocks),
        'attention.scale': f32(factors.scores),
        logit_scale: f32(1 / factors.logits),
      };

/** Llama 3's scaling is a tensor there. */
function ropeFactors(config: ModelConfig): Tensor[] {
  if (config.ropeScaling?.type !== 'llama3') return [];
  const { ropeScaling: _, ...plain } = config;
  const scaled = ropeFrequencies(config);
  const factors = Float32Array.from(ropeFrequencies(plain), (frequency, i) => frequency / scaled[i]!);
  return [{ name: 'rope_freqs.weight', shape: [factors.length], type: 0, data: floats(factors) }];
}

/** `LlamaModel.permute` of convert_hf_to_gguf.py: reshape(heads, 2, D/2, columns).swapaxes(1, 2). */
function interleave(rows: Float32Array, heads: number, columns: number): Float32Array {
  const out = new Float32Array(rows.length);
  const size = rows.length / columns / heads;
  for (let h = 0; h < heads; h++)
    for (let j = 0; j < 2; j++)
      for (let i = 0; i < size / 2; i++) {
        const from = (h * size + j * (size / 2) + i) * columns;
        out.set(rows.subarray(from, from + columns), (h * size + 2 * i + j) * columns);
      }
  return out;
}

/** Families whose GGUF files say less than their config.json. */
export const canBeGguf = ({
  architecture,
  slidingWindow,
  layerCount,
  layersWithoutRope,
  factors,
  headSize,
}: ModelConfig): boolean => {
  const { ropelessEvery, ...family } = FAMILIES[architecture];
  if (family.factors === 'gemma')
    return slidingWindow !== undefined && Math.abs(factors!.scores ** 2 * headSize - 1) < 1e-9;
  const usual = layersWithoutRope?.every((layer) => (layer + 1) % ropelessEvery! === 0) ?? true;
  return usual && (slidingWindow === undefined || slidingWindow.layers.length === layerCount);
};

/** config.json of a random model, as transformers writes it. */
export function hubConfig(config: ModelConfig): Record<string, unknown> {
  const { ropeScaling } = config;
  return {
    model_type: config.architecture,
    hidden_size: config.hiddenSize,
    intermediate_size: config.ffnSize,
    num_hidden_layers: config.layerCount,
    num_attention_heads: config.headCount,
    num_key_value_heads: config.kvHeadCount,
    head_dim: config.headSize,
    vocab_size: config.vocabularySize,
    max_position_embeddings: config.contextTokens,
    rms_norm_eps: config.rmsEpsilon,
    rope_theta: config.ropeTheta,
    tie_word_embeddings: config.tiedEmbeddings,
    eos_token_id: 2,
    ...(config.slidingWindow && { sliding_window: config.slidingWindow.tokens }),
    ...(config.localRope && {
      rope_local_base_freq: config.localRope.theta,
      sliding_window_pattern: windowPattern(config),
    }),
    ...(config.factors && {
      // Each family reads its own.
      query_pre_attn_scalar: 1 / config.factors.scores ** 2,
      embedding_multiplier: config.factors.embedding,
      residual_multiplier: config.factors.blocks,
      attention_multiplier: config.factors.scores,
      logits_scaling: 1 / config.factors.logits,
    }),
    ...(ropeScaling?.type === 'llama3' && {
      rope_scaling: {
        rope_type: 'llama3',
        factor: ropeScaling.factor,
        low_freq_factor: ropeScaling.lowFrequencyFactor,
        high_freq_factor: ropeScaling.highFrequencyFactor,
        original_max_position_embeddings: ropeScaling.originalContextTokens,
      },
    }),
  };
}
