/**
 * Judges a table of surrogates: KL to the dense model on held-out text, under masks of blocks that are cheap to
 * replace.
 */
import type { InstalledModel } from '../../model/store.ts';
import { SURROGATE_PARTS, type SurrogateTable } from '../../model/surrogates.ts';
import { openLossSession, type TrainingSessionOptions } from '../gates/gate-session.ts';
import type { TaughtBatch } from '../gates/teacher.ts';
import { copyTable } from './distill-surrogates.ts';
import { rankedMask } from './draw-mask.ts';

type Judge = {
  /** Mean KL over masks and the first `batchCount` held-out batches. */
  kl(table: SurrogateTable, masks: readonly Uint8Array[], batchCount?: number): Promise<number>;
  close(): Promise<void>;
};

export async function openJudge(
  { model, ...options }: TrainingSessionOptions & { readonly model: InstalledModel },
  heldOut: readonly TaughtBatch[],
  first: SurrogateTable,
): Promise<Judge> {
  const { folder, manifest } = model;
  // The session always reads the table that it was opened with, so tables to judge are copied into it.
  const surrogates = copyTable(first);
  const session = await openLossSession(folder, manifest.config, {
    ...options,
    surrogates,
    tail: true,
  });
  return {
    async kl(table, masks, batchCount = heldOut.length) {
      for (const part of SURROGATE_PARTS) surrogates[part].set(table[part]);
      let [sum, count] = [0, 0];
      for (const batch of heldOut.slice(0, batchCount)) {
        for (const runs of masks) {
          sum += (await session.loss(batch, runs)) - batch.entropy;
          count++;
        }
      }
      return sum / count;
    },
    close: () => session.close(),
  };
}

/** Cost of replacing each block alone on the first batch, nats, `[2L]`. */
export async function rankBlocks(
  judge: Judge,
  table: SurrogateTable,
  onBlock: (done: number) => void,
  signal: AbortSignal | undefined,
): Promise<number[]> {
  const costs: number[] = [];
  for (let block = 0; block < table.blockCount; block++) {
    signal?.throwIfAborted();
    const runs = new Uint8Array(table.blockCount).fill(1);
    runs[block] = 0;
    costs.push(await judge.kl(table, [runs], 1));
    onBlock(block + 1);
  }
  return costs;
}

/** Most masks in use that are judged. */
const IN_USE_MAX = 6;

/**
 * The judged masks: masks in use, and the cheapest blocks at 12.5 and 25 % evenly split, and attention alone at 25 %.
 */
export function judgedMasks(costs: readonly number[], inUse: readonly Uint8Array[] = []): Uint8Array[] {
  const counts = [0.125, 0.25].map((share) => Math.round(share * costs.length));
  const even = counts.map((count) => rankedMask(costs, Math.floor(count / 2), Math.ceil(count / 2)));
  return [...inUse.slice(0, IN_USE_MAX), ...even, rankedMask(costs, counts[1]!, 0)];
}
