/**
 * Batches of text for a training step, and the graph's inputs made of them: calibration samples of similar length with
 * padding, or rows cut into sequences of one length.
 */

import type { ModelConfig } from '../../model/model-source.ts';
import { SURROGATE_PARTS, type SurrogateTable, surrogateShapes } from '../../model/surrogates.ts';
import type { ModelText } from '../../model/tokenizer/model-text.ts';
import { type Feeds, integers, tensor } from '../../onnx/session.ts';
import { createRandom, permutation } from '../../random.ts';
import type { CalibrationRow } from '../data/read-data.ts';
import { encodeWithoutSystem, type Sample, scoredPositions } from '../data/samples.ts';

/** B sequences of S tokens, R scored positions with K target tokens each. */
export type GateBatch = {
  /** `[B, S]`, row-major. */
  readonly tokenIds: ArrayLike<number>;
  readonly sequences: number;
  /** Positions b·S + s whose prediction counts, `[R]`. */
  readonly scoredRows: ArrayLike<number>;
  /** `[R, K]`; those of a row differ. */
  readonly targetIds: ArrayLike<number>;
  /** `[R, K]`; every row sums to 1, or with `tail` to less. */
  readonly targetProbabilities: ArrayLike<number>;
};

/** The text without targets: input of the teacher. */
export type TextBatch = Pick<GateBatch, 'tokenIds' | 'sequences' | 'scoredRows'>;

/** @throws RangeError when `tokenIds` is not a whole number of sequences. */
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
  config: ModelConfig,
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
    ...(surrogates && surrogateFeeds(surrogates)),
  };
}

/** `blockCount` blocks of the table, all unless given, from block `from` on. */
export function surrogateFeeds(table: SurrogateTable, from = 0, blockCount = table.blockCount): Feeds {
  const shapes = surrogateShapes({ ...table, blockCount });
  return Object.fromEntries(
    SURROGATE_PARTS.map((part) => {
      const size = table[part].length / table.blockCount;
      const values = table[part].subarray(from * size, (from + blockCount) * size);
      return [`surrogate_${part}`, tensor('f32', values, shapes[part])];
    }),
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
 * Batches of calibration samples. Sequences of similar length share a batch, so that there is little padding. Padding
 * is at the end; no other token attends to it, and it is not scored.
 */

export type SampleBatch = TextBatch & {
  readonly tokenIds: Int32Array;
  readonly scoredRows: Int32Array;
  /** The text's own next token at every scored position, `[R]`. */
  readonly nextIds: Int32Array;
};

/**
 * Batches of at most `tokensMax` tokens including padding, but of at least one sample; the shortest samples come first.
 */
export function batchSamples(samples: readonly Sample[], tokensMax: number): SampleBatch[] {
  const groups: Sample[][] = [];
  for (const sample of samples.toSorted((a, b) => a.tokenIds.length - b.tokenIds.length)) {
    const group = groups.at(-1);
    if (group !== undefined && (group.length + 1) * sample.tokenIds.length <= tokensMax) group.push(sample);
    else groups.push([sample]);
  }
  return groups.map(sampleBatch);
}

/** The text's own next tokens as targets: next-token loss instead of KL to the dense model. */
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
    // Padding repeats the last token: an unusual token could distort the scale that quantized activations share.
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
 * Calibration rows packed into full sequences without padding: in a random order, one row of each kind in turn, cut to
 * one length. The rest of a long row begins the next sequence, so some sequences begin like requests and some in the
 * middle of a text.
 */

/** A rest of a row with fewer tokens is dropped. */
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
    let tokens = encodeWithoutSystem(rows[index]!, text, eosTokenId);
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
 * Reorders indices so that kinds alternate, as long as each has rows left: requests may resemble a kind with few rows
 * as well as a kind with many. Within a kind the order stays.
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
