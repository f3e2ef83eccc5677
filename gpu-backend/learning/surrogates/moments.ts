/**
 * Second moments of every block's input and output in the dense model, summed in the graph: the input of the closed
 * form in `fit-surrogates.ts`.
 *
 * Shapes: H = hidden, N positions. For block i with plainly normalized input x̂ `[N, H]` and output y `[N, H]`: sums of
 * [x̂ 1]ᵀ[x̂ 1] and [x̂ 1]ᵀ y over ordinary positions. The first position of a sequence is an attention sink and has
 * sums of its own; positions with far larger outputs would dominate the fit and are left out.
 */
import type { StoredLlama } from '../../model/architectures/llama.ts';
import type { ModelConfig } from '../../model/model-source.ts';
import type { Graph, Value } from '../../onnx/graph.ts';
import { GraphBuilder, MICROSOFT } from '../../onnx/graph.ts';
import type { Session } from '../../onnx/session.ts';
import { floats, integers } from '../../onnx/session.ts';
import { openTrainingGraph, type TrainingSessionOptions } from '../gates/gate-session.ts';
import { forward, normalizePlainly } from '../gates/training-forward.ts';
import type { TrainingLinears } from '../gates/training-weights.ts';

/** An output whose mean square is this many times the mean over ordinary positions is an outlier. */
const OUTLIER = 10;

export type BlockMoments = {
  /** `[H + 1, H + 1]`; the last row holds sums of x̂ and the count. */
  readonly xx: Float64Array;
  /** `[H + 1, H]`; the last row holds sums of y. */
  readonly xy: Float64Array;
  /** Sum of y over first positions, `[H]`. */
  readonly first: Float64Array;
};

export type Moments = { readonly blocks: readonly BlockMoments[]; sequences: number };

type MomentSession = {
  readonly moments: Moments;
  /** Adds `[sequences, S]` tokens. */
  add(tokenIds: ArrayLike<number>, sequences: number): Promise<void>;
  close(): Promise<void>;
};

/** Holds 16·H² bytes for each block: 320 MB for 60 blocks with H = 576. */
export async function openMomentSession(
  folder: string,
  config: ModelConfig,
  options: TrainingSessionOptions,
): Promise<MomentSession> {
  const build = (stored: StoredLlama, linears: TrainingLinears) => momentGraph(config, stored, linears);
  const session = await openTrainingGraph(folder, config, build, options);
  const H = config.hiddenSize;
  const moments: Moments = {
    blocks: Array.from({ length: 2 * config.layerCount }, () => ({
      xx: new Float64Array((H + 1) * (H + 1)),
      xy: new Float64Array((H + 1) * H),
      first: new Float64Array(H),
    })),
    sequences: 0,
  };
  return {
    moments,
    async add(tokenIds, sequences) {
      await addMoments(session, moments, tokenIds, sequences);
    },
    close: () => session.release(),
  };
}

const PARTS = ['xx', 'xy', 'first'] as const;

async function addMoments(
  session: Session,
  moments: Moments,
  tokenIds: ArrayLike<number>,
  sequences: number,
): Promise<void> {
  const names = moments.blocks.flatMap((_, i) => PARTS.map((part) => `${part}_${i}`));
  const feeds = { token_ids: integers(tokenIds, [sequences, tokenIds.length / sequences]) };
  const outputs = await session.run(feeds, names);
  moments.blocks.forEach((block, i) => {
    for (const part of PARTS) {
      const [sums, more] = [block[part], floats(outputs[`${part}_${i}`]!)];
      for (let at = 0; at < sums.length; at++) sums[at]! += more[at]!;
    }
  });
  moments.sequences += sequences;
}

function momentGraph(config: ModelConfig, stored: StoredLlama, linears: TrainingLinears): Graph {
  const g = new GraphBuilder('moments');
  const H = config.hiddenSize;
  let ordinary: Value | undefined;
  forward(g, { config, stored, isDifferentiated: false }, linears, (index, h, block, shared) => {
    ordinary ??= ordinaryPositions(g, shared.isFirst, h);
    const y = block(g, h);
    sums(g, index, H, normalizePlainly(g, config, h), y, ordinary);
    return g.op('Add', [h, y]);
  });
  return g.graph;
}

/** `[N, 1]`: 0 for the first position of each sequence, else 1. */
function ordinaryPositions(g: GraphBuilder, isFirst: Value, h: Value): Value {
  const ordinary = g.op('Cast', [g.op('Not', [isFirst])], { to: 1 });
  const rows = g.op('Shape', [h], { start: 0, end: 2 });
  const all = g.op('Expand', [ordinary, g.op('Concat', [rows, g.ints(1)], { axis: 0 })]);
  return g.reshape(all, -1, 1);
}

function sums(g: GraphBuilder, index: number, H: number, x: Value, y: Value, ordinary: Value): void {
  const [xs, ys] = [g.reshape(x, -1, H), g.reshape(y, -1, H)];
  const last = g.ints(-1);
  const size = g.op('ReduceMean', [g.op('Mul', [ys, ys]), last], { keepdims: 1 });
  const total = (value: Value) => g.op('ReduceSum', [value], { keepdims: 1 });
  const typical = g.op('Div', [total(g.op('Mul', [size, ordinary])), total(ordinary)]);
  const limit = g.op('Mul', [typical, g.constant('f32', [1], [OUTLIER])]);
  const counts = g.op('Mul', [g.op('Cast', [g.op('LessOrEqual', [size, limit])], { to: 1 }), ordinary]);
  const one = g.op('Add', [
    g.op('Mul', [ordinary, g.constant('f32', [1], [0])]),
    g.constant('f32', [1], [1]),
  ]);
  const extended = g.op('Concat', [xs, one], { axis: 1 });
  const counted = g.op('Mul', [extended, counts]);
  const product = (a: Value, b: Value, name: string, shape: number[]) => {
    g.node('FusedMatMul', [a, b], [name], { transA: 1 }, MICROSOFT);
    g.output({ name }, 'f32', shape);
  };
  product(counted, extended, `xx_${index}`, [H + 1, H + 1]);
  product(counted, ys, `xy_${index}`, [H + 1, H]);
  const firsts = g.op('Gather', [y, g.constant('i64', [], [0])], { axis: 1 });
  g.node('ReduceSum', [firsts, g.ints(0)], [`first_${index}`], { keepdims: 0 });
  g.output({ name: `first_${index}` }, 'f32', [H]);
}
