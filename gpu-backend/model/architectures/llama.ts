/**
 * The Llama decoder as all its graphs for serving have it: its weights in the weights file, and its layers from the embedding to
 * the logits. Each graph adds how a mask skips blocks, and how attention reads and writes K and V: under one mask
 * (`one-mask-llama.ts`), under many (`batched-llama.ts`), on a GPU (`webgpu-llama.ts`).
 *
 * Shapes: H = hidden, F = FFN width, N/G = query/KV heads, D = head width, V = vocabulary.
 *
 * Weights are initializers of the outer graph, not of the branches: only there does ONNX Runtime release the mapped file
 * after prepacking (130 MB of the default model).
 */
import type { Dimension, Value } from '../../onnx/graph.ts';
import { ELEMENT_TYPES, type GraphBuilder, MICROSOFT } from '../../onnx/graph.ts';
import type { KvType, ModelConfig } from '../model-source.ts';
import type { WeightRange } from '../weights-file.ts';
import { external } from '../weights-file.ts';
import {
  type Extras,
  type KeysValues,
  layerExtras,
  type RopeTable,
  type Rotary,
  type StoredExtras,
} from './attention-extras.ts';
import { constantRotation, rotated } from './column-products.ts';
import type { Linear, StoredEmbedding, StoredLinear, VocabularyMatrix } from './projections.ts';
import { headLogits, linear, multiply, storedRows } from './projections.ts';
import { streamBlock } from './rotation.ts';
import type { SkippedBlock, StoredSurrogate } from './surrogate.ts';

export type StoredLayer = StoredExtras & {
  /** Rows of Q (times 1/√D), K and V, one matrix `[(N + 2G)·D, H]`. */
  readonly qkv: StoredLinear;
  readonly output: StoredLinear;
  /** Rows of gate and up, one matrix `[2F, H]`. */
  readonly gateUp: StoredLinear;
  readonly down: StoredLinear;
  readonly attentionNorm: WeightRange;
  readonly ffnNorm: WeightRange;
  readonly postNorms?: { readonly attention: WeightRange; readonly ffn: WeightRange } | undefined;
  readonly surrogates?: { readonly attention: StoredSurrogate; readonly ffn: StoredSurrogate };
};

export type StoredLlama = {
  readonly layers: readonly StoredLayer[];
  readonly embedding: StoredEmbedding;
  readonly head: VocabularyMatrix;
  readonly finalNorm: WeightRange;
  /** cos and sin, `[context, D/2]` each. */
  readonly ropeCos: WeightRange;
  readonly ropeSin: WeightRange;
  /** The same of layers whose rotary embedding has a base of its own. */
  readonly localRope?: { readonly cos: WeightRange; readonly sin: WeightRange } | undefined;
};

/** Inputs and weights of a block, for all serving graphs; the weights are initializers of the outer graph. */
type BlockParts<Weights> = SkippedBlock & {
  /** The layer's. */
  readonly index: number;
  /** The residual stream before the block, normalized. */
  readonly x: Value;
  readonly weights: Weights;
  /** The block's output, from its last product. */
  readonly ended: (b: GraphBuilder, product: Value) => Value;
};
export type AttentionParts = BlockParts<{
  readonly qkv: Linear;
  /** Rows of K and V, for tokens whose attention is skipped. */
  readonly kv: Linear;
  readonly output: Linear;
}> & { readonly extras: Extras };
export type FfnParts = BlockParts<{ readonly gateUp: Linear; readonly down: Linear }>;

/** Each builds a block and returns its output, which `throughLayers` adds to the stream. */
type Blocks = { attention(parts: AttentionParts): Value; ffn(parts: FfnParts): Value };

/** The residual stream after the last block. */
export function throughLayers(
  g: GraphBuilder,
  config: ModelConfig,
  { layers }: StoredLlama,
  embedded: Value,
  blocks: Blocks,
): Value {
  const { headCount: N, kvHeadCount: G, headSize: D, hiddenSize: H } = config;
  // A block's output is added to the stream in the node that normalizes it for the next block.
  let residual = embedded;
  let output: Value | undefined;
  const before = (name: string, norm: WeightRange, matrix: StoredLinear) => {
    const weight = g.initializer(`${name}_norm`, 'f32', [H], external(norm));
    const [sum, x] = addAndNormalize(g, config, residual, output, weight);
    residual = sum;
    return { name, x, unweighted: withoutWeights(config, matrix, sum, x) };
  };
  layers.forEach((layer, index) => {
    const { qkv, gateUp, down, surrogates } = layer;
    const extras = layerExtras(g, config, index, layer);
    const behind = behindBlocks(g, config, index, layer);
    const named = (matrix: string, stored: StoredLinear) => linear(g, `layer_${index}.${matrix}`, stored);
    output = blocks.attention({
      index,
      ...before(`layer_${index}.attention`, layer.attentionNorm, qkv),
      weights: {
        qkv: named('qkv', qkv),
        kv: named('kv', storedRows(qkv, N * D, (N + 2 * G) * D)),
        output: named('output', layer.output),
      },
      extras,
      ended: (b, product) => behind.attention(b, extras.outputBiased(b, product)),
      surrogate: surrogates?.attention,
    });
    output = blocks.ffn({
      index,
      ...before(`layer_${index}.ffn`, layer.ffnNorm, gateUp),
      weights: { gateUp: named('gate_up', gateUp), down: named('down', down) },
      ended: behind.ffn,
      surrogate: surrogates?.ffn,
    });
  });
  return g.op('Add', [residual, output]);
}

/** The name of a norm behind a block in the graph. */
export const postNormName = (index: number, block: 'attention' | 'ffn'): string =>
  `layer_${index}.${block}_post_norm`;

/**
 * What comes between a block's last product and the stream in some families: a norm. Its weights do not commute with the rotation
 * of the stream, so the product is in the file's basis, and the graph rotates behind the norm. Weights are initializers of `g`.
 */
export function behindBlocks(
  g: GraphBuilder,
  config: ModelConfig,
  index: number,
  { postNorms, output }: Pick<StoredLayer, 'postNorms' | 'output'>,
): Record<'attention' | 'ffn', (b: GraphBuilder, product: Value) => Value> {
  if (postNorms === undefined) return { attention: (_, product) => product, ffn: (_, product) => product };
  const { hiddenSize: H } = config;
  const size = output.kind === 'f32' ? 1 : streamBlock(config);
  const rotation = size > 1 ? constantRotation(g, size) : undefined;
  const behind = (block: 'attention' | 'ffn') => {
    const weight = g.initializer(postNormName(index, block), 'f32', [H], external(postNorms[block]));
    return (b: GraphBuilder, product: Value) => {
      const x = b.op('SimplifiedLayerNormalization', [product, weight], normAttributes(config));
      return rotation ? rotated(b, x, H, rotation) : x;
    };
  };
  return { attention: behind('attention'), ffn: behind('ffn') };
}

/** Declares the output `logits` `[...rows, V]`, from `last` `[...rows, H]`. */
export function outputLogits(
  g: GraphBuilder,
  config: ModelConfig,
  stored: StoredLlama,
  last: Value,
  rows: readonly Dimension[],
): void {
  const norm = g.initializer('final_norm', 'f32', [config.hiddenSize], external(stored.finalNorm));
  const normalized = g.op('SimplifiedLayerNormalization', [last, norm], normAttributes(config));
  const logits = headLogits(g, normalized, stored.head);
  g.output(logits, 'f32', [...rows, config.vocabularySize]);
}

/** Initializers of the rotary tables. */
export function rotaryTables(
  g: GraphBuilder,
  { contextTokens, headSize }: ModelConfig,
  { ropeCos, ropeSin, localRope }: StoredLlama,
): Rotary['ropes'] {
  const table = (names: readonly [string, string], cos: WeightRange, sin: WeightRange): RopeTable => {
    const shape = [contextTokens, headSize / 2];
    return {
      cos: g.initializer(names[0], 'f32', shape, external(cos)),
      sin: g.initializer(names[1], 'f32', shape, external(sin)),
    };
  };
  return {
    global: table(ROPE_NAMES.global, ropeCos, ropeSin),
    local: localRope && table(ROPE_NAMES.local, localRope.cos, localRope.sin),
  };
}

/** The names of cos and sin in the graph. */
export const ROPE_NAMES = {
  global: ['rope_cos', 'rope_sin'],
  local: ['local_rope_cos', 'local_rope_sin'],
} as const;

/** Of the node `SimplifiedLayerNormalization`, the family's RMS norm. */
export const normAttributes = (config: ModelConfig) => ({ axis: -1, epsilon: { float: config.rmsEpsilon } });

/** In one node: the residual stream with the previous block's output added, and its RMS norm. */
function addAndNormalize(
  g: GraphBuilder,
  config: ModelConfig,
  residual: Value,
  branch: Value | undefined,
  weight: Value,
): [Value, Value] {
  if (branch === undefined)
    return [residual, g.op('SimplifiedLayerNormalization', [residual, weight], normAttributes(config))];
  const normalized = g.fresh('norm');
  const sum = g.fresh('residual');
  g.node(
    'SkipSimplifiedLayerNormalization',
    [residual, branch, weight],
    [normalized, '', '', sum],
    { epsilon: { float: config.rmsEpsilon } },
    MICROSOFT,
  );
  return [{ name: sum }, { name: normalized }];
}

/** The stream normalized without weights, the input of surrogates. It is `x` when the norm's weights are folded into matrices. */
function withoutWeights(
  config: ModelConfig,
  { kind }: StoredLinear,
  residual: Value,
  x: Value,
): (b: GraphBuilder) => Value {
  if (kind !== 'f32') return () => x;
  const ones = Array<number>(config.hiddenSize).fill(1);
  return (b) =>
    b.op(
      'SimplifiedLayerNormalization',
      [residual, b.constant('f32', [config.hiddenSize], ones)],
      normAttributes(config),
    );
}

/** K and V in the type of the cache. */
export const asKept = (b: GraphBuilder, kvType: KvType, { k, v }: KeysValues): KeysValues =>
  kvType === 'f32' ? { k, v } : { k: cast(b, k, kvType), v: cast(b, v, kvType) };

/** K and V in fp32 for attention, which has no fast kernels for halves on CPUs. */
export const asRead = (b: GraphBuilder, kvType: KvType, { k, v }: KeysValues): KeysValues =>
  kvType === 'f32' ? { k, v } : { k: cast(b, k, 'f32'), v: cast(b, v, 'f32') };

const cast = (b: GraphBuilder, value: Value, type: KvType): Value =>
  b.op('Cast', [value], { to: ELEMENT_TYPES[type] });

/** `x` `[..., H]`, normalized → `[..., H]`. */
export function feedForward(
  b: GraphBuilder,
  config: ModelConfig,
  x: Value,
  { weights: { gateUp, down }, ended }: Pick<FfnParts, 'weights' | 'ended'>,
): Value {
  const { ffnSize: F } = config;
  const [gate, up] = b.split(multiply(b, x, gateUp), [F, F], -1);
  return ended(b, multiply(b, b.op('Mul', [activate(b, config, gate!), up]), down));
}

/** The activation of an FFN, in one node. */
export const activate = (b: GraphBuilder, { activation }: ModelConfig, x: Value): Value =>
  activation === 'gelu-tanh'
    ? b.op('FastGelu', [x], {}, MICROSOFT)
    : // QuickGelu with alpha 1 is x·sigmoid(x), SiLU.
      b.op('QuickGelu', [x], { alpha: { float: 1 } }, MICROSOFT);
