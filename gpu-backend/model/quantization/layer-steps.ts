/**
 * One decoder layer in pieces, with its weights as inputs: what goes into each matrix of a layer can be seen before the
 * matrix is quantized, and what comes out of it afterwards. The same few graphs serve all layers.
 *
 * Shapes: B sequences of S tokens, T = B·S, H = hidden, F = FFN width, N/G = query/KV heads, D = head width.
 */
import { encodeModel } from '../../onnx/encode.ts';
import { GraphBuilder, MICROSOFT, type Value } from '../../onnx/graph.ts';
import { createSession, type Feeds, floats, type Session, tensor } from '../../onnx/session.ts';
import type { Matrix } from '../architectures/rotation.ts';
import { ropeTables } from '../matrices.ts';
import type { LlamaConfig } from '../model-source.ts';

export type LayerSteps = AsyncDisposable & {
  /** `[T, H]` → its RMS norm. */
  normalize(h: Float32Array, norm: Float32Array): Promise<Float32Array>;
  /** Normalized `[T, H]` → what the heads give, `[T, N·D]`. */
  attend(x: Float32Array, qkv: Matrix): Promise<Float32Array>;
  /** Normalized `[T, H]` → silu(gate)·up, `[T, F]`. */
  activate(x: Float32Array, gateUp: Matrix): Promise<Float32Array>;
  /** h + x·Wᵀ, `[T, H]`. */
  add(h: Float32Array, x: Float32Array, matrix: Matrix): Promise<Float32Array>;
  /** Σ_t weight_t · x_t·x_tᵀ, `[K, K]`; weights `[T]`. */
  moments(x: Float32Array, weights: Float32Array): Promise<Float32Array>;
};

export async function openLayerSteps(
  config: LlamaConfig,
  sequenceTokens: number,
  threads: number,
): Promise<LayerSteps> {
  const { hiddenSize: H, ffnSize: F, headSize: D } = config;
  const open = (build: (g: GraphBuilder) => void) => openGraph(build, threads);
  const sessions = await Promise.all([
    open(normalizeGraph(config)),
    open(attendGraph(config)),
    open(activateGraph(F)),
    open(addGraph),
    open(momentsGraph),
  ]);
  const [normalize, attend, activate, add, moments] = sessions as [
    Session,
    Session,
    Session,
    Session,
    Session,
  ];
  const S = sequenceTokens;
  const [cos, sin] = ropeTables({ ...config, contextTokens: S });
  const positions = BigInt64Array.from({ length: S }, (_, i) => BigInt(i));
  const half = D / 2;
  const table = (values: Float32Array) => tensor('f32', values, [S, half]);
  const rows = (x: Float32Array, width: number) => tensor('f32', x, [x.length / width, width]);
  const weights = ({ rows: values, outputs, inputs }: Matrix) => tensor('f32', values, [outputs, inputs]);
  return {
    normalize: (h, norm) => run(normalize, { h: rows(h, H), norm: tensor('f32', norm, [H]) }),
    attend(x, qkv) {
      const B = x.length / H / S;
      const all = BigInt64Array.from({ length: B * S }, (_, i) => positions[i % S]!);
      return run(attend, {
        ...{ x: tensor('f32', x, [B, S, H]), w: weights(qkv) },
        ...{ positions: tensor('i64', all, [B, S]), cos: table(cos), sin: table(sin) },
      });
    },
    activate: (x, gateUp) => run(activate, { x: rows(x, H), w: weights(gateUp) }),
    add: (h, x, matrix) => run(add, { h: rows(h, H), x: rows(x, matrix.inputs), w: weights(matrix) }),
    moments: (x, share) =>
      run(moments, { x: rows(x, x.length / share.length), share: tensor('f32', share, [share.length, 1]) }),
    async [Symbol.asyncDispose]() {
      for (const session of sessions) await session.release();
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
  ({ hiddenSize: H, rmsEpsilon }: LlamaConfig) =>
  (g: GraphBuilder): void =>
    result(g, 'SimplifiedLayerNormalization', [g.input('h', 'f32', ['T', H]), g.input('norm', 'f32', [H])], {
      axis: -1,
      epsilon: { float: rmsEpsilon },
    });

const attendGraph =
  ({ hiddenSize: H, headCount: N, kvHeadCount: G, headSize: D }: LlamaConfig) =>
  (g: GraphBuilder): void => {
    const x = g.input('x', 'f32', ['B', 'S', H]);
    const qkv = product(g, x, g.input('w', 'f32', [(N + 2 * G) * D, H]));
    const positions = g.input('positions', 'i64', ['B', 'S']);
    const [cos, sin] = ['cos', 'sin'].map((name) => g.input(name, 'f32', ['S', D / 2]));
    const sizes = g.constant('i64', [3], [N * D, G * D, G * D]);
    const [q, k, v] = g.ops('Split', [qkv, sizes], 3, { axis: -1 });
    const rotate = (value: Value, heads: number) =>
      g.op(
        'RotaryEmbedding',
        [value, positions, cos, sin],
        { num_heads: heads, rotary_embedding_dim: D, interleaved: 0 },
        MICROSOFT,
      );
    // Rows of Q carry 1/√D.
    const attributes = { q_num_heads: N, kv_num_heads: G, is_causal: 1, scale: { float: 1 } };
    const attended = g.op('Attention', [rotate(q!, N), rotate(k!, G), v], attributes);
    result(g, 'Reshape', [attended, g.constant('i64', [2], [-1, N * D])]);
  };

const activateGraph =
  (F: number) =>
  (g: GraphBuilder): void => {
    const gateUp = product(g, g.input('x', 'f32', ['T', 'H']), g.input('w', 'f32', [2 * F, 'H']));
    const [gate, up] = g.ops('Split', [gateUp, g.constant('i64', [2], [F, F])], 2, { axis: -1 });
    // QuickGelu with alpha 1 is x·sigmoid(x), SiLU.
    result(g, 'Mul', [g.op('QuickGelu', [gate], { alpha: { float: 1 } }, MICROSOFT), up!]);
  };

const addGraph = (g: GraphBuilder): void => {
  const h = g.input('h', 'f32', ['T', 'H']);
  result(g, 'Add', [h, product(g, g.input('x', 'f32', ['T', 'K']), g.input('w', 'f32', ['H', 'K']))]);
};

const momentsGraph = (g: GraphBuilder): void => {
  const x = g.input('x', 'f32', ['T', 'K']);
  const shared = g.op('Mul', [x, g.input('share', 'f32', ['T', 1])]);
  result(g, 'FusedMatMul', [shared, x], { transA: 1 }, MICROSOFT);
};
