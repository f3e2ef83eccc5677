/**
 * The parts of a decoder layer as graphs of their own, with the weights as inputs. So the inputs of each matrix are known
 * before it is quantized, and its outputs can be computed with the quantized matrix. The same graphs serve all layers.
 *
 * Shapes: B sequences of S tokens, T = B·S, H = hidden, F = FFN width, N/G = query/KV heads, D = head width.
 */
import { encodeModel } from '../../onnx/encode.ts';
import { GraphBuilder, MICROSOFT, type Value } from '../../onnx/graph.ts';
import { createSession, type Feeds, floats, type Session, tensor } from '../../onnx/session.ts';
import {
  type ExtraWeights,
  layerExtras,
  queriesKeysValues,
  ropeOf,
  windowMask,
} from '../architectures/attention-extras.ts';
import { constantRotation, rotated } from '../architectures/column-products.ts';
import { activate, normAttributes } from '../architectures/llama.ts';
import type { Basis, Matrix } from '../architectures/rotation.ts';
import type { LayerMatrices } from '../matrices.ts';
import type { ModelConfig } from '../model-source.ts';
import { localRopeConfig, ropeTables } from '../rope.ts';

export type LayerSteps = AsyncDisposable & {
  /** `[T, H]` → its RMS norm. */
  normalize(h: Float32Array, norm: Float32Array): Promise<Float32Array>;
  /** Normalized `[T, H]` → the heads' outputs, `[T, N·D]`. */
  attend(x: Float32Array, layer: AttentionLayer, qkv: Matrix): Promise<Float32Array>;
  /** Normalized `[T, H]` → activation(gate)·up, `[T, F]`, rotated as the basis says. */
  activate(x: Float32Array, gateUp: Matrix): Promise<Float32Array>;
  /** h + x·Wᵀ + bias, `[T, H]`; with a `postNorm`, h + its norm, rotated as the basis says. */
  add(h: Float32Array, x: Float32Array, matrix: Matrix, end?: End): Promise<Float32Array>;
  /** Σ_t weight_t · x_t·x_tᵀ, `[K, K]`; weights `[T]`. */
  moments(x: Float32Array, weights: Float32Array): Promise<Float32Array>;
};

/** What is behind a block's last product. */
type End = {
  readonly bias?: Float32Array | undefined;
  readonly postNorm?: Float32Array | undefined;
};

/** The ends of a layer's blocks. */
export const endsOfBlocks = ({
  extras,
  postNorms,
}: Pick<LayerMatrices, 'extras' | 'postNorms'>): Record<'attention' | 'ffn', End> => ({
  attention: { bias: extras.outputBias, postNorm: postNorms?.attention },
  ffn: { postNorm: postNorms?.ffn },
});

type AttentionLayer = Pick<LayerMatrices, 'index' | 'extras'>;

export async function openLayerSteps(
  config: ModelConfig,
  basis: Basis,
  sequenceTokens: number,
  threads: number,
): Promise<LayerSteps> {
  const { hiddenSize: H, ffnSize: F, headSize: D } = config;
  const open = (build: (g: GraphBuilder) => void) => openGraph(build, threads);
  const sessions = await Promise.all([
    open(normalizeGraph(config)),
    open(activateGraph(config, basis.inside(F))),
    open(addGraph(config, basis)),
    open(momentsGraph),
  ]);
  const [normalize, activate, add, moments] = sessions as [Session, Session, Session, Session];
  // Extras of attention differ between layers, so each layer has its own graph, without matrices.
  const attentions = new Map<number, Promise<Session>>();
  const attentionOf = ({ index, extras }: AttentionLayer): Promise<Session> => {
    const session = attentions.get(index) ?? open(attendGraph(config, index, extras));
    attentions.set(index, session);
    return session;
  };
  const noBias = new Float32Array(H);
  const S = sequenceTokens;
  const short = { ...config, contextTokens: S };
  const tables = {
    global: ropeTables(short),
    local: config.localRope && ropeTables(localRopeConfig(short, config.localRope)),
  };
  const positions = BigInt64Array.from({ length: S }, (_, i) => BigInt(i));
  const half = D / 2;
  const table = (values: Float32Array) => tensor('f32', values, [S, half]);
  const rows = (x: Float32Array, width: number) => tensor('f32', x, [x.length / width, width]);
  const weights = ({ rows: values, outputs, inputs }: Matrix) => tensor('f32', values, [outputs, inputs]);
  return {
    normalize: (h, norm) => run(normalize, { h: rows(h, H), norm: tensor('f32', norm, [H]) }),
    async attend(x, layer, qkv) {
      const B = x.length / H / S;
      const all = BigInt64Array.from({ length: B * S }, (_, i) => positions[i % S]!);
      const [cos, sin] = tables[ropeOf(config, layer.index) ?? 'global']!;
      return run(await attentionOf(layer), {
        x: tensor('f32', x, [B, S, H]),
        w: weights(qkv),
        positions: tensor('i64', all, [B, S]),
        order: tensor('i64', positions, [1, S]),
        cos: table(cos),
        sin: table(sin),
      });
    },
    activate: (x, gateUp) => run(activate, { x: rows(x, H), w: weights(gateUp) }),
    add: (h, x, matrix, { bias = noBias, postNorm } = {}) =>
      run(add, {
        h: rows(h, H),
        x: rows(x, matrix.inputs),
        w: weights(matrix),
        bias: tensor('f32', bias, [H]),
        ...(postNorm && { norm: tensor('f32', postNorm, [H]) }),
      }),
    moments: (x, share) =>
      run(moments, { x: rows(x, x.length / share.length), share: tensor('f32', share, [share.length, 1]) }),
    async [Symbol.asyncDispose]() {
      for (const session of [...sessions, ...(await Promise.all(attentions.values()))])
        await session.release();
    },
  };
}

async function openGraph(build: (g: GraphBuilder) => void, threads: number): Promise<Session> {
  const g = new GraphBuilder('layer');
  build(g);
  return createSession(encodeModel(g.graph), { threads, spinning: false });
}

const run = async (session: Session, feeds: Feeds): Promise<Float32Array> =>
  floats((await session.run(feeds, ['y'])).y!);

const product = (g: GraphBuilder, x: Value, w: Value): Value =>
  g.op('FusedMatMul', [x, w], { transB: 1 }, MICROSOFT);

function result(g: GraphBuilder, op: string, inputs: Value[], attributes = {}, domain = ''): void {
  g.node(op, inputs, ['y'], attributes, domain);
  g.output({ name: 'y' }, 'f32', ['T', 'Y']);
}

const normalizeGraph =
  (config: ModelConfig) =>
  (g: GraphBuilder): void =>
    result(
      g,
      'SimplifiedLayerNormalization',
      [g.input('h', 'f32', ['T', config.hiddenSize]), g.input('norm', 'f32', [config.hiddenSize])],
      normAttributes(config),
    );

const attendGraph =
  (config: ModelConfig, index: number, weights: ExtraWeights) =>
  (g: GraphBuilder): void => {
    const { hiddenSize: H, headCount: N, kvHeadCount: G, headSize: D } = config;
    const extras = layerExtras(g, config, index, weights);
    const x = g.input('x', 'f32', ['B', 'S', H]);
    const qkv = product(g, x, g.input('w', 'f32', [(N + 2 * G) * D, H]));
    const table = (name: string) => g.input(name, 'f32', ['S', D / 2]);
    // The caller feeds the table of this layer.
    const own = { cos: table('cos'), sin: table('sin') };
    const shared = { config, ropes: { global: own, local: own } };
    const { q, k, v } = queriesKeysValues(g, shared, extras, qkv, g.input('positions', 'i64', ['B', 'S']));
    const { window } = extras;
    const order = g.input('order', 'i64', [1, 'S']);
    const mask = window && windowMask(g, window, order, k);
    // Rows of Q carry 1/√D.
    const attributes = { q_num_heads: N, kv_num_heads: G, is_causal: 1, scale: { float: 1 } };
    const attended = g.op('Attention', [q, k, v, mask || undefined], attributes);
    result(g, 'Reshape', [attended, g.ints(-1, N * D)]);
  };

const activateGraph =
  (config: ModelConfig, size: number) =>
  (g: GraphBuilder): void => {
    const { ffnSize: F } = config;
    const gateUp = product(g, g.input('x', 'f32', ['T', 'H']), g.input('w', 'f32', [2 * F, 'H']));
    const [gate, up] = g.split(gateUp, [F, F], -1);
    const activated = g.op('Mul', [activate(g, config, gate!), up!]);
    result(g, 'Identity', [rotated(g, activated, F, constantRotation(g, size), 1)]);
  };

const addGraph =
  (config: ModelConfig, { stream }: Basis) =>
  (g: GraphBuilder): void => {
    const { hiddenSize: H, postNorms } = config;
    const x = product(g, g.input('x', 'f32', ['T', 'K']), g.input('w', 'f32', [H, 'K']));
    const biased = g.op('Add', [x, g.input('bias', 'f32', [H])]);
    const ended = () => {
      const inputs = [biased, g.input('norm', 'f32', [H])];
      const normed = g.op('SimplifiedLayerNormalization', inputs, normAttributes(config));
      return rotated(g, normed, H, constantRotation(g, stream), 1);
    };
    result(g, 'Add', [g.input('h', 'f32', ['T', H]), postNorms ? ended() : biased]);
  };

const momentsGraph = (g: GraphBuilder): void => {
  const x = g.input('x', 'f32', ['T', 'K']);
  const shared = g.op('Mul', [x, g.input('share', 'f32', ['T', 1])]);
  result(g, 'FusedMatMul', [shared, x], { transA: 1 }, MICROSOFT);
};

/* Products of large matrices in memory, by ONNX Runtime: a loop in JavaScript takes thirty times as long. */

export type Products = AsyncDisposable & {
  /** a·bᵀ: `[N, K]`, `[B, K]` → `[N, B]`. */
  multiply(a: Float32Array, b: Float32Array, K: number): Promise<Float32Array>;
};

export async function openProducts(threads: number): Promise<Products> {
  const g = new GraphBuilder('products');
  const [a, b] = [g.input('a', 'f32', ['N', 'K']), g.input('b', 'f32', ['B', 'K'])];
  g.node('FusedMatMul', [a, b], ['c'], { transB: 1 }, MICROSOFT);
  g.output({ name: 'c' }, 'f32', ['N', 'B']);
  const session = await createSession(encodeModel(g.graph), { threads, spinning: false });
  return {
    async multiply(x, y, K) {
      const feeds = {
        a: tensor('f32', x, [x.length / K, K]),
        b: tensor('f32', y, [y.length / K, K]),
      };
      return floats((await session.run(feeds, ['c'])).c!);
    },
    [Symbol.asyncDispose]: () => session.release(),
  };
}
