/**
 * Converts a slice of a matrix: reads rows of the model's file, rotates, rounds and packs them, and writes them to their
 * place in the weights file. A slice is plain data, so that any thread can convert it. The result does not depend on how
 * a matrix is cut into slices.
 */
import { parentPort } from 'node:worker_threads';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { rotateInputs, rotateOutputs, rotateRows, scaleColumns } from '../architectures/rotation.ts';
import { COLUMNS_UNIT, type MatrixParts, matrixInFile, scaleAll } from '../formats/tensor-parts.ts';
import type { TensorPlace } from '../model-source.ts';
import {
  type MatrixCodes,
  type MatrixForm,
  packColumns,
  packRows,
  type QuantForm,
  roundMatrix,
  roundRows,
} from '../quantization/quantize.ts';
import { writeAt } from '../weights-file.ts';

/** The transformation of a matrix before rounding; it depends on the matrix' role for the residual stream. */
export type Turn =
  | { readonly kind: 'none' }
  | { readonly kind: 'scaled'; readonly scale: number }
  /**
   * Multiplies the normalized stream. `scale`: `queryScale` for Q, else 1. `stream` and `inside`: inputs and outputs that are
   * rotated together.
   */
  | {
      readonly kind: 'reads';
      readonly norm: Float32Array;
      readonly scale: number;
      readonly stream: number;
      readonly inside: number;
    }
  /** The embedding, whose rows begin the stream. */
  | { readonly kind: 'embeds'; readonly stream: number }
  /**
   * A block's last product. Its columns are rotated, so a slice must have all rows. `written` and `inside`: outputs and inputs that
   * are rotated together.
   */
  | { readonly kind: 'writes'; readonly written: number; readonly inside: number };

/** Rows of a matrix, and the byte offsets in the weights file where the first row goes. */
export type Slice = {
  readonly from: number;
  readonly rows: number;
  readonly columns: number;
  /** Rows of the whole matrix; codes by column have those of all rows for an input side by side. */
  readonly outputs: number;
  readonly turn: Turn;
  /** Undefined: fp32. */
  readonly form: MatrixForm | undefined;
  readonly valuesAt: number;
  readonly scalesAt: number;
  readonly zeroPointsAt: number;
};

/** Weights that are in memory in fp32 at a time: 8 MB. */
const TILE_WEIGHTS = 2 ** 21;

/** Converts and writes a slice. `descriptor`: the weights file. */
export async function convertSlice(slice: Slice, parts: MatrixParts, descriptor: number): Promise<void> {
  const { from, columns, turn, form } = slice;
  if (turn.kind === 'writes') return convertInTiles(slice, turn, parts, descriptor);
  const rows = await parts.rows(from, slice.rows);
  switch (turn.kind) {
    case 'scaled':
      scaleAll(rows, turn.scale);
      break;
    case 'reads':
      scaleAll(rows, turn.scale);
      scaleColumns(rows, turn.norm);
      rotateRows(rows, turn.stream);
      rotateOutputs(rows, columns, turn.inside);
      break;
    case 'embeds':
      rotateRows(rows, turn.stream);
      break;
    case 'none':
  }
  if (form === undefined) return writeAt(descriptor, slice.valuesAt, rows);
  writeCodes(slice, roundMatrix(rows, slice.rows, columns, form), descriptor);
}

function writeCodes(
  { valuesAt, scalesAt, zeroPointsAt, rows, columns, outputs }: Slice,
  codes: MatrixCodes,
  descriptor: number,
): void {
  writeAt(descriptor, scalesAt, codes.scales);
  if (!('blockSize' in codes)) {
    const packed = packColumns(codes);
    for (let input = 0; input < columns; input++)
      writeAt(descriptor, valuesAt + input * outputs, packed.subarray(input * rows, (input + 1) * rows));
    return;
  }
  const { values, zeroPoints } = packRows(codes);
  writeAt(descriptor, valuesAt, values);
  writeAt(descriptor, zeroPointsAt, zeroPoints);
}

/** Rotates tiles of columns, and writes the whole matrix at the end: a tile has a part of every row. */
async function convertInTiles(
  slice: Slice,
  turn: Writes,
  parts: MatrixParts,
  descriptor: number,
): Promise<void> {
  const { form } = slice;
  if (form === undefined) throw new RangeError('fp32 is not rotated');
  const tiles = rotatedTiles(slice, turn, parts);
  const codes = await (form === 'columns' ? wholeRows(slice, tiles) : rowsInBlocks(slice, form, tiles));
  writeCodes(slice, codes, descriptor);
}

type Writes = Extract<Turn, { readonly kind: 'writes' }>;
type Tile = { readonly from: number; readonly count: number; readonly rows: Float32Array };

/** Rotated tiles of the matrix, `[rows, count]` each. */
async function* rotatedTiles(
  { rows, columns }: Slice,
  { written, inside }: Writes,
  parts: MatrixParts,
): AsyncGenerator<Tile> {
  const width = COLUMNS_UNIT * Math.max(1, Math.floor(TILE_WEIGHTS / rows / COLUMNS_UNIT));
  for (let from = 0; from < columns; from += width) {
    const count = Math.min(width, columns - from);
    const tile = await parts.columns(from, count);
    rotateOutputs(tile, count, written);
    rotateInputs(tile, inside);
    yield { from, count, rows: tile };
  }
}

/** Blocks are rounded tile by tile. */
async function rowsInBlocks(
  { rows, columns }: Slice,
  form: QuantForm,
  tiles: AsyncGenerator<Tile>,
): Promise<MatrixCodes> {
  const codes = new Uint8Array(rows * columns);
  const blocks = columns / form.blockSize;
  const scales = new Float32Array(rows * blocks);
  const zeroPoints = new Uint8Array(rows * blocks);
  for await (const { from, count, rows: tile } of tiles) {
    const rounded = roundRows(tile, rows, count, form);
    const [ownBlocks, block] = [count / form.blockSize, from / form.blockSize];
    for (let row = 0; row < rows; row++) {
      const own = rounded.codes.subarray(row * count, (row + 1) * count);
      codes.set(own, row * columns + from);
      for (let i = 0; i < ownBlocks; i++) {
        scales[row * blocks + block + i] = rounded.scales[row * ownBlocks + i]!;
        zeroPoints[row * blocks + block + i] = rounded.zeroPoints[row * ownBlocks + i]!;
      }
    }
  }
  return { ...form, rows, columns, codes, scales, zeroPoints };
}

/** By column, a scale is known when its whole row is. */
async function wholeRows({ rows, columns }: Slice, tiles: AsyncGenerator<Tile>): Promise<MatrixCodes> {
  const whole = new Float32Array(rows * columns);
  for await (const { from, count, rows: tile } of tiles) {
    for (let row = 0; row < rows; row++)
      whole.set(tile.subarray(row * count, (row + 1) * count), row * columns + from);
  }
  return roundMatrix(whole, rows, columns, 'columns');
}

/** Most memory of a slice in bytes: the source's bytes, fp32, codes and packed codes. */
export const sliceBytes = ({ rows, columns, turn, form }: Slice, source_bytesPerWeight: number): number =>
  turn.kind === 'writes' && form !== 'columns'
    ? rows * columns * (source_bytesPerWeight + 2) + 3 * 4 * TILE_WEIGHTS
    : rows * columns * (source_bytesPerWeight + 4 + 2);

/* This file is also a thread that converts slices, one after the other. */

export type ToConversion = {
  readonly slice: Slice;
  readonly place: TensorPlace;
  /** The weights file. */
  readonly descriptor: number;
};

export type FromConversion =
  | { readonly kind: 'done' }
  | {
      readonly kind: 'failed';
      readonly message: string;
      /** The code of a `MaskrouteError`. */
      readonly code: string | undefined;
      /** The code of a system error, such as `ENOSPC`. */
      readonly errno: string | undefined;
    };

if (import.meta.main) {
  parentPort!.on('message', async ({ slice, place, descriptor }: ToConversion) => {
    let answer: FromConversion = { kind: 'done' };
    try {
      await convertSlice(slice, matrixInFile(place), descriptor);
    } catch (error) {
      const { message, code } = error as NodeJS.ErrnoException;
      const isOurs = error instanceof MaskrouteError;
      answer = {
        kind: 'failed',
        message,
        code: isOurs ? error.code : undefined,
        errno: isOurs ? undefined : code,
      };
    }
    parentPort!.postMessage(answer);
  });
}
