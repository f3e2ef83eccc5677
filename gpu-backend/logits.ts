/** Functions of logits: argmax, log-sum-exp, and the KL divergence of two distributions. */

/** The index of the largest value, the first among equals. */
export function argmax(values: Float32Array): number {
  let best = 0;
  let bestValue = values[0]!;
  for (let i = 1; i < values.length; i++) {
    if (values[i]! > bestValue) {
      bestValue = values[i]!;
      best = i;
    }
  }
  return best;
}

/** log Σ exp(logits); a token's log-probability is its logit minus this. */
export function logSumExp(logits: Float32Array): number {
  const best = logits[argmax(logits)]!;
  let sum = 0;
  for (let i = 0; i < logits.length; i++) sum += Math.exp(logits[i]! - best);
  return best + Math.log(sum);
}

/** Mean KL(expected ‖ found) over rows of `width` logits, nats. */
export function divergence(expected: Float32Array, found: Float32Array, width: number): number {
  let total = 0;
  for (let start = 0; start < expected.length; start += width) {
    const p = expected.subarray(start, start + width);
    const q = found.subarray(start, start + width);
    const [logP, logQ] = [logSumExp(p), logSumExp(q)];
    for (let i = 0; i < width; i++) {
      const log = p[i]! - logP;
      if (log > -20) total += Math.exp(log) * (log - (q[i]! - logQ));
    }
  }
  return (total * width) / expected.length;
}
