/** A training run between two steps, as data: what a checkpoint holds. */
import { readFile } from 'node:fs/promises';
import { z } from 'zod';
import { writeWhole } from '../write-whole.ts';

const numbers = z.array(z.number()).readonly();
const adamSchema = z.strictObject({ step: z.int().min(0), mean: numbers, square: numbers });

const trainingStateSchema = z.strictObject({
  /** Steps done. */
  step: z.int().min(0),
  /** `[2L]`. */
  logAlphas: numbers,
  /** λ1 and λ2. */
  multipliers: z.tuple([z.number(), z.number()]),
  gateAdam: adamSchema,
  multiplierAdam: adamSchema,
  /** One entry a step: the learning curve. */
  history: z.array(z.strictObject({ loss: z.number(), expectedSparsity: z.number() })).readonly(),
});
export type TrainingState = z.infer<typeof trainingStateSchema>;

const checkpointSchema = z.strictObject({ key: z.string(), state: trainingStateSchema });

/** `key`: a hash of everything that the run depends on. */
export const storeCheckpoint = (path: string, key: string, state: TrainingState): Promise<void> =>
  writeWhole(path, `${JSON.stringify({ key, state })}\n`);

/** Undefined where there is none for this key, or it is damaged: the run then starts again. */
export async function loadCheckpoint(path: string, key: string): Promise<TrainingState | undefined> {
  try {
    const checkpoint = checkpointSchema.parse(JSON.parse(await readFile(path, 'utf8')));
    return checkpoint.key === key ? checkpoint.state : undefined;
  } catch {
    return undefined;
  }
}
