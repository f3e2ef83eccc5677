/**
 * `maskroute distill`: makes the static encoder's table from calibration files and a full sentence encoder, the
 * teacher. The teacher's vector of each single token is the start; regression on its vectors of ordinary text gives the
 * final table (as in model2vec's later models).
 */
import { EMBED_CHARS_MAX, normalise } from '../../../shared/embedding/encoder.ts';
import { encodeStaticTable } from '../../../shared/embedding/static-encoder.ts';
import { loadWordPiece, type WordPiece } from '../../../shared/embedding/wordpiece.ts';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { openFullEncoder } from '../../encoder/full-encoder.ts';
import type { SentenceEncoder } from '../../encoder/sentence-encoder.ts';
import { finishInTurns } from '../../event-loop.ts';
import { makeOutFolderOf, writeWhole } from '../../files.ts';
import type { ImportHooks } from '../../model/model-source.ts';
import { type FitTexts, fitVectors, type PrincipalAxes, principalAxes, project } from './fit-vectors.ts';
import { packPoints } from './kmeans.ts';
import { type CalibrationRow, readData } from './read-data.ts';

/** Most sentences of one row: enough to cover a long document's words, but not so many that it outweighs other rows. */
const SENTENCES_PER_ROW_MAX = 12;

type DistillTableOptions = {
  /** As `openFullEncoder` takes it. */
  readonly encoder: string;
  readonly data: readonly string[];
  readonly out: string;
  readonly home: string;
  readonly threads: number;
  readonly dimensions: number;
  readonly seed: number;
  /** For a teacher that has to be downloaded; their signal stops all of the work. */
  readonly hooks: ImportHooks;
  readonly onProgress: NonNullable<DistillOptions['onProgress']>;
};

/**
 * Writes the table whole or not at all. @throws MaskrouteError `invalid_data`, `invalid_argument`, `invalid_encoder`,
 * `download_failed`, `storage_failed`.
 */
export async function distillTable(options: DistillTableOptions): Promise<Distilled['report']> {
  const { encoder, data, out, home, threads, dimensions, seed, hooks, onProgress } = options;
  const rows = await readData(data, undefined, hooks.signal);
  await makeOutFolderOf(out);
  const teacher = await openFullEncoder(encoder, { home, threads, hooks });
  try {
    const settings = { dimensions, epochs: EPOCHS, seed, onProgress };
    const texts = snippets(rows, SENTENCES_PER_ROW_MAX);
    const { table, report } = await distill(teacher, texts, settings, hooks.signal);
    await writeWhole(out, table);
    return report;
  } finally {
    await teacher.close();
  }
}

type DistillOptions = {
  readonly dimensions: number;
  readonly epochs: number;
  readonly seed: number;
  /** `done` of `total`: texts embedded by the teacher, then epochs of the fit. */
  readonly onProgress?: (stage: 'teacher' | 'fit', done: number, total: number, detail?: string) => void;
};

const EPOCHS = 4;

/** Texts that the teacher embeds between two progress reports. */
const TEACHER_BATCH = 2048;
/** Found by trials on held-out prompts (LOG.md). */
const FIT = { learningRate: 6e-3, batchTexts: 256, tokenDropout: 0.5 } as const;
/** Tokens of a text that the fit uses; more only take longer. */
const FIT_TOKENS_MAX = 512;
/** Inverse-frequency weight a / (a + p) of Arora et al., 2017, for the first vectors. */
const SIF_A = 1e-3;
/** Length to which the mean first vector is scaled: decides how far a step of Adam moves relative to it. */
const INITIAL_LENGTH = 0.3;

type Distilled = {
  readonly table: Uint8Array<ArrayBuffer>;
  readonly report: { texts: number; tokens: number };
};

/**
 * `texts`: ordinary text, distinct. Rejects when `signal` aborts.
 * @throws MaskrouteError `invalid_argument` for more dimensions than the teacher has.
 */
export async function distill(
  teacher: SentenceEncoder,
  texts: readonly string[],
  options: DistillOptions,
  signal?: AbortSignal,
): Promise<Distilled> {
  const { dimensions, epochs, seed, onProgress } = options;
  const most = teacher.spec.dimensions;
  if (dimensions > most) {
    const message = `The teacher's vectors have ${most} dimensions, and a table of it at most as many, not ${dimensions}.`;
    throw new MaskrouteError('invalid_argument', message);
  }
  const taught = await teach(teacher, texts, onProgress, signal);
  const axes = principalAxes(packPoints(taught), dimensions);
  const pieces = piecesFor(teacher, texts);
  const fitTexts = prepare(pieces, texts, taught, axes);
  const vectors = await firstVectors(pieces, axes, fitTexts.tokenIds, signal);
  const onEpoch = (epoch: number, meanLoss: number) =>
    onProgress?.('fit', epoch + 1, epochs, `1 - cos ${meanLoss.toFixed(4)}`);
  await finishInTurns(fitVectors(vectors, fitTexts, { dimensions, epochs, seed, ...FIT, onEpoch }), signal);
  const table = encodeStaticTable({
    dimensions,
    vocabulary: pieces.vocabulary,
    ...quantiseVectors(vectors, dimensions),
  });
  const report = { texts: texts.length, tokens: fitTexts.tokenIds.length };
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

/** The table's tokens: how texts are tokenized, and what the teacher embeds for each token alone. */
type Pieces = {
  readonly vocabulary: readonly string[];
  readonly wordPiece: WordPiece;
  alone(signal: AbortSignal | undefined): Promise<Float32Array[]>;
};

/** The teacher's own tokens if it uses WordPiece; otherwise the words and letters of the texts. */
function piecesFor(teacher: SentenceEncoder, texts: readonly string[]): Pieces {
  if (teacher.wordPiece !== undefined) {
    const { vocabulary, pieces } = teacher.wordPiece;
    const { clsTokenId, sepTokenId } = pieces;
    const sequences = vocabulary.map((_, id) => [clsTokenId, id, sepTokenId]);
    return { vocabulary, wordPiece: pieces, alone: (signal) => teacher.embedTokens(sequences, signal) };
  }
  const vocabulary = wordsOf(texts);
  return {
    vocabulary,
    wordPiece: loadWordPiece(vocabulary),
    alone: (signal) =>
      teacher.embed(
        vocabulary.map((token) => token.replace(/^##/, '')),
        signal,
      ),
  };
}

const SPECIAL_TOKENS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]'];
/** As many as the tables of English encoders have: some megabytes. */
const WORDS_MAX = 24_000;
const LETTERS_MAX = 3000;

/** A WordPiece vocabulary: the most frequent words, and letters to spell the others. */
function wordsOf(texts: readonly string[]): string[] {
  const words = new Map<string, number>();
  const letters = new Map<string, number>();
  const count = (counts: Map<string, number>, key: string) => counts.set(key, (counts.get(key) ?? 0) + 1);
  for (const text of texts) {
    // Uncased and without accents, as the edge's tokenizer reads text.
    const plain = text
      .slice(0, EMBED_CHARS_MAX)
      .toLowerCase()
      .normalize('NFD')
      .replace(/\p{Mn}/gu, '');
    for (const word of plain.match(/[\p{L}\p{N}]+|[^\s\p{L}\p{N}]/gu) ?? []) {
      count(words, word);
      for (const letter of word) count(letters, letter);
    }
  }
  const most = (counts: Map<string, number>, max: number) =>
    [...counts].sort(([a, m], [b, n]) => n - m || (a < b ? -1 : 1)).slice(0, max);
  const spelled = most(letters, LETTERS_MAX).flatMap(([letter]) => [letter, `##${letter}`]);
  const whole = most(words, WORDS_MAX).flatMap(([word, times]) => (times > 1 ? [word] : []));
  return [...new Set([...SPECIAL_TOKENS, ...spelled, ...whole])];
}

function prepare(
  { wordPiece }: Pieces,
  texts: readonly string[],
  taught: readonly Float32Array[],
  axes: PrincipalAxes,
): FitTexts {
  const ids = texts.map((text) =>
    wordPiece.tokenIds(text.slice(0, EMBED_CHARS_MAX)).slice(0, FIT_TOKENS_MAX),
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

/** The teacher's vector of each token alone, projected, and weighted by inverse frequency in the texts: `[V, D]`. */
async function firstVectors(
  pieces: Pieces,
  axes: PrincipalAxes,
  tokenIds: Int32Array,
  signal: AbortSignal | undefined,
): Promise<Float32Array> {
  const vocabularySize = pieces.vocabulary.length;
  const alone = (await pieces.alone(signal)).map(normalise);
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

/** Shorter sentences are joined to the next. */
const SENTENCE_CHARS_MIN = 24;
const SENTENCE_CHARS_MAX = 400;

/**
 * Distinct texts from calibration rows, in row order: first every prompt as the edge would embed it, then the sentences
 * of all messages, so that words occur in many contexts.
 * @param sentencesPerRowMax bounds what one long document contributes.
 */
export function snippets(rows: readonly CalibrationRow[], sentencesPerRowMax: number): string[] {
  const found = new Set<string>();
  for (const row of rows) found.add(row.routeText);
  for (const row of rows) {
    const texts =
      row.content.type === 'chat' ? row.content.turns.map((turn) => turn.content) : [row.content.text];
    for (const sentence of texts.flatMap(sentences).slice(0, sentencesPerRowMax)) found.add(sentence);
  }
  found.delete('');
  return [...found];
}

/** Sentences and lines of a text; short ones are joined, and text without sentence ends is cut by length. */
function sentences(text: string): string[] {
  const pieces = text.split(/(?<=[.!?。！？।])\s+|\n+/u).flatMap((piece) => chunks(piece.trim()));
  const result: string[] = [];
  let pending = '';
  for (const piece of pieces) {
    pending = pending === '' ? piece : `${pending} ${piece}`;
    if (pending.length < SENTENCE_CHARS_MIN) continue;
    result.push(pending);
    pending = '';
  }
  if (pending !== '') result.push(pending);
  return result;
}

function chunks(piece: string): string[] {
  const result: string[] = [];
  for (let at = 0; at < piece.length; at += SENTENCE_CHARS_MAX)
    result.push(piece.slice(at, at + SENTENCE_CHARS_MAX));
  return result;
}

type QuantisedVectors = { readonly scales: Float32Array; readonly vectors: Int8Array };

/**
 * Quantizes token vectors `[V, dimensions]` to int8 with one scale a token: a quarter of fp32's size, and routing is
 * not affected. Each row's largest number becomes ±127.
 */
export function quantiseVectors(vectors: Float32Array, dimensions: number): QuantisedVectors {
  const size = vectors.length / dimensions;
  const scales = new Float32Array(size);
  const quantised = new Int8Array(vectors.length);
  for (let row = 0; row < size; row++) {
    const values = vectors.subarray(row * dimensions, (row + 1) * dimensions);
    let largest = 0;
    for (const value of values) largest = Math.max(largest, Math.abs(value));
    const scale = largest / 127;
    scales[row] = scale;
    if (scale === 0) continue;
    for (let i = 0; i < dimensions; i++) quantised[row * dimensions + i] = Math.round(values[i]! / scale);
  }
  return { scales, vectors: quantised };
}
