/** Adam (Kingma and Ba, arXiv 1412.6980) on a plain array: its state is data, so that a run can be stored. */

export type AdamState = {
  readonly step: number;
  /** Running means of the gradients and of their squares. */
  readonly mean: readonly number[];
  readonly square: readonly number[];
};

export type AdamOptions = {
  readonly learningRate: number;
  readonly beta1?: number;
  readonly beta2?: number;
  readonly epsilon?: number;
};

export const newAdam = (size: number): AdamState => ({
  step: 0,
  mean: Array<number>(size).fill(0),
  square: Array<number>(size).fill(0),
});

/** One step downhill: new values and new state. For ascent, give negated gradients. */
export function adamStep(
  values: readonly number[],
  gradients: readonly number[],
  state: AdamState,
  { learningRate, beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8 }: AdamOptions,
): { values: number[]; state: AdamState } {
  const step = state.step + 1;
  const mean = state.mean.map((value, i) => beta1 * value + (1 - beta1) * gradients[i]!);
  const square = state.square.map((value, i) => beta2 * value + (1 - beta2) * gradients[i]! ** 2);
  const [meanScale, squareScale] = [1 - beta1 ** step, 1 - beta2 ** step];
  const moved = values.map(
    (value, i) =>
      value - (learningRate * (mean[i]! / meanScale)) / (Math.sqrt(square[i]! / squareScale) + epsilon),
  );
  return { values: moved, state: { step, mean, square } };
}
