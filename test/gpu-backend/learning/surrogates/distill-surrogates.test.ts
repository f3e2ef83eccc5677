/** When a distillation ends: the rule alone, on a table of a few numbers and figures that are given. */
import { describe, expect, it } from 'vitest';
import type { TaughtBatch } from '../../../../gpu-backend/learning/gates/teacher.ts';
import type {
  DistillOptions,
  DistillState,
} from '../../../../gpu-backend/learning/surrogates/distill-surrogates.ts';
import {
  distill,
  startDistillation,
} from '../../../../gpu-backend/learning/surrogates/distill-surrogates.ts';
import { randomLlama, randomSurrogates } from '../../../support/random-llama.ts';

const table = randomSurrogates(randomLlama({ tiedEmbeddings: false }).config, 32);
const STEPS = 1000;

/** A run whose table is judged as `klAt` says, by the step (0: the table that it began with). */
async function run(klAt: (step: number) => number): Promise<DistillState> {
  let judged = 0;
  const still = (values: Float32Array) => new Float32Array(values.length);
  const options: DistillOptions = {
    session: {
      step: async () => ({
        loss: 1,
        gradients: {
          a: still(table.a),
          b: still(table.b),
          bias: still(table.bias),
          first: still(table.first),
        },
      }),
    },
    steps: STEPS,
    seed: 1,
    costs: Array<number>(table.blockCount).fill(0.1),
    batch: async () => ({ entropy: 0 }) as TaughtBatch,
    judge: async () => klAt(50 * judged++),
  };
  return await distill(options, await startDistillation(table, options.judge));
}

describe('a distillation', () => {
  it('goes on while its steps are long, however the table does: what they gain shows later', async () => {
    const { best, step } = await run((at) => (at === 0 ? 0.24 : at < 700 ? 0.25 : 0.24 - at / 1e5));
    expect(step).toBe(STEPS);
    expect(best.step).toBe(STEPS);
  });

  it('ends after four judgements without a better one once they are short, and keeps the best', async () => {
    const { best, step } = await run((at) => Math.abs(at - 600) / 1e4 + 0.2);
    expect(step).toBe(800);
    expect(best).toMatchObject({ step: 600, kl: 0.2 });
  });

  it('that never helps keeps the table that it began with', async () => {
    const { best, step } = await run((at) => 0.2 + at / 1e4);
    expect(step).toBe(700);
    expect(best).toMatchObject({ step: 0, kl: 0.2 });
    expect(best.table.a).toEqual(table.a);
  });
});
