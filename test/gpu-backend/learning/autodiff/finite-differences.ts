/** Holds a graph's gradients against finite differences of its loss, in random directions. */

import type { GradientOptions, Seed } from '../../../../gpu-backend/learning/autodiff/branches.ts';
import { gradients } from '../../../../gpu-backend/learning/autodiff/gradients.ts';
import { encodeModel } from '../../../../gpu-backend/onnx/encode.ts';
import type { Value } from '../../../../gpu-backend/onnx/graph.ts';
import { GraphBuilder } from '../../../../gpu-backend/onnx/graph.ts';
import type { Feeds } from '../../../../gpu-backend/onnx/session.ts';
import { createSession, floats, tensor } from '../../../../gpu-backend/onnx/session.ts';
import { seededRandom } from '../../../../gpu-backend/random.ts';

export type Case = {
  /** Shapes of the inputs x0, x1, ... */
  readonly inputs: readonly (readonly number[])[];
  readonly build: (g: GraphBuilder, ...inputs: Value[]) => Value;
  /** Inputs to differentiate by; all unless said. */
  readonly targets?: readonly number[];
  /** Other feeds, which stay as they are. */
  readonly feeds?: Feeds;
  readonly options?: GradientOptions;
};

/** loss = Σ y·c for fixed c, so that every output counts with a weight of its own; c is the gradient by y. */
export function weightedSum(g: GraphBuilder, y: Value): { loss: Value; seed: Seed } {
  const size = g.op('Cast', [g.op('Size', [y])], { to: 1 });
  const numbers = g.op('Range', [g.constant('f32', [], [0]), size, g.constant('f32', [], [1])]);
  const waves = g.op('Sin', [g.op('Mul', [numbers, g.constant('f32', [], [2.3])])]);
  const flat = g.op('Add', [waves, g.constant('f32', [], [0.4])]);
  const weights = g.op('Reshape', [flat, g.op('Shape', [y])]);
  return {
    loss: g.op('ReduceSum', [g.op('Mul', [y, weights])], { keepdims: 0 }),
    seed: { value: y, gradient: weights },
  };
}

/**
 * The worst error of a directional derivative, relative to the size of the gradient along that direction and
 * across it (|∇|·|d|), over `directions` random directions of unit length. Central differences with step h
 * err by h²·f'''/6 and by rounding, 2^-24·|f|/h; losses here are near 1 and h = 1e-2 keeps both near 1e-4.
 */
export async function worstError(given: Case, directions = 3): Promise<number> {
  const g = new GraphBuilder('case');
  const inputs = given.inputs.map((shape, i) => g.input(`x${i}`, 'f32', shape));
  for (const [name, value] of Object.entries(given.feeds ?? {})) {
    g.input(name, value.type === 'int64' ? 'i64' : value.type === 'bool' ? 'bool' : 'f32', value.dims);
  }
  const { loss, seed } = weightedSum(g, given.build(g, ...inputs));
  const targets = given.targets ?? inputs.map((_, i) => i);
  const found = gradients(
    g,
    [seed],
    targets.map((i) => inputs[i]!),
    given.options,
  );
  g.output(loss, 'f32', []);
  found.forEach((value, i) => {
    g.output(value, 'f32', given.inputs[targets[i]!]!);
  });
  const session = await createSession(encodeModel(g.graph), { threads: 1 });
  const random = seededRandom(7);
  const values = given.inputs.map((shape) =>
    Float32Array.from({ length: shape.reduce((a, b) => a * b, 1) }, () => 2 * random() - 1),
  );
  const run = (arrays: Float32Array[], names: string[]) => {
    const feeds = arrays.map((data, i) => [`x${i}`, tensor('f32', data, given.inputs[i]!)] as const);
    return session.run({ ...Object.fromEntries(feeds), ...given.feeds }, names);
  };
  const exact = await run(
    values,
    found.map(({ name }) => name),
  );
  const lossAt = async (arrays: Float32Array[]) => floats((await run(arrays, [loss.name]))[loss.name]!)[0]!;
  let worst = 0;
  for (const [at, target] of targets.entries()) {
    const gradient = floats(exact[found[at]!.name]!);
    if (exact[found[at]!.name]!.dims.join() !== given.inputs[target]!.join()) return Number.NaN;
    for (let turn = 0; turn < directions; turn++) {
      const raw = Float64Array.from(gradient, () => random() - 0.5);
      const norm = Math.hypot(...raw);
      const h = 1e-2;
      const moved = (sign: number) =>
        values.map((data, i) => (i === target ? data.map((x, j) => x + (sign * h * raw[j]!) / norm) : data));
      const difference = ((await lossAt(moved(1))) - (await lossAt(moved(-1)))) / (2 * h);
      const predicted = gradient.reduce((sum, x, j) => sum + (x * raw[j]!) / norm, 0);
      worst = Math.max(worst, Math.abs(difference - predicted) / (Math.hypot(...gradient) + 1e-6));
    }
  }
  await session.release();
  return worst;
}
