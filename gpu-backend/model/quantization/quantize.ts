/**
 * The codes of quantized weights, in two forms, and rounding to nearest.
 *
 * In blocks, the layout of ONNX Runtime's MatMulNBits: a row of `[out, in]` is cut into blocks of inputs, each with an fp32
 * scale and a zero point; a weight is (code − zero point) · scale. At 8 bits rounding to nearest costs almost nothing; 4
 * bits need `error-feedback.ts`.
 *
 * By column, for integer products of whole matrices (`architectures/column-products.ts`): signed codes of 8 bits with one
 * scale an output. One scale for so many weights rounds coarser, which error feedback makes good. They are packed as
 * `[in, out]`.
 */
export type QuantForm = { readonly bits: 4 | 8; readonly blockSize: 32 | 64 | 128 };

/** Inputs of a quantization block; widths of quantized matrices, and ranks of surrogates, are multiples of it. */
export const QUANT_BLOCK = 32;
export const PLAIN_8_BITS: QuantForm = { bits: 8, blockSize: QUANT_BLOCK };
export const FOUR_BITS: QuantForm = { bits: 4, blockSize: QUANT_BLOCK };

/** For matrices beside those of another form. Blocks of 64 are read faster and lose nothing at 8 bits; at 4, a quarter more error. */
export const eightBitsOf = (columns: number): QuantForm => ({
  bits: 8,
  blockSize: columns % 64 === 0 ? 64 : 32,
});

/** Unpacked codes: a byte for each code and each zero point, whatever the bits. */
export type QuantCodes = QuantForm & {
  readonly rows: number;
  readonly columns: number;
  /** `[rows, columns]`. */
  readonly codes: Uint8Array;
  /** `[rows, blocks]`. */
  readonly scales: Float32Array;
  /** `[rows, blocks]`. */
  readonly zeroPoints: Uint8Array;
};

/** Packed codes, as the graph reads them. */
type QuantizedRows = {
  /** `[rows, blocks, blockSize·bits/8]`; with 4 bits the even input is in the low half of a byte. */
  readonly values: Uint8Array;
  /** `[rows, blocks]`. */
  readonly scales: Float32Array;
  /** `[rows, ⌈blocks·bits/8⌉]`; with 4 bits the even block is in the low half of a byte. */
  readonly zeroPoints: Uint8Array;
};

export const blocksOf = (columns: number, { blockSize }: QuantForm): number => Math.ceil(columns / blockSize);

/** @throws RangeError unless `columns` is a multiple of the block size. */
export function checkForm(columns: number, { blockSize }: QuantForm): void {
  if (columns % blockSize !== 0) throw new RangeError(`${columns} inputs are not a multiple of ${blockSize}`);
}

/** Rounds row-major `[rows, columns]` to nearest; a block's codes span its range of values. */
export function roundRows(weights: Float32Array, rows: number, columns: number, form: QuantForm): QuantCodes {
  checkForm(columns, form);
  const { blockSize, bits } = form;
  const most = 2 ** bits - 1;
  const codes = new Uint8Array(rows * columns);
  const scales = new Float32Array(codes.length / blockSize);
  const zeroPoints = new Uint8Array(scales.length);
  for (let block = 0; block < scales.length; block++) {
    const start = block * blockSize;
    const end = start + blockSize;
    const low = lowest(weights, start, end);
    const scale = Math.fround((highest(weights, start, end) - low) / most);
    const inverse = scale === 0 ? 0 : 1 / scale;
    const zeroPoint = Math.round(-low * inverse) | 0;
    scales[block] = scale;
    zeroPoints[block] = zeroPoint;
    roundBlock(weights, codes, start, end, inverse, zeroPoint, most);
  }
  return { ...form, rows, columns, codes, scales, zeroPoints };
}

/* Small functions, which V8 optimizes better: imports of large models spend their time here. */

/** The lowest weight of a block, at most 0, as 0 must have a code. */
function lowest(weights: Float32Array, start: number, end: number): number {
  let low = 0;
  for (let i = start; i < end; i++) low = Math.min(low, weights[i]!);
  return low;
}

function highest(weights: Float32Array, start: number, end: number): number {
  let high = 0;
  for (let i = start; i < end; i++) high = Math.max(high, weights[i]!);
  return high;
}

function roundBlock(
  weights: Float32Array,
  codes: Uint8Array,
  start: number,
  end: number,
  inverse: number,
  zeroPoint: number,
  most: number,
): void {
  for (let i = start; i < end; i++) {
    // `Math.round` branches on every value and takes three times as long.
    const code = Math.floor(weights[i]! * inverse + 0.5) + zeroPoint;
    codes[i] = Math.min(most, Math.max(0, code));
  }
}

export function packRows({ bits, rows, codes, scales, zeroPoints }: QuantCodes): QuantizedRows {
  if (bits === 8) return { values: codes, scales, zeroPoints };
  return {
    values: packHalves(codes, codes.length / rows),
    scales,
    zeroPoints: packHalves(zeroPoints, zeroPoints.length / rows),
  };
}

/** Two values a byte, the even value in the low half; every row begins a new byte. */
function packHalves(values: Uint8Array, width: number): Uint8Array {
  const rows = values.length / width;
  const width_bytes = Math.ceil(width / 2);
  const packed = new Uint8Array(rows * width_bytes);
  for (let row = 0; row < rows; row++) {
    for (let i = 0; i < width; i++)
      packed[row * width_bytes + (i >> 1)]! |= values[row * width + i]! << (i % 2 === 0 ? 0 : 4);
  }
  return packed;
}

/** The inverse of {@link packRows}. */
export function unpackRows(
  { values, scales, zeroPoints }: QuantizedRows,
  rows: number,
  columns: number,
  form: QuantForm,
): QuantCodes {
  const plain = form.bits === 8;
  return {
    ...form,
    rows,
    columns,
    scales,
    codes: plain ? values : unpackHalves(values, rows, columns),
    zeroPoints: plain ? zeroPoints : unpackHalves(zeroPoints, rows, blocksOf(columns, form)),
  };
}

function unpackHalves(packed: Uint8Array, rows: number, width: number): Uint8Array {
  const width_bytes = packed.length / rows;
  const values = new Uint8Array(rows * width);
  for (let row = 0; row < rows; row++) {
    for (let i = 0; i < width; i++) {
      const byte = packed[row * width_bytes + (i >> 1)]!;
      values[row * width + i] = i % 2 === 0 ? byte & 15 : byte >> 4;
    }
  }
  return values;
}

/** The weights in fp32, `[rows, columns]`. */
export function dequantize(matrix: MatrixCodes): Float32Array {
  const weights = new Float32Array(matrix.codes.length);
  if (!('blockSize' in matrix)) {
    const { columns, codes, scales } = matrix;
    for (let i = 0; i < codes.length; i++) weights[i] = codes[i]! * scales[Math.floor(i / columns)]!;
    return weights;
  }
  const { blockSize, codes, scales, zeroPoints } = matrix;
  for (let i = 0; i < codes.length; i++) {
    const block = Math.floor(i / blockSize);
    weights[i] = (codes[i]! - zeroPoints[block]!) * scales[block]!;
  }
  return weights;
}

/* By column. */

/** How a matrix is held: in blocks, or by column. */
export type MatrixForm = QuantForm | 'columns';
export type MatrixCodes = QuantCodes | ColumnCodes;

/** A column's largest weight has this code. */
export const COLUMN_CODE_MAX = 127;

export type ColumnCodes = {
  /** Outputs and inputs. An output is a column of the transposed matrix, as products take it. */
  readonly rows: number;
  readonly columns: number;
  /** `[rows, columns]`. */
  readonly codes: Int8Array;
  /** `[rows]`. */
  readonly scales: Float32Array;
};

/** Rows that are packed together: as many bytes as a line of the CPU's cache. */
const PACKED_TOGETHER = 64;

/** The codes as the graph reads them, `[columns, rows]`. */
export function packColumns({ rows, columns, codes }: ColumnCodes): Int8Array {
  const packed = new Int8Array(codes.length);
  for (let from = 0; from < rows; from += PACKED_TOGETHER) {
    const to = Math.min(rows, from + PACKED_TOGETHER);
    for (let column = 0; column < columns; column++) {
      for (let row = from; row < to; row++) packed[column * rows + row] = codes[row * columns + column]!;
    }
  }
  return packed;
}

/** The inverse of {@link packColumns}, of some rows of a matrix: `count` of them, from row `from` on. */
export function unpackColumns(packed: Int8Array, columns: number, from: number, count: number): Int8Array {
  const rows = packed.length / columns;
  const codes = new Int8Array(count * columns);
  for (let row = 0; row < count; row++) {
    for (let column = 0; column < columns; column++)
      codes[row * columns + column] = packed[column * rows + from + row]!;
  }
  return codes;
}

/** Rounds row-major `[rows, columns]` to nearest. */
export const roundMatrix = (
  weights: Float32Array,
  rows: number,
  columns: number,
  form: MatrixForm,
): MatrixCodes =>
  form === 'columns' ? roundColumns(weights, rows, columns) : roundRows(weights, rows, columns, form);

/** One scale a row, as {@link ColumnCodes} has them. */
export function roundColumns(weights: Float32Array, rows: number, columns: number): ColumnCodes {
  const scales = columnScales(weights, rows, columns);
  const codes = new Int8Array(rows * columns);
  for (let row = 0; row < rows; row++) {
    const end = (row + 1) * columns;
    for (let i = row * columns; i < end; i++) codes[i] = columnCode(weights[i]!, scales[row]!);
  }
  return { rows, columns, codes, scales };
}

/** `[rows]`. */
export function columnScales(weights: Float32Array, rows: number, columns: number): Float32Array {
  const scales = new Float32Array(rows);
  for (let row = 0; row < rows; row++) {
    const [start, end] = [row * columns, (row + 1) * columns];
    scales[row] = Math.max(highest(weights, start, end), -lowest(weights, start, end)) / COLUMN_CODE_MAX;
  }
  return scales;
}

/** The code nearest to `weight`. */
export function columnCode(weight: number, scale: number): number {
  const code = scale === 0 ? 0 : Math.floor(weight / scale + 0.5);
  return Math.max(-COLUMN_CODE_MAX, Math.min(COLUMN_CODE_MAX, code));
}
