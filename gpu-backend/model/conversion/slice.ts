/**
 * From rows of a file's matrix to bytes of the weights file: rotated, rounded, packed, written in their place. A slice of a
 * matrix is plain data, so that any thread can do it, and what comes out does not depend on how a matrix is cut.
 */
import { parentPort } from 'node:worker_threads';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { rotateColumns, rotateRows, scaleColumns } from '../architectures/rotation.ts';
import { COLUMNS_UNIT, type MatrixParts, matrixInFile } from '../formats/tensor-parts.ts';
import type { TensorPlace } from '../model-source.ts';
import { packRows, type QuantForm, roundRows } from '../quantization/quantize.ts';
import { writeAt } from '../weights-file.ts';

/** What is done to a matrix besides rounding, by what it does to the residual stream. */
export type Turn =
  | { readonly kind: 'none' }
  | { readonly kind: 'scaled'; readonly scale: number }
  /** It multiplies the normalized stream. `scale`: of Q, see `queryScale`. */
  | { readonly kind: 'reads'; readonly norm: Float32Array; readonly scale: number }
  /** The embedding, whose rows begin the stream. */
  | { readonly kind: 'embeds' }
  /** Its product is added to the stream: all of its rows are turned together, so a slice is all of it. */
  | { readonly kind: 'writes' };

/** Rows of a matrix and where they go. Bytes from the file's beginning, of the first row. */
export type Slice = {
  readonly from: number;
  readonly rows: number;
  readonly columns: number;
  readonly turn: Turn;
  /** Undefined: fp32. */
  readonly form: QuantForm | undefined;
  readonly valuesAt: number;
  readonly scalesAt: number;
  readonly zeroPointsAt: number;
};

/** Rows and columns of a part that is in memory in fp32: some 8 MB. */
const TILE_WEIGHTS = 2 ** 21;

/** `descriptor`: of the weights file. */
export async function convertSlice(slice: Slice, parts: MatrixParts, descriptor: number): Promise<void> {
  if (slice.turn.kind === 'writes') return convertColumns(slice, parts, descriptor);
  const { from, columns, turn, form } = slice;
  const rows = await parts.rows(from, slice.rows);
  switch (turn.kind) {
    case 'scaled':
      scale(rows, turn.scale);
      break;
    case 'reads':
      scale(rows, turn.scale);
      scaleColumns(rows, turn.norm);
      rotateRows(rows, columns);
      break;
    case 'embeds':
      rotateRows(rows, columns);
      break;
    case 'none':
  }
  if (form === undefined) return writeAt(descriptor, slice.valuesAt, rows);
  const packed = packRows(roundRows(rows, slice.rows, columns, form));
  writeAt(descriptor, slice.valuesAt, packed.values);
  writeAt(descriptor, slice.scalesAt, packed.scales);
  writeAt(descriptor, slice.zeroPointsAt, packed.zeroPoints);
}

function scale(values: Float32Array, factor: number): void {
  if (factor !== 1) for (let i = 0; i < values.length; i++) values[i]! *= factor;
}

/** The codes of all columns come together in memory: in the file, those of some columns lie apart. */
async function convertColumns(
  { rows, columns, form, valuesAt, scalesAt, zeroPointsAt }: Slice,
  parts: MatrixParts,
  descriptor: number,
): Promise<void> {
  if (form === undefined) throw new RangeError('fp32 is not turned');
  const codes = new Uint8Array(rows * columns);
  const blocks = columns / form.blockSize;
  const scales = new Float32Array(rows * blocks);
  const zeroPoints = new Uint8Array(rows * blocks);
  const width = COLUMNS_UNIT * Math.max(1, Math.floor(TILE_WEIGHTS / rows / COLUMNS_UNIT));
  for (let from = 0; from < columns; from += width) {
    const count = Math.min(width, columns - from);
    const tile = rotateColumns(await parts.columns(from, count), rows);
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
  const packed = packRows({ ...form, rows, columns, codes, scales, zeroPoints });
  writeAt(descriptor, valuesAt, packed.values);
  writeAt(descriptor, scalesAt, packed.scales);
  writeAt(descriptor, zeroPointsAt, packed.zeroPoints);
}

/** Bytes in memory while a slice is done, at the most: as the file has it, in fp32, as codes, and packed. */
export const sliceBytes = ({ rows, columns, turn }: Slice, source_bytesPerWeight: number): number =>
  turn.kind === 'writes'
    ? rows * columns * (source_bytesPerWeight + 2) + 3 * 4 * TILE_WEIGHTS
    : rows * columns * (source_bytesPerWeight + 4 + 2);

/* This file is also a thread that converts slices, one after the other. */

export type ToConversion = {
  readonly slice: Slice;
  readonly place: TensorPlace;
  /** Of the weights file. */
  readonly descriptor: number;
};

export type FromConversion =
  | { readonly kind: 'done' }
  | {
      readonly kind: 'failed';
      readonly message: string;
      /** Of a `MaskrouteError`. */
      readonly code: string | undefined;
      /** Of a system's error, such as `ENOSPC`. */
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
