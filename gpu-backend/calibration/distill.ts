/**
 * Makes the static encoder's table out of a full sentence encoder, the teacher: every token through the
 * teacher alone gives the first vectors, regression on the teacher's vectors of ordinary text the final ones
 * (as model2vec's later models do).
 */

import { EMBED_CHARS_MAX } from '../../shared/embedding/encoder.ts';
import { normalise } from '../../shared/embedding/pool.ts';
import { encodeStaticTable } from '../../shared/embedding/static-table.ts';
import type { SentenceEncoder } from '../encoder/sentence-encoder.ts';
import type { FitTexts } from './fit-vectors.ts';
import { fitVectors } from './fit-vectors.ts';
import { packPoints } from './kmeans.ts';
import type { PrincipalAxes } from './principal-axes.ts';
import { principalAxes, project } from './principal-axes.ts';
import { quantiseVectors } from './quantise-vectors.ts';

export type DistillOptions = {
  readonly dimensions: number;
  readonly epochs: number;
  readonly seed: number;
  /** `done` of `total` texts seen by the teacher, then epochs of the fit. */
  readonly onProgress?: (stage: 'teacher' | 'fit', done: number, total: number, detail?: string) => void;
};

export const DISTILL_DEFAULTS = { dimensions: 248, epochs: 4, seed: 1 } as const;

/** Texts that the teacher sees between two reports. */
const TEACHER_BATCH = 2048;
/** Found by trials on held-out prompts (LOG.md). */
const FIT = { learningRate: 6e-3, batchTexts: 256, tokenDropout: 0.5 } as const;
/** Tokens of a text that count in the fit; longer texts change nothing but the time. */
const FIT_TOKENS_MAX = 512;
/** Inverse-frequency weight a / (a + p) of Arora et al., 2017, for the first vectors. */
const SIF_A = 1e-3;
/** Length of the mean first vector: sets how far a step of Adam goes. */
const INITIAL_LENGTH = 0.3;

export type Distilled = {
  readonly table: Uint8Array<ArrayBuffer>;
  readonly report: { texts: number; tokens: number; keptByAxes: number; loss: number[] };
};

/** `texts`: ordinary text, distinct. Rejects when `signal` aborts. */
export async function distill(
  teacher: SentenceEncoder,
  texts: readonly string[],
  options: DistillOptions,
  signal?: AbortSignal,
): Promise<Distilled> {
  const { dimensions, epochs, seed, onProgress } = options;
  const taught = await teach(teacher, texts, onProgress, signal);
  const axes = principalAxes(packPoints(taught), dimensions);
  const fitTexts = prepare(teacher, texts, taught, axes);
  const vectors = await firstVectors(teacher, axes, fitTexts.tokenIds, signal);
  const loss: number[] = [];
  await fitVectors(vectors, fitTexts, {
    dimensions,
    epochs,
    seed,
    ...FIT,
    async onEpoch(epoch, meanLoss) {
      signal?.throwIfAborted();
      loss.push(meanLoss);
      onProgress?.('fit', epoch + 1, epochs, `1 - cos ${meanLoss.toFixed(4)}`);
    },
  });
  const table = encodeStaticTable({
    dimensions,
    vocabulary: teacher.vocabulary,
    ...quantiseVectors(vectors, dimensions),
  });
  const report = { texts: texts.length, tokens: fitTexts.tokenIds.length, keptByAxes: axes.kept, loss };
  return { table, report };
}

async function teach(
  teacher: SentenceEncoder,
  texts: readonly string[],
  onProgress: DistillOptions['onProgress'],
  signal: AbortSignal | undefined,
): Promise<Float32Array[]> {
  const vectors: Float32Array[] = [];
  for (let from = 0; from < texts.length; from += TEACHER_BATCH) {
    vectors.push(...(await teacher.embed(texts.slice(from, from + TEACHER_BATCH), signal)));
    onProgress?.('teacher', vectors.length, texts.length);
  }
  return vectors;
}

function prepare(
  teacher: SentenceEncoder,
  texts: readonly string[],
  taught: readonly Float32Array[],
  axes: PrincipalAxes,
): FitTexts {
  const ids = texts.map((text) =>
    teacher.wordPiece.tokenIds(text.slice(0, EMBED_CHARS_MAX)).slice(0, FIT_TOKENS_MAX),
  );
  const offsets = new Uint32Array(ids.length + 1);
  ids.forEach((some, i) => {
    offsets[i + 1] = offsets[i]! + some.length;
  });
  const tokenIds = new Int32Array(offsets.at(-1)!);
  ids.forEach((some, i) => {
    tokenIds.set(some, offsets[i]);
  });
  const targets = project(packPoints(taught), axes).values;
  for (let i = 0; i < texts.length; i++)
    normalise(targets.subarray(i * axes.outputs, (i + 1) * axes.outputs));
  return { tokenIds, offsets, targets };
}

/** Every token through the teacher alone, projected, weighted by inverse frequency in the texts: `[V, D]`. */
async function firstVectors(
  teacher: SentenceEncoder,
  axes: PrincipalAxes,
  tokenIds: Int32Array,
  signal: AbortSignal | undefined,
): Promise<Float32Array> {
  const { clsTokenId, sepTokenId, vocabularySize } = teacher.wordPiece;
  const sequences = Array.from({ length: vocabularySize }, (_, id) => [clsTokenId, id, sepTokenId]);
  const alone = (await teacher.embedTokens(sequences, signal)).map(normalise);
  const { values } = project(packPoints(alone), axes);
  const counts = new Uint32Array(vocabularySize);
  for (const id of tokenIds) counts[id] = counts[id]! + 1;
  let total = 0;
  let known = 0;
  for (let id = 0; id < vocabularySize; id++) {
    const frequency = (counts[id]! + 1) / (tokenIds.length + vocabularySize);
    const weight = SIF_A / (SIF_A + frequency);
    const row = values.subarray(id * axes.outputs, (id + 1) * axes.outputs);
    for (let i = 0; i < row.length; i++) row[i] = row[i]! * weight;
    const length = Math.hypot(...row);
    total += length;
    if (length > 0) known++;
  }
  const factor = (INITIAL_LENGTH * known) / total;
  return values.map((value) => value * factor);
}
