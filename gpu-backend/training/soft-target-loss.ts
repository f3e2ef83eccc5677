/**
 * Cross-entropy against a few target tokens a position, and its gradient by the head's input, written down
 * together: in between lie `[R, V]` values, the largest of the whole step, and each pass over them counts.
 *
 * logits = x·Wᵀ, q = softmax(logits), loss = mean_r Σ_k p_rk · (log Σ exp logits_r - logits_r[id_rk]);
 * ∂loss/∂x = (q - p)·W / R, where p sums to 1 in every row.
 *
 * With `tail`, p may sum to P < 1, and all other tokens are one more target of probability 1 − P: with Q = Σ_k q_k the
 * loss gains -(1−P)·log(1−Q), and a token outside of the targets has the gradient q·(1 − (1−P)/(1−Q)). Without it,
 * learning from another model's likeliest tokens would press all others towards 0.
 */
import type { GraphBuilder, Value } from '../onnx/graph.ts';

export type HeadProducts = {
  /** `[R, H]` → `[R, V]`: x·Wᵀ. */
  forward(x: Value): Value;
  /** `[R, V]` → `[R, H]`: y·W. */
  back(y: Value): Value;
};

/** Of a share of probability that a logarithm is taken of, or that is divided by. */
const SHARE_MIN = 1e-6;

/** x: `[R, H]`. Nodes of the gradient are appended when it is asked for. */
export function softTargetLoss(
  g: GraphBuilder,
  x: Value,
  head: HeadProducts,
  options: { readonly tail: boolean } = { tail: false },
): { value: Value; gradient: () => Value } {
  const ids = g.input('target_ids', 'i64', ['R', 'K']);
  const probabilities = g.input('target_probabilities', 'f32', ['R', 'K']);
  const axes = g.constant('i64', [1], [-1]);
  const logits = head.forward(x);
  const predicted = g.op('Softmax', [logits], { axis: -1 });
  // The likeliest token's own probability tells the sum that softmax divided by.
  const most = (value: Value) => g.op('ReduceMax', [value, axes], { keepdims: 1 });
  const logSum = g.op('Sub', [most(logits), g.op('Log', [most(predicted)])]);
  const picked = g.op('GatherElements', [logits, ids], { axis: 1 });
  const terms = g.op('Mul', [probabilities, g.op('Sub', [logSum, picked])]);
  const rows = g.op('Cast', [g.op('Squeeze', [g.op('Shape', [ids], { start: 0, end: 1 })])], { to: 1 });
  const sum = g.op('ReduceSum', [terms], { keepdims: 0 });
  if (!options.tail) {
    const gradient = () => {
      const difference = scatterAdd(g, predicted, ids, g.op('Neg', [probabilities]));
      return g.op('Div', [head.back(difference), rows]);
    };
    return { value: g.op('Div', [sum, rows]), gradient };
  }
  const found = g.op('GatherElements', [predicted, ids], { axis: 1 });
  const [rest, predictedRest] = [restOf(g, probabilities), restOf(g, found)];
  const tail = g.op('ReduceSum', [g.op('Mul', [rest, g.op('Log', [predictedRest])])], { keepdims: 0 });
  const gradient = () => {
    const ratio = g.op('Div', [rest, predictedRest]);
    const scaled = g.op('Mul', [predicted, g.op('Sub', [g.constant('f32', [1], [1]), ratio])]);
    // A target's own gradient is q − p again.
    const own = g.op('Sub', [g.op('Mul', [found, ratio]), probabilities]);
    return g.op('Div', [head.back(scatterAdd(g, scaled, ids, own)), rows]);
  };
  return { value: g.op('Div', [g.op('Sub', [sum, tail]), rows]), gradient };
}

const scatterAdd = (g: GraphBuilder, values: Value, ids: Value, updates: Value): Value =>
  g.op('ScatterElements', [values, ids, updates], { axis: 1, reduction: 'add' });

/** What `[R, K]` probabilities leave to all other tokens, `[R, 1]`. */
function restOf(g: GraphBuilder, probabilities: Value): Value {
  const sum = g.op('ReduceSum', [probabilities, g.constant('i64', [1], [-1])], { keepdims: 1 });
  return g.op('Max', [g.op('Sub', [g.constant('f32', [1], [1]), sum]), g.constant('f32', [1], [SHARE_MIN])]);
}
