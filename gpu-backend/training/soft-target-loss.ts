/**
 * Cross-entropy against a few target tokens a position, and its gradient by the head's input, written down
 * together: in between lie `[R, V]` values, the largest of the whole step, and each pass over them counts.
 *
 * logits = x·Wᵀ, q = softmax(logits), loss = mean_r Σ_k p_rk · (log Σ exp logits_r - logits_r[id_rk]);
 * ∂loss/∂x = (q - p)·W / R, where p sums to 1 in every row.
 */
import type { GraphBuilder, Value } from '../onnx/graph.ts';

export type HeadProducts = {
  /** `[R, H]` → `[R, V]`: x·Wᵀ. */
  forward(x: Value): Value;
  /** `[R, V]` → `[R, H]`: y·W. */
  back(y: Value): Value;
};

/** x: `[R, H]`. Nodes of the gradient are appended when it is asked for. */
export function softTargetLoss(
  g: GraphBuilder,
  x: Value,
  head: HeadProducts,
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
  const value = g.op('Div', [g.op('ReduceSum', [terms], { keepdims: 0 }), rows]);
  const gradient = () => {
    const difference = g.op('ScatterElements', [predicted, ids, g.op('Neg', [probabilities])], {
      axis: 1,
      reduction: 'add',
    });
    return g.op('Div', [head.back(difference), rows]);
  };
  return { value, gradient };
}
