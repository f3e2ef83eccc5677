/**
 * The text that four bits are measured on: a user's rows, or, when nobody has any at hand, what the model itself says
 * after a few openings of many kinds. That needs no data set, and is much like what the model will see.
 */

import { denseMask } from '../../../shared/mask/mask.ts';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import type { RunInput } from '../../engine/batch-run.ts';
import type { Sampling } from '../../engine/engine.ts';
import { openRunner, type Runner } from '../../engine/runner.ts';
import { sample } from '../../engine/sampler.ts';
import { BATCH_PLACES } from '../../model/architectures/batched-llama.ts';
import type { ModelManifest } from '../../model/model-source.ts';
import type { CalibrationText } from '../../model/quantization/calibration.ts';
import type { InstalledModel } from '../../model/store.ts';
import { type ModelText, openModelText } from '../../model/tokenizer/model-text.ts';
import { createRandom, permutation, seededRandom } from '../../random.ts';
import { OPENINGS, type Opening } from './openings.ts';
import { readData } from './read-data.ts';
import { encodeRow } from './samples.ts';

/** Tokens of one sequence, where the model's context has room for them. */
const SEQUENCE_TOKENS = 128;
/** Of a user's text, at most; more takes longer and changes next to nothing. */
const TOKENS_MAX = 16_384;
/** Less says too little about inputs that seldom are large. */
const TOKENS_MIN = 2_048;
/** Of the model's own text, for each input of its widest matrix; and at most, as writing takes its time. */
const OWN_TOKENS_PER_INPUT = 8;
const OWN_TOKENS_MAX = 16_384;

const lengthFor = ({ config }: ModelManifest): number => Math.min(SEQUENCE_TOKENS, config.contextTokens);

/**
 * Rows of the files in a random order, one after the other, cut into sequences.
 * @throws MaskrouteError `invalid_data` when a row is wrong, or when there is too little text.
 */
export async function readCalibrationText(
  { folder, manifest }: InstalledModel,
  paths: readonly string[],
  seed: number,
): Promise<CalibrationText> {
  const text = await openModelText(folder, manifest);
  const { rows } = await readData(paths);
  const sequenceTokens = lengthFor(manifest);
  const tokenIds = new Int32Array(TOKENS_MAX);
  let length = 0;
  for (const index of permutation(rows.length, createRandom(seed))) {
    // A long row does not crowd out the others.
    const row = encodeRow(rows[index]!, text, manifest.eosTokenIds[0]!).slice(0, sequenceTokens);
    tokenIds.set(row.subarray(0, tokenIds.length - length), length);
    length = Math.min(tokenIds.length, length + row.length);
  }
  if (length < TOKENS_MIN) {
    throw new MaskrouteError(
      'invalid_data',
      `Four bits need ${TOKENS_MIN} tokens of text to be measured on; the data has ${length}.`,
    );
  }
  return { tokenIds: tokenIds.slice(0, length - (length % sequenceTokens)), sequenceTokens };
}

export type OwnTextOptions = {
  readonly threads: number;
  readonly seed: number;
  readonly signal?: AbortSignal | undefined;
  /** Tokens that are written, and all that will be. */
  readonly onProgress: (done: number, total: number) => void;
};

/** Varied, but without the tokens that a small model gives by mistake. */
const SAMPLING: Sampling = {
  ...{ temperature: 1, topP: 1, topK: 0, minP: 0.01, repetitionPenalty: 1 },
  ...{ presencePenalty: 0, frequencyPenalty: 0, logitBias: [], seed: undefined },
};

/** @throws the signal's reason when it aborts. */
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
  return { tokenIds, sequenceTokens };
}

/** Openings in their order, each sequence from its own on. */
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
  /** What the model says after them. */
  take(logits: Float32Array): void;
};

/** Fills `sequence`: an opening, then one token after the other; after an end, another opening. */
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
