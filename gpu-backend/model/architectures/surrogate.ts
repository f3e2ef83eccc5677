/**
 * The output of a skipped block in the serving graph: zeros, or its surrogate's output (`model/surrogates.ts` has the
 * formula), as the request says.
 *
 * Shapes: B = sequences, S = new tokens of each, H = hidden, r = rank, U = `surrogate_rows`: S with surrogates, else 0.
 *
 * A second `If` inside the block's `If` would be two branches deep, where ONNX Runtime does not prepack weights; a second
 * `If` beside it would cost time in every running block. So the surrogate computes U rows, and zeros fill the rest.
 */
import type { GraphBuilder, Value } from '../../onnx/graph.ts';
import type { WeightRange } from '../weights-file.ts';
import { external } from '../weights-file.ts';
import type { StoredLinear } from './projections.ts';
import { linear, multiply } from './projections.ts';

export type StoredSurrogate = {
  /** Aᵀ `[r, H]`. */
  readonly down: StoredLinear;
  /** Bᵀ `[H, r]`. */
  readonly up: StoredLinear;
  /** `[H]` each. */
  readonly bias: WeightRange;
  readonly first: WeightRange;
};

/** What a surrogate needs of the block that it replaces. */
export type SkippedBlock = {
  /** The names of its tensors begin with it, e.g. `layer_3.ffn`. */
  readonly name: string;
  readonly surrogate: StoredSurrogate | undefined;
  /** Builds the stream before the block, normalized without weights. */
  readonly unweighted: (b: GraphBuilder) => Value;
};

export type Skipping = {
  /** `[B, S, H]`. */
  readonly zeros: Value;
  readonly surrogates:
    | {
        /** `[1]`: U. */
        readonly rows: Value;
        /** `[B, U, 1]`, bool: position 0 of the sequence. */
        readonly isFirst: Value;
        /** `[B, S − U, H]`. */
        readonly zerosLeft: Value;
      }
    | undefined;
};

/** Adds the input `surrogate_rows` `[1]` when the graph has surrogates. */
export function skipping(
  g: GraphBuilder,
  embedded: Value,
  positions: Value,
  hasSurrogates: boolean,
): Skipping {
  const zeros = g.op('Mul', [embedded, g.constant('f32', [1], [0])]);
  if (!hasSurrogates) return { zeros, surrogates: undefined };
  const rows = g.input('surrogate_rows', 'i64', [1]);
  const isFirst = g.op('Equal', [positions, g.constant('i64', [], [0])]);
  const end = g.ints(Number.MAX_SAFE_INTEGER);
  return {
    zeros,
    surrogates: {
      rows,
      isFirst: g.op('Unsqueeze', [g.op('Slice', [isFirst, g.ints(0), rows, g.ints(1)]), g.ints(2)]),
      zerosLeft: g.op('Slice', [zeros, rows, end, g.ints(1)]),
    },
  };
}

/**
 * Returns a function that builds the output of a skipped block, `[B, S, H]`, in its branch. Weights become initializers of
 * `g`, the outer graph.
 */
export function skippedOutput(
  g: GraphBuilder,
  { zeros, surrogates }: Skipping,
  block: SkippedBlock,
): (b: GraphBuilder) => Value {
  const product = surrogateProduct(g, block);
  if (product === undefined || surrogates === undefined) return (b) => b.op('Identity', [zeros]);
  return (b) => {
    const rows = b.op('Slice', [block.unweighted(b), b.ints(0), surrogates.rows, b.ints(1)]);
    return b.op('Concat', [product(b, rows, surrogates.isFirst), surrogates.zerosLeft], { axis: 1 });
  };
}

/**
 * Makes a surrogate's weights initializers of `g`, the outer graph. Returns a function that computes its output in a branch:
 * `x` `[..., rows, H]`, `isFirst` `[..., rows, 1]` → `[..., rows, H]`; undefined for a block without surrogate.
 */
export function surrogateProduct(
  g: GraphBuilder,
  { name, surrogate }: SkippedBlock,
): ((b: GraphBuilder, x: Value, isFirst: Value) => Value) | undefined {
  if (surrogate === undefined) return undefined;
  const hiddenSize = surrogate.down.inputs;
  const down = linear(g, `${name}.surrogate_down`, surrogate.down);
  const up = linear(g, `${name}.surrogate_up`, surrogate.up);
  const vector = (part: string, range: WeightRange) =>
    g.initializer(`${name}.surrogate_${part}`, 'f32', [hiddenSize], external(range));
  const bias = vector('bias', surrogate.bias);
  const first = vector('first', surrogate.first);
  return (b, x, isFirst) => {
    const product = multiply(b, multiply(b, x, down), up);
    return b.op('Where', [isFirst, first, b.op('Add', [product, bias])]);
  };
}
