/**
 * The text that four bits are measured on: a user's rows, or, when nobody has any at hand, what the model itself says
 * after a few openings of many kinds. That needs no data set, and is much like what the model will see.
 */

import { denseMask } from '../../../shared/mask/mask.ts';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import type { Sampling } from '../../engine/engine.ts';
import { openRunner, type Runner } from '../../engine/runner.ts';
import { sample } from '../../engine/sampler.ts';
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
const OWN_TOKENS_PER_INPUT = 2.5;
const OWN_TOKENS_MAX = 8_192;

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
  { seed, signal, onProgress }: OwnTextOptions,
): Promise<CalibrationText> {
  const text = await openModelText(folder, manifest);
  // Where others compete for the cores, two threads that wait for each other take ten times as long as one.
  const runner = await openRunner(folder, manifest.config, { threads: 1 });
  const sequenceTokens = lengthFor(manifest);
  const { hiddenSize, ffnSize } = manifest.config;
  const wanted = Math.min(OWN_TOKENS_MAX, OWN_TOKENS_PER_INPUT * Math.max(hiddenSize, ffnSize));
  const total = Math.ceil(wanted / sequenceTokens) * sequenceTokens;
  const tokenIds = new Int32Array(total);
  const random = seededRandom(seed);
  let opening = 0;
  const nextOpening = () => openingIds(text, OPENINGS[opening++ % OPENINGS.length]!);
  try {
    for (let start = 0; start < total; start += sequenceTokens) {
      const write = createWriter(runner, manifest.eosTokenIds, random, nextOpening);
      for (let length = 0; length < sequenceTokens; ) {
        signal?.throwIfAborted();
        const more = await write(sequenceTokens - length);
        tokenIds.set(more, start + length);
        length += more.length;
        onProgress(start + length, total);
      }
    }
  } finally {
    await runner.close();
  }
  return { tokenIds, sequenceTokens };
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

/** Gives up to `room` more tokens of one sequence: an opening, then a token a call; after an end, another opening. */
function createWriter(
  runner: Runner,
  ends: readonly number[],
  random: () => number,
  nextOpening: () => Int32Array,
): (room: number) => Promise<Int32Array> {
  const cache = runner.newCache();
  const plan = { mask: denseMask(2 * runner.config.layerCount), kv: 'preserve' } as const;
  const state = { generated: new Map(), prompt: new Set<number>(), forbidden: [], random };
  let logits: Float32Array | undefined;
  return async (room) => {
    const token = logits && sample(logits, SAMPLING, state);
    const goesOn = token !== undefined && !ends.includes(token);
    const end = token === undefined ? [] : [token];
    const tokenIds = Int32Array.from(goesOn ? [token] : [...end, ...nextOpening()]).slice(0, room);
    logits = await runner.run({ cache, tokenIds, plan, logitRows: [tokenIds.length - 1] });
    return tokenIds;
  };
}
