/**
 * What some families add to a Llama's attention: biases, norms over the heads of Q and K, layers without rotary embedding,
 * sliding windows. This file stores the extra weights, reads them back, and adds them to a graph. The graphs of serving
 * and of learning share it.
 *
 * Shapes: N/G = query/KV heads, D = head width, H = hidden, S = tokens, T = keys.
 */
import { type GraphBuilder, type InitializerData, MICROSOFT, type Value } from '../../onnx/graph.ts';
import type { ModelConfig, WeightSource } from '../model-source.ts';
import { external, slice, type WeightRange, type WeightsFile } from '../weights-file.ts';
import { type Basis, rotateOutputs } from './rotation.ts';

/** All fp32, in memory or in the weights file. */
type ExtrasIn<Place> = {
  /** `[(N + 2G)·D]`, like the rows of QKV: Q's are multiplied by {@link queryScale}. */
  readonly qkvBias?: Place;
  /** `[H]`, in the basis of the stream. */
  readonly outputBias?: Place;
  /** Weights of the norms of each head of Q, then of K, `[N + G, D]`; Q's are multiplied by 1/√D. */
  readonly headNorms?: Place;
};
export type ExtraWeights = ExtrasIn<Float32Array>;
export type StoredExtras = ExtrasIn<WeightRange>;

/**
 * The factor on the rows of Q, so that scores need no scale: 1/√D. It is 1 when a norm follows, which would undo the
 * factor; then the norm's weights have it.
 */
export const queryScale = ({ headSize, headNorms }: ModelConfig): number =>
  headNorms ? 1 : 1 / Math.sqrt(headSize);

/** Reads the extra weights of layer `index`; empty for a plain Llama. */
export async function readExtras(source: WeightSource, basis: Basis, index: number): Promise<ExtraWeights> {
  const { attentionBias, headNorms, headCount, kvHeadCount, headSize, hiddenSize } = source.config;
  const read = (name: string) => source.read(`model.layers.${index}.self_attn.${name}`);
  const scaled = (values: Float32Array, scale: number) => values.map((value) => value * scale);
  const extras: { -readonly [Name in keyof ExtraWeights]: ExtraWeights[Name] } = {};
  if (attentionBias !== undefined) {
    const q = scaled(await read('q_proj.bias'), queryScale(source.config));
    const v = await read('v_proj.bias');
    rotateOutputs(v, 1, basis.inside(headSize));
    extras.qkvBias = joined([q, await read('k_proj.bias'), v]);
  }
  if (attentionBias === 'qkvo') {
    const rows = await read('o_proj.bias');
    extras.outputBias = basis.writes({ rows, outputs: hiddenSize, inputs: 1 }).rows;
  }
  if (headNorms) {
    const q = scaled(await read('q_norm.weight'), 1 / Math.sqrt(headSize));
    const k = await read('k_norm.weight');
    const heads = [...Array<Float32Array>(headCount).fill(q), ...Array<Float32Array>(kvHeadCount).fill(k)];
    extras.headNorms = joined(heads);
  }
  return extras;
}

export const storeExtras = (file: WeightsFile, extras: ExtraWeights): StoredExtras =>
  Object.fromEntries(Object.entries(extras).map(([name, values]) => [name, file.append(values)]));

/** `count` values from index `start` on. */
function dataOf(values: WeightRange | Float32Array, start: number, count: number): InitializerData {
  if (!(values instanceof Float32Array)) return external(slice(values, 4 * start, 4 * count));
  const part = values.slice(start, start + count);
  return { kind: 'inline', bytes: new Uint8Array(part.buffer) };
}

function joined(parts: readonly Float32Array[]): Float32Array {
  const out = new Float32Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    out.set(part, at);
    at += part.length;
  }
  return out;
}

const NAMES = { qkvBias: 'qkv_bias', outputBias: 'output_bias', headNorms: 'head_norms' } as const;

/** Reads back from a graph what {@link storeExtras} returned. `find`: the range of a tensor by its name, if it is there. */
export function findExtras(index: number, find: (name: string) => WeightRange | undefined): StoredExtras {
  const found = Object.entries(NAMES).map(([key, name]) => [key, find(`layer_${index}.${name}`)]);
  return Object.fromEntries(found.filter(([, range]) => range !== undefined));
}

/** The heads in a tensor `[..., heads·D]`, as a range of all heads in the order Q, K, V. */
export type Heads = { readonly from: number; readonly count: number };

/** The extras of one layer, in a graph. */
export type Extras = {
  /** Adds the biases of these heads to their product. */
  biased(b: GraphBuilder, product: Value, heads: Heads): Value;
  /** Normalizes each head of Q and K. */
  normed(b: GraphBuilder, product: Value, heads: Heads): Value;
  outputBiased(b: GraphBuilder, product: Value): Value;
  /** Whether `normed` does anything. */
  readonly hasNorms: boolean;
  /** The table of its rotary embedding, if it has any. */
  readonly rope: RopeKind | undefined;
  /** Tokens of the sliding window; undefined: queries see all tokens before them. */
  readonly window: number | undefined;
};

/** Tensors become initializers of the outer graph `g` when they are first used. */
export function layerExtras(
  g: GraphBuilder,
  config: ModelConfig,
  index: number,
  stored: StoredExtras | ExtraWeights,
): Extras {
  const { headCount: N, kvHeadCount: G, headSize: D, hiddenSize: H } = config;
  const layer = `layer_${index}`;
  const { outputBias } = stored;
  const named = new Map<string, Value>();
  /** The initializer with these heads of a tensor of `all` heads. */
  const part = (
    values: WeightRange | Float32Array,
    name: string,
    all: number,
    { from, count }: Heads,
    shape: number[],
  ): Value => {
    const full = from === 0 && count === all ? `${layer}.${name}` : `${layer}.${name}_${from}_${count}`;
    const known = named.get(full);
    if (known !== undefined) return known;
    const made = g.initializer(full, 'f32', shape, dataOf(values, from * D, count * D));
    named.set(full, made);
    return made;
  };
  return {
    biased(b, product, heads) {
      const { qkvBias } = stored;
      if (qkvBias === undefined) return product;
      return b.op('Add', [product, part(qkvBias, NAMES.qkvBias, N + 2 * G, heads, [heads.count * D])]);
    },
    normed(b, product, heads) {
      const { headNorms } = stored;
      if (headNorms === undefined) return product;
      const apart = b.reshape(product, 0, 0, heads.count, D);
      const even = b.op(
        'SimplifiedLayerNormalization',
        [apart, b.constant('f32', [D], Array<number>(D).fill(1))],
        {
          axis: -1,
          epsilon: { float: config.rmsEpsilon },
        },
      );
      const weighted = b.op('Mul', [even, part(headNorms, NAMES.headNorms, N + G, heads, [heads.count, D])]);
      return b.reshape(weighted, 0, 0, heads.count * D);
    },
    outputBiased(b, product) {
      if (outputBias === undefined) return product;
      const name = `${layer}.${NAMES.outputBias}`;
      const bias = named.get(name) ?? g.initializer(name, 'f32', [H], dataOf(outputBias, 0, H));
      named.set(name, bias);
      return b.op('Add', [product, bias]);
    },
    hasNorms: stored.headNorms !== undefined,
    rope: ropeOf(config, index),
    window: config.slidingWindow?.layers.includes(index) ? config.slidingWindow.tokens : undefined,
  };
}

/** Which of a model's rotary tables a layer uses; `local` is the table of layers with a base of their own. */
export type RopeKind = 'global' | 'local';

export function ropeOf({ layersWithoutRope, localRope }: ModelConfig, index: number): RopeKind | undefined {
  if (layersWithoutRope?.includes(index)) return undefined;
  return localRope?.layers.includes(index) ? 'local' : 'global';
}

export type KeysValues = { readonly k: Value; readonly v: Value };

/** cos and sin, `[context, D/2]` each. */
export type RopeTable = { readonly cos: Value; readonly sin: Value };
/** The inputs of rotary embedding in any graph. */
export type Rotary = {
  readonly config: ModelConfig;
  /** `local` is missing where no layer uses it. */
  readonly ropes: { readonly global: RopeTable; readonly local?: RopeTable | undefined };
};

export const ropeTable = ({ ropes }: Rotary, kind: RopeKind): RopeTable => ropes[kind]!;

/** Rotary embedding of `x` `[B, S, heads·D]`, half-split order; returns `x` in a layer without rotary embedding. */
const rotate = (
  b: GraphBuilder,
  shared: Rotary,
  extras: Extras,
  x: Value,
  positions: Value,
  heads: number,
): Value => {
  if (extras.rope === undefined) return x;
  const { cos, sin } = ropeTable(shared, extras.rope);
  const attributes = { num_heads: heads, rotary_embedding_dim: shared.config.headSize, interleaved: 0 };
  return b.op('RotaryEmbedding', [x, positions, cos, sin], attributes, MICROSOFT);
};

/** From the product with QKV: Q `[B, S, N·D]`, K and V `[B, S, G·D]`, ready for attention. */
export function queriesKeysValues(
  b: GraphBuilder,
  shared: Rotary,
  extras: Extras,
  product: Value,
  positions: Value,
): KeysValues & { readonly q: Value } {
  const { headCount: N, kvHeadCount: G, headSize: D } = shared.config;
  const all = extras.biased(b, product, { from: 0, count: N + 2 * G });
  const [qk, v] = b.split(all, [(N + G) * D, G * D], -1);
  const normed = extras.normed(b, qk!, { from: 0, count: N + G });
  const rotated = rotate(b, shared, extras, normed, positions, N + G);
  const [q, k] = b.split(rotated, [N * D, G * D], -1);
  return { q: q!, k: k!, v: v! };
}

/** From the product with the rows of K and V: K and V alone, which tokens need whose attention is skipped. */
export function keysValues(
  b: GraphBuilder,
  shared: Rotary,
  extras: Extras,
  product: Value,
  positions: Value,
): KeysValues {
  const { headCount: N, kvHeadCount: G, headSize: D } = shared.config;
  const both = extras.biased(b, product, { from: N, count: 2 * G });
  const [k, v] = b.split(both, [G * D, G * D], -1);
  const normed = extras.normed(b, k!, { from: N, count: G });
  return { k: rotate(b, shared, extras, normed, positions, G), v: v! };
}

/**
 * `[S, T]` bool: the keys inside each query's sliding window. `positions` `[1, S]`: of the queries; `keys` `[1, T, …]`
 * begin at position 0. Keys after a query are not excluded here; attention is causal.
 */
export function windowMask(b: GraphBuilder, window: number, positions: Value, keys: Value): Value {
  const scalar = (value: number) => b.constant('i64', [], [value]);
  const count = b.op('Squeeze', [b.op('Shape', [keys], { start: 1, end: 2 })]);
  const keyPositions = b.op('Range', [scalar(0), count, scalar(1)]);
  const column = b.op('Transpose', [positions], { perm: [1, 0] });
  return b.op('Greater', [keyPositions, b.op('Sub', [column, scalar(window)])]);
}
