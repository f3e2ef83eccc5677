/**
 * The text that q4 and q8-columns are calibrated on: a user's rows or, without any, passages of many kinds from the
 * project mixed with text that the model generates after a few openings. Generated text resembles what the model will
 * say; passages have words that it would not choose, as people's prompts do (LOG.md compares both).
 */

import { fileURLToPath } from 'node:url';
import { denseMask } from '../../../shared/mask/mask.ts';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { PLAIN_SAMPLING, type Sampling } from '../../engine/engine.ts';
import type { RunInput } from '../../engine/run-input.ts';
import { openRunner } from '../../engine/runner.ts';
import type { Runner } from '../../engine/runner-interface.ts';
import { sample } from '../../engine/sampler.ts';
import { BATCH_PLACES } from '../../model/architectures/batched-attention.ts';
import type { ModelManifest } from '../../model/model-source.ts';
import type { CalibrationText } from '../../model/quantization/calibration.ts';
import type { InstalledModel } from '../../model/store.ts';
import { type ModelText, openModelText } from '../../model/tokenizer/model-text.ts';
import { createRandom, permutation, seededRandom } from '../../random.ts';
import { OPENINGS, type Opening } from './openings.ts';
import { type CalibrationRow, readData } from './read-data.ts';
import { encodeRow, encodeWithoutSystem } from './samples.ts';

/** Tokens of one sequence, where the model's context has room for them. */
const SEQUENCE_TOKENS = 128;
/** Most tokens of a user's text; more takes longer and changes almost nothing. */
const TOKENS_MAX = 16_384;
/** Fewest tokens: with less text, rarely large inputs are not measured well. */
const TOKENS_MIN = 2_048;
/**
 * Tokens of generated text for each input of the model's widest matrix, and the most in all, as generating is slow.
 * Passages give as many.
 */
const OWN_TOKENS_PER_INPUT = 10;
const OWN_TOKENS_MAX = 16_384;
/** Rows in the form of a user's data, written for this purpose. */
export const PASSAGES_FILE = fileURLToPath(new URL('./passages.jsonl', import.meta.url));

const lengthFor = ({ config }: ModelManifest): number => Math.min(SEQUENCE_TOKENS, config.contextTokens);

/**
 * Rows of the files in a random order, concatenated and cut into sequences.
 * @throws MaskrouteError `invalid_data` when a row is wrong, or when there is too little text.
 */
export async function readCalibrationText(
  { folder, manifest }: InstalledModel,
  paths: readonly string[],
  seed: number,
): Promise<CalibrationText> {
  const text = await openModelText(folder, manifest);
  const encode = (row: CalibrationRow) => encodeWithoutSystem(row, text, manifest.eosTokenIds[0]!);
  const sequenceTokens = lengthFor(manifest);
  const limits = { seed, tokensMax: TOKENS_MAX, rowTokensMax: sequenceTokens };
  const found = await rowsInOrder(paths, encode, limits);
  if (found.length < TOKENS_MIN) {
    throw new MaskrouteError(
      'invalid_data',
      `Calibration needs ${TOKENS_MIN} tokens of text; the data has ${found.length}.`,
    );
  }
  return { tokenIds: found.slice(0, found.length - (found.length % sequenceTokens)), sequenceTokens };
}

type RowLimits = { readonly seed: number; readonly tokensMax: number; readonly rowTokensMax: number };

/** Token ids of rows in a random order, one row after the other, until there are enough. */
async function rowsInOrder(
  paths: readonly string[],
  encode: (row: CalibrationRow) => Int32Array,
  { seed, tokensMax, rowTokensMax }: RowLimits,
): Promise<Int32Array> {
  const rows = await readData(paths);
  const tokenIds = new Int32Array(tokensMax);
  let length = 0;
  for (const index of permutation(rows.length, createRandom(seed))) {
    if (length === tokensMax) break;
    // A long row does not crowd out the others.
    const row = encode(rows[index]!).slice(0, rowTokensMax);
    tokenIds.set(row.subarray(0, tokensMax - length), length);
    length = Math.min(tokensMax, length + row.length);
  }
  return tokenIds.slice(0, length);
}

type OwnTextOptions = {
  readonly threads: number;
  readonly seed: number;
  readonly signal?: AbortSignal | undefined;
  /** `done` of `total` tokens are generated. */
  readonly onProgress: (done: number, total: number) => void;
};

/** Varied, but without the unlikely tokens that a small model would sample by mistake. */
const SAMPLING: Sampling = { ...PLAIN_SAMPLING, minP: 0.01 };

/** Passages and as much generated text, alternating. @throws the signal's reason when it aborts. */
export async function writeOwnText(
  { folder, manifest }: InstalledModel,
  { threads, seed, signal, onProgress }: OwnTextOptions,
): Promise<CalibrationText> {
  const text = await openModelText(folder, manifest);
  const { config, eosTokenIds } = manifest;
  const sequenceTokens = lengthFor(manifest);
  const wanted = Math.min(OWN_TOKENS_MAX, OWN_TOKENS_PER_INPUT * Math.max(config.hiddenSize, config.ffnSize));
  const sequences = Math.ceil(wanted / sequenceTokens);
  const runner = await openRunner(folder, config, { threads, batches: true });
  const tokenIds = new Int32Array(sequences * sequenceTokens);
  let done = 0;
  try {
    for (let first = 0; first < sequences; first += BATCH_PLACES) {
      const writers = Array.from({ length: Math.min(BATCH_PLACES, sequences - first) }, (_, place) => {
        const start = (first + place) * sequenceTokens;
        const own = tokenIds.subarray(start, start + sequenceTokens);
        return createWriter(
          runner,
          own,
          openingsFrom(text, first + place),
          eosTokenIds,
          seed + first + place,
        );
      });
      for (let open = writers; open.length > 0; open = open.filter(({ isFull }) => !isFull())) {
        signal?.throwIfAborted();
        const inputs = open.map(({ next }) => next());
        const logits = await runner.runMany(inputs);
        for (const [i, { take }] of open.entries()) take(logits[i]!);
        done += inputs.reduce((sum, input) => sum + input.tokenIds.length, 0);
        onProgress(done, tokenIds.length);
      }
    }
  } finally {
    await runner.close();
  }
  const limits = { seed, tokensMax: tokenIds.length, rowTokensMax: sequenceTokens };
  const passages = await rowsInOrder(
    [PASSAGES_FILE],
    (row) => passageIds(text, row, eosTokenIds[0]!),
    limits,
  );
  return { tokenIds: inTurns(tokenIds, passages, sequenceTokens), sequenceTokens };
}

/** The passage as a chat where the model's template accepts it. */
function passageIds(text: ModelText, row: CalibrationRow, eosTokenId: number): Int32Array {
  const { content } = row;
  try {
    return encodeRow(row, text, eosTokenId);
  } catch (error) {
    if (content.type === 'text') throw error;
    // Some templates refuse a system message.
    return text.encodePrompt(content.turns.map((turn) => turn.content).join('\n\n'));
  }
}

/** Whole sequences of both, spread evenly: any part of the text is a mix. */
function inTurns(a: Int32Array, b: Int32Array, sequenceTokens: number): Int32Array {
  const sequencesOf = (ids: Int32Array) => {
    const count = Math.floor(ids.length / sequenceTokens);
    return Array.from({ length: count }, (_, i) => ({
      place: (i + 0.5) / count,
      ids: ids.subarray(i * sequenceTokens, (i + 1) * sequenceTokens),
    }));
  };
  const sequences = [...sequencesOf(a), ...sequencesOf(b)].sort((one, other) => one.place - other.place);
  const mixed = new Int32Array(sequences.length * sequenceTokens);
  for (const [i, { ids }] of sequences.entries()) mixed.set(ids, i * sequenceTokens);
  return mixed;
}

/** Returns the openings one after the other, from number `first` on. */
function openingsFrom(text: ModelText, first: number): () => Int32Array {
  let at = first;
  return () => openingIds(text, OPENINGS[at++ % OPENINGS.length]!);
}

function openingIds(text: ModelText, opening: Opening): Int32Array {
  if ('text' in opening) return text.encodePrompt(opening.text);
  try {
    return text.encodeChat([{ role: 'user', content: opening.ask }]);
  } catch {
    // A base model has no template, and some templates want more than a question.
    return text.encodePrompt(opening.ask);
  }
}

type Writer = {
  readonly isFull: () => boolean;
  /** The sequence's next tokens, to be run. */
  next(): RunInput & { readonly tokenIds: Int32Array };
  /** Takes the model's logits after these tokens. */
  take(logits: Float32Array): void;
};

/** Fills `sequence`: an opening, then generated tokens; after an end-of-sequence token, the next opening. */
function createWriter(
  runner: Runner,
  sequence: Int32Array,
  nextOpening: () => Int32Array,
  ends: readonly number[],
  seed: number,
): Writer {
  const cache = runner.newCache();
  const plan = { mask: denseMask(2 * runner.config.layerCount), kv: 'preserve' } as const;
  const random = seededRandom(seed);
  const state = { generated: new Map(), prompt: new Set<number>(), forbidden: [], random };
  let token: number | undefined;
  let length = 0;
  return {
    isFull: () => length === sequence.length,
    next() {
      const goesOn = token !== undefined && !ends.includes(token);
      const end = token === undefined ? [] : [token];
      const more = Int32Array.from(goesOn ? end : [...end, ...nextOpening()]);
      const tokenIds = more.subarray(0, sequence.length - length);
      sequence.set(tokenIds, length);
      length += tokenIds.length;
      return { cache, tokenIds, plan, logitRows: [tokenIds.length - 1] };
    },
    take(logits) {
      token = sample(logits, SAMPLING, state);
    },
  };
}
