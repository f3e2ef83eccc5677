/**
 * The text of a training step, and how it is fed to a graph: calibration samples of similar length side by side, or rows
 * cut into sequences of one length.
 */

import type { LlamaConfig } from '../../model/model-source.ts';
import type { SurrogateTable } from '../../model/surrogates.ts';
import type { ModelText } from '../../model/tokenizer/model-text.ts';
import { type Feeds, integers, tensor } from '../../onnx/session.ts';
import { createRandom, permutation } from '../../random.ts';
import type { CalibrationRow } from '../data/read-data.ts';
import { encodeRow, type Sample, scoredPositions } from '../data/samples.ts';
import { SURROGATE_PARTS, surrogateShapes } from '../surrogates/surrogate-graph.ts';

/** B sequences of S tokens, R scored positions with K target tokens each. */
export type GateBatch = {
  /** `[B, S]`, row-major. */
  readonly tokenIds: ArrayLike<number>;
  readonly sequences: number;
  /** Positions b·S + s whose prediction counts, `[R]`. */
  readonly scoredRows: ArrayLike<number>;
  /** `[R, K]`. */
  readonly targetIds: ArrayLike<number>;
  /** `[R, K]`; every row sums to 1, or with `tail` to less. */
  readonly targetProbabilities: ArrayLike<number>;
};

/** The text alone: what a teacher is asked about. */
export type TextBatch = Pick<GateBatch, 'tokenIds' | 'sequences' | 'scoredRows'>;

/** @throws RangeError when tokens are not whole sequences. */
export function textFeeds({ tokenIds, sequences: B, scoredRows }: TextBatch): Feeds {
  const S = tokenIds.length / B;
  if (!Number.isInteger(S)) throw new RangeError(`${tokenIds.length} tokens in ${B} sequences`);
  return {
    token_ids: integers(tokenIds, [B, S]),
    scored_rows: integers(scoredRows, [scoredRows.length]),
  };
}

/** @throws RangeError on sizes that do not fit each other. */
export function stepFeeds(
  config: LlamaConfig,
  batch: GateBatch,
  gates: ArrayLike<number>,
  surrogates: SurrogateTable | undefined,
): Feeds {
  const { targetIds, targetProbabilities } = batch;
  const R = batch.scoredRows.length;
  const K = targetIds.length / R;
  if (!Number.isInteger(K) || targetProbabilities.length !== targetIds.length)
    throw new RangeError(
      `${targetIds.length} target ids and ${targetProbabilities.length} probabilities for ${R} positions`,
    );
  if (gates.length !== 2 * config.layerCount)
    throw new RangeError(`${gates.length} gates for ${config.layerCount} layers`);
  return {
    ...textFeeds(batch),
    gates: tensor('f32', Float32Array.from(gates), [gates.length]),
    target_ids: integers(targetIds, [R, K]),
    target_probabilities: tensor('f32', Float32Array.from(targetProbabilities), [R, K]),
    ...(surrogates === undefined ? {} : surrogateFeeds(config, surrogates)),
  };
}

function surrogateFeeds(config: LlamaConfig, table: SurrogateTable): Feeds {
  const shapes = surrogateShapes(config, table.rank);
  return Object.fromEntries(
    SURROGATE_PARTS.map((part) => [`surrogate_${part}`, tensor('f32', table[part], shapes[part])]),
  );
}

/** Every position of every sequence but the last predicts the next token. */
export function nextTokenBatch(tokenIds: ArrayLike<number>, sequences: number): GateBatch {
  const length = tokenIds.length / sequences;
  const scoredRows = Array.from(tokenIds, (_, i) => i).filter((i) => i % length !== length - 1);
  return {
    tokenIds,
    sequences,
    scoredRows,
    targetIds: scoredRows.map((row) => tokenIds[row + 1]!),
    targetProbabilities: scoredRows.map(() => 1),
  };
}

/*
 * Calibration samples. Sequences of similar length stand side by side, so that little is padded; nobody attends to
 * another's tokens, and padding, at the end, is neither attended to nor scored.
 */

export type SampleBatch = TextBatch & {
  readonly tokenIds: Int32Array;
  readonly scoredRows: Int32Array;
  /** The text's own next token at every scored position, `[R]`. */
  readonly nextIds: Int32Array;
};

/** Batches of at most `tokensMax` tokens with padding, but at least one sample each; the shortest come first. */
export function batchSamples(samples: readonly Sample[], tokensMax: number): SampleBatch[] {
  const sorted = samples
    .map((sample, index) => ({ sample, index }))
    .sort((a, b) => a.sample.tokenIds.length - b.sample.tokenIds.length || a.index - b.index);
  const groups: Sample[][] = [];
  for (const { sample } of sorted) {
    const group = groups.at(-1);
    if (group !== undefined && (group.length + 1) * sample.tokenIds.length <= tokensMax) group.push(sample);
    else groups.push([sample]);
  }
  return groups.map(sampleBatch);
}

/** The text as its own target: next-token loss instead of KL to the dense model. */
export const nextTokenTargets = ({ nextIds, ...text }: SampleBatch): GateBatch => ({
  ...text,
  targetIds: nextIds,
  targetProbabilities: new Float32Array(nextIds.length).fill(1),
});

function sampleBatch(samples: readonly Sample[]): SampleBatch {
  const width = Math.max(...samples.map(({ tokenIds }) => tokenIds.length));
  const tokenIds = new Int32Array(samples.length * width);
  const scoredRows: number[] = [];
  const nextIds: number[] = [];
  samples.forEach((sample, row) => {
    const { length } = sample.tokenIds;
    tokenIds.set(sample.tokenIds, row * width);
    // Padding repeats the last token: nothing out of the ordinary for activations that share a scale.
    tokenIds.fill(sample.tokenIds[length - 1]!, row * width + length, (row + 1) * width);
    for (let i = 0; i < scoredPositions(sample); i++) {
      scoredRows.push(row * width + sample.scoreFrom + i);
      nextIds.push(sample.tokenIds[sample.scoreFrom + i + 1]!);
    }
  });
  return {
    tokenIds,
    sequences: samples.length,
    scoredRows: Int32Array.from(scoredRows),
    nextIds: Int32Array.from(nextIds),
  };
}

/*
 * Calibration rows as full sequences: in a random order, a row of every kind in turn, cut to one length, so that no
 * position is padding. What is left of a long row begins the next sequence, so that some sequences begin as requests do
 * and some in the middle of a text.
 */

/** A shorter rest of a row is left out. */
const REST_MIN = 32;

export type PackedText = {
  /** `[sequences, length]`, row-major. */
  readonly tokenIds: Int32Array;
  readonly sequences: number;
  readonly length: number;
};

/** At most `sequencesMax` sequences of `length` tokens; fewer when the rows end before. Equal seeds give equal text. */
export function packRows(
  rows: readonly CalibrationRow[],
  text: ModelText,
  eosTokenId: number,
  options: { readonly length: number; readonly sequencesMax: number; readonly seed: number },
): PackedText {
  const { length, sequencesMax } = options;
  const tokenIds = new Int32Array(length * sequencesMax);
  let filled = 0;
  const random = createRandom(options.seed);
  const kinds = rows.map(({ kind }) => kind);
  for (const index of kindsInTurn(permutation(rows.length, random), kinds)) {
    if (filled === tokenIds.length) break;
    let tokens = encodeRow(rows[index]!, text, eosTokenId);
    while (tokens.length > 0 && filled < tokenIds.length) {
      const taken = tokens.subarray(0, length - (filled % length));
      tokenIds.set(taken, filled);
      filled += taken.length;
      tokens = tokens.subarray(taken.length);
      if (tokens.length < REST_MIN) break;
    }
  }
  const sequences = Math.floor(filled / length);
  return { tokenIds: tokenIds.slice(0, sequences * length), sequences, length };
}

/**
 * The same indices, a row of every kind in turn as long as the kinds last: a request may as well be like a kind with few
 * rows as like one with many. Within a kind the order stays.
 */
export function kindsInTurn(order: ArrayLike<number>, kinds: readonly string[]): number[] {
  const met = new Map<string, number>();
  const turns = Array.from(order, (index) => {
    const turn = met.get(kinds[index]!) ?? 0;
    met.set(kinds[index]!, turn + 1);
    return { index, turn };
  });
  return turns.sort((a, b) => a.turn - b.turn).map(({ index }) => index);
}

/** Sequences `from` to `to`. */
export const sequencesOf = ({ tokenIds, length }: PackedText, from: number, to: number): Int32Array =>
  tokenIds.subarray(from * length, to * length);

/** Every position but a sequence's last predicts a token. */
export const scoredRowsOf = (sequences: number, length: number): Int32Array =>
  Int32Array.from(
    { length: sequences * (length - 1) },
    (_, i) => Math.floor(i / (length - 1)) * length + (i % (length - 1)),
  );
