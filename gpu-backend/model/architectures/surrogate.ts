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
  const int = (value: number) => g.constant('i64', [1], [value]);
  const isFirst = g.op('Equal', [positions, g.constant('i64', [], [0])]);
  const end = int(Number.MAX_SAFE_INTEGER);
  return {
    zeros,
    surrogates: {
      rows,
      isFirst: g.op('Unsqueeze', [g.op('Slice', [isFirst, int(0), rows, int(1)]), int(2)]),
      zerosLeft: g.op('Slice', [zeros, rows, end, int(1)]),
    },
  };
}

/**
 * Returns a function that builds the output of a skipped block, `[B, S, H]`, in its branch. `x` `[B, S, H]`: the stream,
 * normalized without weights. Weights become initializers of `g`, the outer graph.
 */
export function skippedOutput(
  g: GraphBuilder,
  { zeros, surrogates }: Skipping,
  name: string,
  stored: StoredSurrogate | undefined,
  x: (b: GraphBuilder) => Value,
): (b: GraphBuilder) => Value {
  if (stored === undefined || surrogates === undefined) return (b) => b.op('Identity', [zeros]);
  const product = surrogateProduct(g, name, stored);
  return (b) => {
    const int = (value: number) => b.constant('i64', [1], [value]);
    const rows = b.op('Slice', [x(b), int(0), surrogates.rows, int(1)]);
    return b.op('Concat', [product(b, rows, surrogates.isFirst), surrogates.zerosLeft], { axis: 1 });
  };
}

/**
 * Makes a surrogate's weights initializers of `g`, the outer graph. Returns a function that computes its output in a branch:
 * `x` `[..., rows, H]`, `isFirst` `[..., rows, 1]` → `[..., rows, H]`.
 */
export function surrogateProduct(
  g: GraphBuilder,
  name: string,
  stored: StoredSurrogate,
): (b: GraphBuilder, x: Value, isFirst: Value) => Value {
  const hiddenSize = stored.down.inputs;
  const down = linear(g, `${name}.surrogate_down`, stored.down);
  const up = linear(g, `${name}.surrogate_up`, stored.up);
  const vector = (part: string, range: WeightRange) =>
    g.initializer(`${name}.surrogate_${part}`, 'f32', [hiddenSize], external(range));
  const bias = vector('bias', stored.bias);
  const first = vector('first', stored.first);
  return (b, x, isFirst) => {
    const product = multiply(b, multiply(b, x, down), up);
    return b.op('Where', [isFirst, first, b.op('Add', [product, bias])]);
  };
}
