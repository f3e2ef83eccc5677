/** Scores each row under the masks that it needs, one row at a time, with results kept on disk by content. */
import type { z } from 'zod';
import type { Mask, ModelHash } from '../../../shared/mask/mask.ts';
import { isDense, maskId } from '../../../shared/mask/mask.ts';
import type { InstalledModel } from '../../model/store.ts';
import { CPU, type Device, deviceName } from '../../onnx/device.ts';
import type { Sample } from '../data/samples.ts';
import { type Journal, modelKey, openKeptResults, sampleKey } from '../journal.ts';
import { type SampleScores, SCORES_VERSION, type Scorer, sampleScoresSchema } from '../search/score-masks.ts';

/** The model under evaluation, what computes it, and where its answers are kept. */
export type Evaluated = {
  readonly home: string;
  readonly model: InstalledModel;
  readonly threads: number;
  /** What runs and times the model; the CPU unless given. */
  readonly device?: Device | undefined;
};

/**
 * What the model answered to `question` before, by this version of scoring and on this device: another one rounds
 * otherwise, and figures are only compared with what was computed alike.
 */
export const openKeptAnswers = <T>(
  { home, model, device = CPU }: Evaluated,
  question: { readonly kind: string } & Record<string, unknown>,
  schema: z.ZodType<T>,
): Promise<Journal<T>> =>
  openKeptResults(
    home,
    {
      version: SCORES_VERSION,
      model: modelKey(model.manifest),
      ...question,
      // Results of the CPU from before devices were told apart stay valid.
      ...(device.kind === 'cpu' ? {} : { device: deviceName(device) }),
    },
    schema,
  );

type RowScoring = {
  readonly evaluated: Evaluated;
  readonly scorer: Scorer;
  readonly samples: readonly Sample[];
  readonly onProgress: (done: number, total: number) => void;
  readonly signal?: AbortSignal | undefined;
};

/** @throws Error for a mask that was not scored on the row. */
type ScoresOf = (row: number, mask: Mask) => SampleScores;

/**
 * Returns a function that gives the scores. `masks[row]`: the masks to score on each sample. Rejects when `signal`
 * aborts; the next run reuses finished scores.
 */
export async function scoreRows(
  { evaluated, scorer, samples, onProgress, signal }: RowScoring,
  masks: readonly (readonly Mask[])[],
): Promise<ScoresOf> {
  const { hash } = evaluated.model.manifest;
  const total = masks.reduce((sum, some) => sum + distinct(hash, some).size, 0);
  const journals: Journal<SampleScores>[] = [];
  let done = 0;
  for (const [row, sample] of samples.entries()) {
    const question = { kind: 'scores', sample: sampleKey([sample]) };
    const journal = await openKeptAnswers(evaluated, question, sampleScoresSchema);
    journals.push(journal);
    const wanted = distinct(hash, masks[row]!);
    const missing = [...wanted].filter(([id]) => journal.get(id) === undefined);
    done += wanted.size - missing.length;
    if (missing.length > 0) {
      signal?.throwIfAborted();
      const reference = await scorer.reference(sample);
      for (const [id, mask] of missing) {
        signal?.throwIfAborted();
        const scores = isDense(mask) ? reference.scores : await scorer.score(reference, mask);
        await journal.set(id, scores);
        onProgress(++done, total);
      }
    }
    onProgress(done, total);
  }
  return (row, mask) => {
    const scores = journals[row]!.get(maskId(hash, mask));
    if (scores === undefined) throw new Error(`mask ${maskId(hash, mask)} was not scored on row ${row}`);
    return scores;
  };
}

const distinct = (hash: ModelHash, masks: readonly Mask[]): Map<string, Mask> =>
  new Map(masks.map((mask) => [maskId(hash, mask), mask]));
