/**
 * The Llama decoder as one graph for a GPU, through ONNX Runtime's WebGPU provider: the weights, masks and parts of a layer
 * of `llama.ts`, with the operators that the provider has.
 *
 * Shapes: B = sequences, S = new tokens of each (B = 1 or S = 1), T = capacity of the caches, R = rows whose logits are
 * returned; H, F, N, G, V as in `llama.ts`, D = a head's width in the caches.
 *
 * K and V `[B, G, T, D]` stay on the device: the outputs `present_k_0`, … are bound to the buffers of the inputs `past_k_0`,
 * …, so a step writes only its own tokens. `GroupQueryAttention` takes a length for each sequence; a skipped attention
 * writes its K and V with `ScatterElements`, in place too.
 *
 * Each block has three branches, and the host's inputs `plain` and `mixed` choose one: all sequences run the block; some do,
 * and `gates` of 0 and 1 zero its output for the others; or none does, and its weights are not read. `If` takes its condition
 * from the host, so nothing is read back from the device.
 */
import type { FloatType, Graph, Value } from '../../onnx/graph.ts';
import { GraphBuilder, inHalves, MICROSOFT } from '../../onnx/graph.ts';
import type { ModelConfig } from '../model-source.ts';
import { type KeysValues, keysValues, type Rotary } from './attention-extras.ts';
import { headRoom, narrowed, widened, wideQueriesKeysValues } from './head-attention.ts';
import type { AttentionParts, FfnParts, StoredLlama } from './llama.ts';
import { feedForward, outputLogits, rotaryTables, throughLayers } from './llama.ts';
import { embed, multiply, withExactProducts } from './projections.ts';
import { type SkippedBlock, surrogateProduct } from './surrogate.ts';

/** Values that every block sees. */
type Shared = Rotary & {
  /** `[B, S]`. */
  readonly positions: Value;
  /** The positions as `[B, G, S, D]`: the index in the cache of each value of K and V. */
  readonly places: Value;
  /** `[B]`: the index of each sequence's last key, which is the number of its keys (with the new ones) minus one. */
  readonly lastKeys: Value;
  /** `[1]`: the most keys of a sequence. */
  readonly keysMax: Value;
  /** `[B, S, H]`. */
  readonly zeros: Value;
  /** For each of the 2L blocks: whether all sequences run it, and whether some do. */
  readonly plain: readonly Value[];
  readonly mixed: readonly Value[];
  /** `[2L, B, 1, 1]`: 1 where the sequence runs the block. */
  readonly gates: Value;
  readonly surrogates:
    | {
        /** `[2L, B, 1, 1]`: 1 where a surrogate replaces the block. */
        readonly gates: Value;
        /** `[B, S, 1]`, bool: position 0 of the sequence. */
        readonly isFirst: Value;
      }
    | undefined;
};

/** `engine/webgpu-runner.ts` feeds the inputs. All floats but the logits have the type `floatType`. */
export function webgpuLlamaGraph(config: ModelConfig, stored: StoredLlama, floatType: FloatType): Graph {
  const g = new GraphBuilder('webgpu_llama');
  const tokenIds = g.input('token_ids', 'i64', ['B', 'S']);
  const logitRows = g.input('logit_rows', 'i64', ['R']);
  const embedded = embed(g, tokenIds, stored.embedding);
  const shared = sharedValues(g, config, stored, embedded);
  const stream = throughLayers(g, config, stored, embedded, {
    attention: (parts) => attention(g, shared, parts),
    ffn: (parts) => ffn(g, shared, parts),
  });
  const rows = g.reshape(stream, -1, config.hiddenSize);
  outputLogits(g, config, stored, g.op('Gather', [rows, logitRows], { axis: 0 }), ['R']);
  // Some devices round activations differently from CPUs, by up to half a logit of the default model.
  const exact = withExactProducts(g.graph);
  return floatType === 'f32' ? exact : inHalves(exact, ['logits']);
}

function sharedValues(g: GraphBuilder, config: ModelConfig, stored: StoredLlama, embedded: Value): Shared {
  const { layerCount: L, kvHeadCount: G } = config;
  const flags = (name: string) => g.split(g.input(name, 'bool', [2 * L]), Array<number>(2 * L).fill(1));
  return {
    config,
    positions: g.input('positions', 'i64', ['B', 'S']),
    places: g.op('Expand', [
      g.input('kv_positions', 'i32', ['B', 1, 'S', 1]),
      g.ints(1, G, 1, headRoom(config)),
    ]),
    lastKeys: g.input('last_keys', 'i32', ['B']),
    keysMax: g.input('keys_max', 'i32', [1]),
    ropes: rotaryTables(g, config, stored),
    zeros: g.op('Mul', [embedded, g.constant('f32', [1], [0])]),
    plain: flags('plain'),
    mixed: flags('mixed'),
    gates: g.input('gates', 'f32', [2 * L, 'B', 1, 1]),
    surrogates: stored.layers.some(({ surrogates }) => surrogates !== undefined)
      ? {
          gates: g.input('surrogate_gates', 'f32', [2 * L, 'B', 1, 1]),
          isFirst: g.input('is_first', 'bool', ['B', 'S', 1]),
        }
      : undefined,
  };
}

/** The three branches of a block, as two nested `If`s; the outer one chooses `plain`, the most frequent. */
function chosenWay(
  g: GraphBuilder,
  { plain, mixed }: Shared,
  block: number,
  outputs: readonly string[],
  declare: (b: GraphBuilder, values: readonly Value[]) => void,
  ways: Record<'plain' | 'mixed' | 'skipped', (b: GraphBuilder) => readonly Value[]>,
): void {
  const way = (outer: GraphBuilder, name: keyof typeof ways) =>
    outer.subgraph(`${name}_${block}`, (b) => declare(b, ways[name](b)));
  const others = g.subgraph(`not_plain_${block}`, (b) => {
    const names = outputs.map((name) => b.fresh(name));
    b.node('If', [mixed[block]!], names, {
      then_branch: { graph: way(b, 'mixed') },
      else_branch: { graph: way(b, 'skipped') },
    });
    declare(
      b,
      names.map((name) => ({ name })),
    );
  });
  g.node('If', [plain[block]!], outputs, {
    then_branch: { graph: way(g, 'plain') },
    else_branch: { graph: others },
  });
}

/** The gates of one block, `[B, 1, 1]`. */
const gateOf = (b: GraphBuilder, gates: Value, block: number): Value =>
  b.op('Gather', [gates, b.constant('i64', [], [block])], { axis: 0 });

/** The surrogate's output for sequences that skip the block, zeros for the others; undefined without surrogates. */
function standIn(
  g: GraphBuilder,
  { surrogates }: Shared,
  block: number,
  skipped: SkippedBlock,
): ((b: GraphBuilder) => Value) | undefined {
  const product = surrogateProduct(g, skipped);
  if (product === undefined || surrogates === undefined) return undefined;
  return (b) => {
    const output = product(b, skipped.unweighted(b), surrogates.isFirst);
    return b.op('Mul', [output, gateOf(b, surrogates.gates, block)]);
  };
}

/** The block's output where only some sequences run it. */
function gated(
  b: GraphBuilder,
  shared: Shared,
  block: number,
  output: Value,
  stand: ((b: GraphBuilder) => Value) | undefined,
): Value {
  const own = b.op('Mul', [output, gateOf(b, shared.gates, block)]);
  return stand === undefined ? own : b.op('Add', [own, stand(b)]);
}

function attention(g: GraphBuilder, shared: Shared, parts: AttentionParts): Value {
  const { config } = shared;
  const { index } = parts;
  const { kvHeadCount: G, hiddenSize: H } = config;
  const D = headRoom(config);
  const past: KeysValues = {
    k: g.input(`past_k_${index}`, 'f32', ['B', G, 'T', D]),
    v: g.input(`past_v_${index}`, 'f32', ['B', G, 'T', D]),
  };
  const block = 2 * index;
  const stand = standIn(g, shared, block, parts);
  const declare = (b: GraphBuilder, [output, k, v]: readonly Value[]) => {
    b.output(output!, 'f32', ['B', 'S', H]);
    b.output(k!, 'f32', ['B', G, 'T', D]);
    b.output(v!, 'f32', ['B', G, 'T', D]);
  };
  const run = (b: GraphBuilder) => runAttention(b, shared, parts, past);
  const output = g.fresh('attention');
  const presents = [`present_k_${index}`, `present_v_${index}`];
  chosenWay(g, shared, block, [output, ...presents], declare, {
    plain: run,
    mixed: (b) => {
      const [own, ...present] = run(b);
      return [gated(b, shared, block, own!, stand), ...present];
    },
    skipped: (b) => [stand?.(b) ?? b.op('Identity', [shared.zeros]), ...writeKeys(b, shared, parts, past)],
  });
  for (const name of presents) g.output({ name }, 'f32', ['B', G, 'T', D]);
  return { name: output };
}

/** The output `[B, S, H]`, and the caches with K and V of the new tokens. */
function runAttention(
  b: GraphBuilder,
  shared: Shared,
  { x, weights, extras, ended }: AttentionParts,
  past: KeysValues,
): Value[] {
  const { config } = shared;
  const { headCount: N, kvHeadCount: G } = config;
  const { q, k, v } = wideQueriesKeysValues(b, shared, extras, multiply(b, x, weights.qkv), shared.positions);
  const [attended, presentK, presentV] = b.ops(
    'GroupQueryAttention',
    [q, k, v, past.k, past.v, shared.lastKeys, shared.keysMax],
    3,
    {
      num_heads: N,
      kv_num_heads: G,
      // Rows of Q carry 1/√D already (see `one-mask-llama.ts`).
      scale: { float: 1 },
      ...(extras.window === undefined ? {} : { local_window_size: extras.window }),
    },
    MICROSOFT,
  );
  const own = narrowed(b, config, attended!, N);
  return [ended(b, multiply(b, own, weights.output)), presentK!, presentV!];
}

/** The caches with K and V of new tokens whose attention is skipped. */
function writeKeys(
  b: GraphBuilder,
  shared: Shared,
  { x, weights, extras }: AttentionParts,
  past: KeysValues,
): Value[] {
  const { config } = shared;
  const { kvHeadCount: G } = config;
  const { k, v } = keysValues(b, shared, extras, multiply(b, x, weights.kv), shared.positions);
  const write = (into: Value, values: Value) => {
    const wide = widened(b, config, values, G);
    const byToken = b.reshape(wide, 0, 0, G, headRoom(config));
    const byHead = b.op('Transpose', [byToken], { perm: [0, 2, 1, 3] });
    return b.op('ScatterElements', [into, shared.places, byHead], { axis: 2 });
  };
  return [write(past.k, k), write(past.v, v)];
}

function ffn(g: GraphBuilder, shared: Shared, parts: FfnParts): Value {
  const { config } = shared;
  const { hiddenSize: H } = config;
  const { x } = parts;
  const block = 2 * parts.index + 1;
  const stand = standIn(g, shared, block, parts);
  const output = g.fresh('ffn');
  chosenWay(g, shared, block, [output], (b, [own]) => b.output(own!, 'f32', ['B', 'S', H]), {
    plain: (b) => [feedForward(b, config, x, parts)],
    mixed: (b) => [gated(b, shared, block, feedForward(b, config, x, parts), stand)],
    skipped: (b) => [stand?.(b) ?? b.op('Identity', [shared.zeros])],
  });
  return { name: output };
}
