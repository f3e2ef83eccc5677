/**
 * What every search of a run works with: costs of masks on texts, steps of the gates, the budget. All results go
 * through the journal.
 */
import { denseMask, maskBits } from '../../shared/mask.ts';
import type { CalibrationRow } from '../calibration/read-data.ts';
import type { GateBatch } from '../training/batch.ts';
import type { Budget } from '../training/budget.ts';
import type { GateStep } from '../training/gate-session.ts';
import type { MaskCost } from '../training/search-mask.ts';
import type { TrainingOptions } from '../training/train-mask.ts';
import type { Journal } from './journal.ts';
import type { Text, TextMaker } from './texts.ts';

/** Tokens of a batch that only the loss is taken of, and of each of the two parts of a training step. */
const LOSS_BATCH_TOKENS = 768;
export const STEP_PARTS = 2;
const STEP_PART_TOKENS = 384;

/** Costs on one text: rise of the mean loss over the dense model's, which is the KL where targets are dense. */
export type TextCost = {
  readonly ofMask: MaskCost;
  /** `gates`: `[2L]`, 0 to 1; `name` says which they are. */
  ofGates(name: string, gates: readonly number[]): Promise<number>;
};

export type Workbench = {
  readonly blockCount: number;
  readonly budget: Budget;
  readonly seed: number;
  readonly signal: AbortSignal | undefined;
  /** @param name distinct names draw distinct rows. @param positions scored positions wanted. */
  costOn(name: string, rows: readonly CalibrationRow[], positions: number): TextCost;
  /** As `trainMask` wants it, for `steps` steps on text of their own. */
  training(
    name: string,
    rows: readonly CalibrationRow[],
    steps: number,
  ): Pick<TrainingOptions, 'parts' | 'sample'>;
};

export type WorkbenchParts = Pick<Workbench, 'budget' | 'seed' | 'signal'> & {
  readonly journal: Journal;
  readonly texts: TextMaker;
  /** Mean loss of a batch under gates. */
  loss(batch: GateBatch, gates: ArrayLike<number>): Promise<number>;
  /** The same with its gradient. */
  step(batch: GateBatch, gates: ArrayLike<number>): Promise<GateStep>;
  /** After every result, known or computed. */
  onResult(): void;
};

export function createWorkbench(parts: WorkbenchParts): Workbench {
  const { budget, journal, seed, signal, texts } = parts;
  const blockCount = budget.blockWeights.length;
  const dense = denseMask(blockCount);

  /** Mean over all scored positions of the text. */
  async function lossOf(text: Text, name: string, gates: ArrayLike<number>): Promise<number> {
    const found = await journal.numbers(`${text.name} | ${name}`, async () => {
      let [sum, positions] = [0, 0];
      for (let index = 0; index < text.batchCount; index++) {
        signal?.throwIfAborted();
        const batch = await text.batch(index);
        sum += (await parts.loss(batch, gates)) * batch.scoredRows.length;
        positions += batch.scoredRows.length;
      }
      return [sum / positions];
    });
    return found[0]!;
  }

  return {
    ...{ budget, seed, signal, blockCount },
    costOn(name, rows, positions) {
      const text = texts.text(name, rows, positions, LOSS_BATCH_TOKENS);
      const overDense = async (gatesName: string, gates: ArrayLike<number>): Promise<number> => {
        const under = await lossOf(text, gatesName, gates);
        parts.onResult();
        return under - (await lossOf(text, maskBits(dense), dense.runs));
      };
      return { ofMask: (mask) => overDense(maskBits(mask), mask.runs), ofGates: overDense };
    },
    training(name, rows, steps) {
      const text = texts.text(name, rows, steps * STEP_PARTS * STEP_PART_TOKENS, STEP_PART_TOKENS);
      return {
        parts: STEP_PARTS,
        async sample(step, part, gates) {
          const [loss, ...gradients] = await journal.numbers(`${name} | ${step}.${part}`, async () => {
            signal?.throwIfAborted();
            // A group with few rows meets them again, under other gates.
            const batch = await text.batch((step * STEP_PARTS + part) % text.batchCount);
            const result = await parts.step(batch, gates);
            return [result.loss, ...result.gradients];
          });
          parts.onResult();
          return { loss: loss!, gradients };
        },
      };
    },
  };
}
