/**
 * The tools of every search in a run: costs of masks on texts, training steps of gates, the budget. All results go
 * through the journal.
 */
import type { Mask } from '../../../shared/mask/mask.ts';
import { denseMask, maskBits } from '../../../shared/mask/mask.ts';
import type { CalibrationRow } from '../data/read-data.ts';
import type { SampleBatch } from '../gates/batches.ts';
import { LOSS_BATCH_TOKENS, STEP_PART_TOKENS } from '../gates/step-memory.ts';
import type { LossAndGradients, TrainingOptions } from '../gates/train-mask.ts';
import type { RunJournal } from '../journal.ts';
import type { Budget } from './budget.ts';
import { STEP_PARTS } from './effort.ts';
import type { MaskCost, SearchCost } from './exchange.ts';
import type { Text, TextMaker } from './texts.ts';

/** Costs on one text: the mean loss minus the dense model's, nats; with the dense model's targets that is the KL. */
export type TextCost = SearchCost & {
  /** On the whole text. */
  readonly ofMask: MaskCost;
  /** Cost at a glance. `gates`: `[2L]`, 0 to 1; `name` identifies them in the journal. */
  ofGates(name: string, gates: readonly number[]): Promise<number>;
};

export type Workbench = {
  readonly blockCount: number;
  readonly budget: Budget;
  readonly seed: number;
  readonly signal: AbortSignal | undefined;
  /**
   * @param name distinct names draw distinct rows. @param positions scored positions wanted.
   * @param glanceParts batches of a glance.
   */
  costOn(name: string, rows: readonly CalibrationRow[], positions: number, glanceParts?: number): TextCost;
  /** The `sample` function of `trainMask` for `steps` steps, on separate text. */
  training(
    name: string,
    rows: readonly CalibrationRow[],
    steps: number,
  ): Pick<TrainingOptions, 'parts' | 'sample'>;
};

type WorkbenchParts = Pick<Workbench, 'budget' | 'seed' | 'signal'> & {
  readonly journal: Pick<RunJournal, 'result'>;
  readonly texts: TextMaker;
  /** Mean loss of a batch under gates. */
  loss(batch: SampleBatch, gates: ArrayLike<number>): Promise<number>;
  /** The same with its gradient. */
  step(batch: SampleBatch, gates: ArrayLike<number>): Promise<LossAndGradients>;
  /** Called after every result, read or computed. */
  onResult(): void;
};

export function createWorkbench(parts: WorkbenchParts): Workbench {
  const { budget, seed, signal, texts } = parts;
  return {
    budget,
    seed,
    signal,
    blockCount: budget.blockWeights.length,
    costOn(name, rows, positions, glanceParts = 1) {
      const text = texts.text(name, rows, positions, LOSS_BATCH_TOKENS);
      const glance = Math.min(glanceParts, text.batches.length);
      return {
        ofMask: (mask) => riseOn(parts, text, text.batches.length, maskBits(mask), mask.runs),
        atAGlance: (mask) => riseOn(parts, text, glance, maskBits(mask), mask.runs),
        isBetter: (mask, rival) => isBetter(parts, text, mask, rival),
        ofGates: (gatesName, gates) => riseOn(parts, text, glance, gatesName, gates),
      };
    },
    training(name, rows, steps) {
      const text = texts.text(name, rows, steps * STEP_PARTS * STEP_PART_TOKENS, STEP_PART_TOKENS);
      return {
        parts: STEP_PARTS,
        sample: (step, part, gates) => sampledStep(parts, name, text, step, part, gates),
      };
    },
  };
}

/** Mean loss minus the dense model's, on the first batches. */
async function riseOn(
  parts: WorkbenchParts,
  text: Text,
  batches: number,
  name: string,
  gates: ArrayLike<number>,
): Promise<number> {
  const dense = denseMask(parts.budget.blockWeights.length);
  const losses = await Promise.all(
    Array.from({ length: batches }, (_, index) =>
      Promise.all([lossOf(parts, text, index, name, gates), maskLoss(parts, text, index, dense)]),
    ),
  );
  let [rise, count] = [0, 0];
  for (const [own, reference] of losses) {
    rise += own.sum - reference.sum;
    count += own.positions;
  }
  parts.onResult();
  return rise / count;
}

async function isBetter(parts: WorkbenchParts, text: Text, mask: Mask, rival: Mask): Promise<boolean> {
  let lead = 0;
  for (let index = 0; index < text.batches.length && (index === 0 || lead > 0); index++) {
    const [own, other] = await Promise.all([mask, rival].map((each) => maskLoss(parts, text, index, each)));
    lead += other!.sum - own!.sum;
  }
  parts.onResult();
  return lead > 0;
}

const maskLoss = (parts: WorkbenchParts, text: Text, index: number, mask: Mask) =>
  lossOf(parts, text, index, maskBits(mask), mask.runs);

/** Sum of the loss over the scored positions of one batch, and their number. */
async function lossOf(
  { journal, loss, signal }: WorkbenchParts,
  text: Text,
  index: number,
  name: string,
  gates: ArrayLike<number>,
) {
  const [sum, positions] = await journal.result(`${text.name}.${index} | ${name}`, async () => {
    signal?.throwIfAborted();
    const batch = text.batches[index]!;
    return [(await loss(batch, gates)) * batch.scoredRows.length, batch.scoredRows.length];
  });
  return { sum: sum!, positions: positions! };
}

async function sampledStep(
  { journal, onResult, signal, ...parts }: WorkbenchParts,
  name: string,
  text: Text,
  step: number,
  part: number,
  gates: readonly number[],
) {
  const [loss, ...gradients] = await journal.result(`${name} | ${step}.${part}`, async () => {
    signal?.throwIfAborted();
    // A group with few rows repeats them under other gates.
    const batch = text.batches[(step * STEP_PARTS + part) % text.batches.length]!;
    const result = await parts.step(batch, gates);
    return [result.loss, ...Array.from(result.gradients)];
  });
  onResult();
  return { loss: loss!, gradients };
}
