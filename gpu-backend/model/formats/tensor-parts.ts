/**
 * Reads a tensor of an open file as fp32: whole, by rows or by columns. A `TensorPlace` is plain data, so that any thread of
 * this process can read a part; threads share open files.
 */
import { read } from 'node:fs';
import { promisify } from 'node:util';
import { type DecoderTensor, toHalfSplitRotary } from '../families.ts';
import { corruptModel, type FileSource, type ModelConfig, type TensorPlace } from '../model-source.ts';
import { bytesOf, elementsOf, tensorType } from './dequantize.ts';

/** A model's tensors in open files. `stored`: the place of the file's tensor that has this one, alone or in a stack. */
export function tensorsInFiles(
  config: ModelConfig,
  tensors: readonly DecoderTensor[],
  stored: (tensor: DecoderTensor) => TensorPlace,
): FileSource {
  const named = new Map(tensors.map((tensor) => [tensor.name, tensor]));
  const find = (name: string): DecoderTensor => {
    const tensor = named.get(name);
    if (tensor === undefined) throw new RangeError(`the model has no tensor ${name}`);
    return tensor;
  };
  const place = (name: string): TensorPlace => {
    const tensor = find(name);
    const { firstRow, shape, scale } = tensor;
    const whole = stored(tensor);
    const row_bytes = bytesOf(tensorType(whole.type)!, elementsOf(shape.slice(1)));
    return { ...whole, offset: whole.offset + firstRow * row_bytes, shape, scale };
  };
  return {
    config,
    shape: (name) => find(name).shape,
    place,
    read: async (name) => readTensor(place(name)),
  };
}

/** Parts of a matrix `[rows, columns]`, row-major. */
export type MatrixParts = {
  /** `[count, columns]`; for Q and K, whole heads only. */
  rows(from: number, count: number): Promise<Float32Array>;
  /** `[rows, count]`; both ends are multiples of {@link COLUMNS_UNIT}, or the matrix's own. */
  columns(from: number, count: number): Promise<Float32Array>;
};

/** The largest blocks of quantized types. */
export const COLUMNS_UNIT = 256;

/** The parts of a matrix in a file. Reading columns keeps the whole tensor in memory, in the file's format. */
export function matrixInFile(place: TensorPlace): MatrixParts {
  const [rowCount, columnCount] = place.shape as [number, number];
  const type = tensorType(place.type)!;
  const row_bytes = bytesOf(type, columnCount);
  let whole: Uint8Array | undefined;
  return {
    async rows(from, count) {
      const part = { ...place, offset: place.offset + from * row_bytes };
      return readElements(part, count * columnCount, count);
    },
    async columns(from, count) {
      if (whole === undefined) {
        whole = new Uint8Array(rowCount * row_bytes);
        await readFully(place, whole, 0);
      }
      const [begin, length] = [bytesOf(type, from), bytesOf(type, count)];
      const out = new Float32Array(rowCount * count);
      for (let row = 0; row < rowCount; row++) {
        const at = row * row_bytes + begin;
        type.dequantize(whole.subarray(at, at + length), out.subarray(row * count, (row + 1) * count));
      }
      finish(place, out);
      return out;
    },
  };
}

const ROWS_COMPARED = 1024;

/** Whether two matrices have the same shape and values. */
export async function areEqual(one: TensorPlace, other: TensorPlace): Promise<boolean> {
  if (one.shape.join() !== other.shape.join()) return false;
  const [rowCount] = one.shape as [number, number];
  const [left, right] = [matrixInFile(one), matrixInFile(other)];
  for (let from = 0; from < rowCount; from += ROWS_COMPARED) {
    const count = Math.min(ROWS_COMPARED, rowCount - from);
    const [ours, theirs] = [await left.rows(from, count), await right.rows(from, count)];
    // A loop takes three times as long.
    if (Buffer.compare(bytesIn(ours), bytesIn(theirs)) !== 0) return false;
  }
  return true;
}

const bytesIn = ({ buffer, byteOffset, byteLength }: Float32Array): Uint8Array =>
  new Uint8Array(buffer, byteOffset, byteLength);

/** The whole tensor; rows of Q and K are in half-split order, whatever the file's order. @throws as `readElements`. */
export const readTensor = (place: TensorPlace): Promise<Float32Array> =>
  readElements(place, elementsOf(place.shape), place.shape[0] ?? 1);

/** Bytes that are read at a time, so that only the result is in memory as a whole. */
const CHUNK_BYTES = 8 * 1024 * 1024;

/**
 * Reads `elements` values, which are `rows` rows, from the place's offset on.
 * @throws MaskrouteError `corrupt_model` when the file ends early or holds a value that is not finite.
 */
async function readElements(place: TensorPlace, elements: number, rows: number): Promise<Float32Array> {
  const type = tensorType(place.type)!;
  const out = new Float32Array(elements);
  const chunkBlocks = Math.max(1, Math.floor(CHUNK_BYTES / type.blockBytes));
  const blocks = elements / type.blockSize;
  const buffer = new Uint8Array(Math.min(chunkBlocks, blocks) * type.blockBytes);
  for (let block = 0; block < blocks; block += chunkBlocks) {
    const count = Math.min(chunkBlocks, blocks - block);
    const bytes = buffer.subarray(0, count * type.blockBytes);
    await readFully(place, bytes, block * type.blockBytes);
    const values = out.subarray(block * type.blockSize, (block + count) * type.blockSize);
    type.dequantize(bytes, values);
    finish(place, values);
  }
  const { interleavedHeads, shape } = place;
  if (interleavedHeads === undefined) return out;
  return toHalfSplitRotary(out, (interleavedHeads * rows) / shape[0]!, elements / rows);
}

const readDescriptor = promisify(read);

/** Fills `bytes` from byte `start` of the tensor on. */
async function readFully(
  { descriptor, offset, name }: TensorPlace,
  bytes: Uint8Array,
  start: number,
): Promise<void> {
  for (let done = 0; done < bytes.length; ) {
    const left = Math.min(bytes.length - done, 2 ** 30);
    const { bytesRead } = await readDescriptor(descriptor, bytes, done, left, offset + start + done);
    if (bytesRead === 0) throw corruptModel(`it ends inside tensor ${JSON.stringify(name)}`);
    done += bytesRead;
  }
}

/**
 * Adds to the file's values what is added to them, scales them, and checks them: a single NaN or infinity would turn every answer
 * into noise. x − x is 0 only for finite x.
 */
function finish({ name, added, scale }: TensorPlace, values: Float32Array): void {
  if (added !== 0) for (let i = 0; i < values.length; i++) values[i]! += added;
  scaleAll(values, scale);
  let sum = 0;
  for (let i = 0; i < values.length; i++) sum += values[i]! - values[i]!;
  if (sum !== 0) throw corruptModel(`tensor ${JSON.stringify(name)} holds values that are not finite`);
}

export function scaleAll(values: Float32Array, factor: number): void {
  if (factor !== 1) for (let i = 0; i < values.length; i++) values[i]! *= factor;
}
