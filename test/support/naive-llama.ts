/**
 * The naive reference: any family of decoders in plain loops, one token at a time, every K and V kept, nothing shared
 * with the engine. The mask may change from token to token.
 */

import type { ModelConfig, WeightSource } from '../../gpu-backend/model/model-source.ts';
import { localRopeConfig, ropeFrequencies } from '../../gpu-backend/model/rope.ts';
import type { SurrogateTable } from '../../gpu-backend/model/surrogates.ts';
import type { Mask } from '../../shared/mask/mask.ts';

type Layer = Record<'q' | 'k' | 'v' | 'o' | 'gate' | 'up' | 'down' | 'norm1' | 'norm2', Float32Array> &
  Partial<Record<'qBias' | 'kBias' | 'vBias' | 'oBias' | 'qNorm' | 'kNorm' | 'end1' | 'end2', Float32Array>>;

type NaiveLlama = {
  /** Logits `[V]` after `tokenId`. `watch` sees the residual stream before each block, and after the last. */
  next(tokenId: number, mask: Mask, watch?: (stream: Float64Array) => void): Float64Array;
};

/** `table`: what masks with surrogates replace skipped blocks by. `asKept`: what becomes of each number of K and V. */
export async function naiveLlama(
  source: WeightSource,
  table?: SurrogateTable,
  asKept: (value: number) => number = (value) => value,
): Promise<NaiveLlama> {
  const { config } = source;
  const read = (name: string) => source.read(`model.${name}.weight`);
  const layers: Layer[] = [];
  for (let i = 0; i < config.layerCount; i++) {
    const at = (name: string) => read(`layers.${i}.${name}`);
    const attention = (name: string) => source.read(`model.layers.${i}.self_attn.${name}`);
    layers.push({
      ...(config.attentionBias && {
        qBias: await attention('q_proj.bias'),
        kBias: await attention('k_proj.bias'),
        vBias: await attention('v_proj.bias'),
      }),
      ...(config.attentionBias === 'qkvo' && { oBias: await attention('o_proj.bias') }),
      ...(config.headNorms && {
        qNorm: await attention('q_norm.weight'),
        kNorm: await attention('k_norm.weight'),
      }),
      ...(config.postNorms && { end1: await at('self_attn.post_norm'), end2: await at('mlp.post_norm') }),
      q: await at('self_attn.q_proj'),
      k: await at('self_attn.k_proj'),
      v: await at('self_attn.v_proj'),
      o: await at('self_attn.o_proj'),
      gate: await at('mlp.gate_proj'),
      up: await at('mlp.up_proj'),
      down: await at('mlp.down_proj'),
      norm1: await at('input_layernorm'),
      norm2: await at('post_attention_layernorm'),
    });
  }
  const embedding = await read('embed_tokens');
  const head = config.tiedEmbeddings ? embedding : await source.read('lm_head.weight');
  const finalNorm = await read('norm');
  const cache = layers.map(() => ({ k: [] as Float64Array[], v: [] as Float64Array[] }));
  return {
    next(tokenId, mask, watch = () => {}) {
      const position = cache[0]!.k.length;
      const H = config.hiddenSize;
      const x = Float64Array.from(embedding.subarray(tokenId * H, (tokenId + 1) * H));
      const replace = (block: number) => {
        if (mask.surrogates !== undefined) surrogate(config, table!, block, x, position);
      };
      layers.forEach((layer, i) => {
        const runs = mask.runs[2 * i] === 1;
        const before = x.slice();
        watch(x);
        attention(config, layer, i, { ...cache[i]!, asKept }, x, position, runs);
        if (!runs) {
          x.set(before);
          replace(2 * i);
        }
        watch(x);
        if (mask.runs[2 * i + 1] === 1) ffn(config, layer, x);
        else replace(2 * i + 1);
      });
      watch(x);
      return product(head, normalize(x, finalNorm, config.rmsEpsilon));
    },
  };
}

function attention(
  config: ModelConfig,
  layer: Layer,
  index: number,
  cache: { k: Float64Array[]; v: Float64Array[]; asKept: (value: number) => number },
  x: Float64Array,
  position: number,
  runs: boolean,
): void {
  const { headCount: N, kvHeadCount: G, headSize: D } = config;
  const normalized = normalize(x, layer.norm1, config.rmsEpsilon);
  const turned = (x: Float64Array, norm: Float32Array | undefined) => {
    const normed = norm === undefined ? x : normalizeHeads(x, norm, config);
    if (config.layersWithoutRope?.includes(index)) return normed;
    const { localRope } = config;
    return rotate(
      localRope?.layers.includes(index) ? localRopeConfig(config, localRope) : config,
      normed,
      position,
    );
  };
  cache.k.push(turned(biased(product(layer.k, normalized), layer.kBias), layer.kNorm).map(cache.asKept));
  cache.v.push(biased(product(layer.v, normalized), layer.vBias).map(cache.asKept));
  if (!runs) return;
  const q = turned(biased(product(layer.q, normalized), layer.qBias), layer.qNorm);
  const { slidingWindow } = config;
  const first = slidingWindow?.layers.includes(index) ? Math.max(0, position + 1 - slidingWindow.tokens) : 0;
  const attended = new Float64Array(N * D);
  for (let head = 0; head < N; head++) {
    const group = Math.floor((head * G) / N);
    const scores = cache.k.slice(first).map((k) => {
      let dot = 0;
      for (let i = 0; i < D; i++) dot += q[head * D + i]! * k[group * D + i]!;
      return dot / Math.sqrt(D);
    });
    const best = Math.max(...scores);
    const weights = scores.map((score) => Math.exp(score - best));
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    weights.forEach((weight, at) => {
      for (let i = 0; i < D; i++)
        attended[head * D + i]! += (weight / total) * cache.v[first + at]![group * D + i]!;
    });
  }
  const output = biased(product(layer.o, attended), layer.oBias);
  ended(output, layer.end1, config).forEach((value, i) => {
    x[i]! += value;
  });
}

function ffn(config: ModelConfig, layer: Layer, x: Float64Array): void {
  const normalized = normalize(x, layer.norm2, config.rmsEpsilon);
  const up = product(layer.up, normalized);
  const activation = config.activation === 'gelu-tanh' ? gelu : (g: number) => g / (1 + Math.exp(-g));
  const hidden = product(layer.gate, normalized).map((g, i) => activation(g) * up[i]!);
  ended(product(layer.down, hidden), layer.end2, config).forEach((value, i) => {
    x[i]! += value;
  });
}

const gelu = (x: number): number =>
  (x / 2) * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));

const ended = (x: Float64Array, norm: Float32Array | undefined, { rmsEpsilon }: ModelConfig): Float64Array =>
  norm === undefined ? x : normalize(x, norm, rmsEpsilon);

function surrogate(
  config: ModelConfig,
  { a, b, bias, first, hiddenSize: H, rank }: SurrogateTable,
  block: number,
  x: Float64Array,
  position: number,
): void {
  const normalized = normalize(x, new Float32Array(H).fill(1), config.rmsEpsilon);
  for (let j = 0; j < H; j++) {
    let sum = bias[block * H + j]!;
    for (let k = 0; k < rank; k++) {
      let inner = 0;
      for (let i = 0; i < H; i++) inner += normalized[i]! * a[(block * H + i) * rank + k]!;
      sum += inner * b[(block * rank + k) * H + j]!;
    }
    x[j]! += position === 0 ? first[block * H + j]! : sum;
  }
}

function normalize(x: Float64Array, weight: Float32Array, epsilon: number): Float64Array {
  const meanSquare = x.reduce((sum, value) => sum + value * value, 0) / x.length;
  return x.map((value, i) => (value / Math.sqrt(meanSquare + epsilon)) * weight[i]!);
}

const biased = (x: Float64Array, bias: Float32Array | undefined): Float64Array =>
  bias === undefined ? x : x.map((value, i) => value + bias[i]!);

function normalizeHeads(
  x: Float64Array,
  norm: Float32Array,
  { headSize, rmsEpsilon }: ModelConfig,
): Float64Array {
  const out = x.slice();
  for (let start = 0; start < x.length; start += headSize) {
    out.set(normalize(x.subarray(start, start + headSize), norm, rmsEpsilon), start);
  }
  return out;
}

/** Half-split rotary embedding of every head. */
function rotate(config: ModelConfig, x: Float64Array, position: number): Float64Array {
  const half = config.headSize / 2;
  const frequencies = ropeFrequencies(config);
  const factor = config.ropeScaling?.type === 'yarn' ? config.ropeScaling.attentionFactor : 1;
  const out = x.slice();
  for (let start = 0; start < x.length; start += config.headSize) {
    for (let i = 0; i < half; i++) {
      const angle = position * frequencies[i]!;
      const [cos, sin] = [factor * Math.cos(angle), factor * Math.sin(angle)];
      const [a, b] = [x[start + i]!, x[start + half + i]!];
      out[start + i] = a * cos - b * sin;
      out[start + half + i] = b * cos + a * sin;
    }
  }
  return out;
}

/** `matrix` is `[out, in]`. */
function product(matrix: Float32Array, x: Float64Array): Float64Array {
  const out = new Float64Array(matrix.length / x.length);
  for (let row = 0; row < out.length; row++) {
    let sum = 0;
    for (let i = 0; i < x.length; i++) sum += matrix[row * x.length + i]! * x[i]!;
    out[row] = sum;
  }
  return out;
}
