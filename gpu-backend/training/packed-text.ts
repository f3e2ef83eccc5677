/**
 * Calibration rows as full sequences: in a random order, a row of every kind in turn, cut to one length, so that no
 * position is padding. What is left of a long row begins the next sequence, so that some sequences begin
 * as requests do and some in the middle of a text.
 */
import { permutation, seededRandom } from '../calibration/random.ts';
import type { CalibrationRow } from '../calibration/read-data.ts';
import { encodeRow } from '../calibration/samples.ts';
import type { ModelText } from '../model/model-text.ts';

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
  const random = seededRandom(options.seed);
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
 * The same indices, one of every kind in turn as long as each has any left: text that nobody calibrated on is as likely to
 * be like a kind with few rows as like one with many. Each kind keeps the order of its own.
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
