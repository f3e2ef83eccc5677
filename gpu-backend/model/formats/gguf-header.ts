/**
 * Reads the header of a GGUF file (version 2 or 3, little-endian): metadata, and the position of each tensor. Layout:
 * https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
 *
 * This is a reader of our own, because headers are untrusted and every value must be checked first, and because the `gguf`
 * function of @huggingface/gguf has two bugs: it truncates the last string of an array when a 2 MB chunk ends inside it,
 * and drops a byte-order mark at the start of a token. The tests compare the two.
 */
import { readSync } from 'node:fs';
import { corruptModel, quoted, unsupportedModel } from '../model-source.ts';
import { bytesOf, elementsOf, tensorType, tensorTypeName } from './dequantize.ts';

type GgufScalar = string | number | bigint | boolean;
export type GgufValue = GgufScalar | readonly GgufScalar[];
export type GgufTensor = {
  readonly name: string;
  readonly type: number;
  /** In PyTorch's order; the file has the dimensions in reverse. */
  readonly shape: readonly number[];
  /** Bytes from the start of the file. */
  readonly offset: number;
  readonly bytes: number;
};
export type GgufHeader = {
  readonly metadata: ReadonlyMap<string, GgufValue>;
  readonly tensors: ReadonlyMap<string, GgufTensor>;
};

// Bounds far above any real model, low enough that a hostile header costs little: the vocabulary and its
// merges are the largest arrays (under a million elements), and take a few megabytes.
const HEADER_BYTES_MAX = 64 * 1024 * 1024;
const METADATA_COUNT_MAX = 10_000;
const TENSOR_COUNT_MAX = 100_000;
const ELEMENT_COUNT_MAX = 4_000_000;
const KEY_BYTES_MAX = 65_535;
const TENSOR_NAME_BYTES_MAX = 1024;
const DIMENSION_COUNT_MAX = 4;
/** The most floats that one typed array holds. */
const TENSOR_ELEMENTS_MAX = 2 ** 32;
const ALIGNMENT_DEFAULT = 32;
const ALIGNMENT_MAX = 1024 * 1024;

/** `fd` is an open file of `fileBytes` bytes. @throws MaskrouteError `corrupt_model` or `unsupported_model`. */
export function readGgufHeader(fd: number, fileBytes: number): GgufHeader {
  const cursor = new ByteCursor(fd, Math.min(fileBytes, HEADER_BYTES_MAX));
  if (fileBytes < 24 || cursor.u32() !== 0x46554747) {
    throw corruptModel('it is not a GGUF file: it does not begin with the letters GGUF');
  }
  checkVersion(cursor.u32());
  // A metadata entry takes at least 13 bytes and a tensor 24: a larger count cannot be true.
  const room = cursor.remaining;
  const tensorCount = cursor.size('the number of tensors', Math.min(TENSOR_COUNT_MAX, room / 24));
  const metadataCount = cursor.size(
    'the number of metadata entries',
    Math.min(METADATA_COUNT_MAX, room / 13),
  );
  const metadata = readMetadata(cursor, metadataCount);
  const raw = Array.from({ length: tensorCount }, () => readTensorInfo(cursor));
  const alignment = alignmentOf(metadata);
  const dataStart = Math.ceil(cursor.position / alignment) * alignment;
  return { metadata, tensors: placeTensors(raw, dataStart, alignment, fileBytes) };
}

function checkVersion(version: number): void {
  if (version === 2 || version === 3) return;
  if (version !== 0 && (version & 0xffff) === 0) throw unsupportedModel('it is a big-endian GGUF file');
  throw unsupportedModel(`it is a GGUF file of version ${version} (supported: 2 and 3)`);
}

function readMetadata(cursor: ByteCursor, count: number): Map<string, GgufValue> {
  const metadata = new Map<string, GgufValue>();
  const budget = { elements: ELEMENT_COUNT_MAX };
  for (let i = 0; i < count; i++) {
    const key = cursor.string('a metadata key', KEY_BYTES_MAX);
    if (metadata.has(key)) throw corruptModel(`the metadata key ${quoted(key)} comes twice`);
    metadata.set(key, readValue(cursor, key, budget));
  }
  return metadata;
}

const TYPE_STRING = 8;
const TYPE_ARRAY = 9;

function readValue(cursor: ByteCursor, key: string, budget: { elements: number }): GgufValue {
  const type = cursor.u32();
  if (type !== TYPE_ARRAY) return readScalar(cursor, type, key);
  const elementType = cursor.u32();
  if (elementType === TYPE_ARRAY) throw unsupportedModel(`its metadata key ${quoted(key)} nests arrays`);
  const elementBytesMin = elementType === TYPE_STRING ? 8 : 1;
  const room = cursor.remaining / elementBytesMin;
  const length = cursor.size(`the length of ${quoted(key)}`, Math.min(budget.elements, room));
  budget.elements -= length;
  return Array.from({ length }, () => readScalar(cursor, elementType, key));
}

function readScalar(cursor: ByteCursor, type: number, key: string): GgufScalar {
  switch (type) {
    case 0:
      return cursor.u8();
    case 1:
      return cursor.i8();
    case 2:
      return cursor.u16();
    case 3:
      return cursor.i16();
    case 4:
      return cursor.u32();
    case 5:
      return cursor.i32();
    case 6:
      return cursor.f32();
    case 7:
      return cursor.u8() !== 0;
    case TYPE_STRING:
      return cursor.string(`the metadata value ${quoted(key)}`);
    case 10:
      return cursor.u64();
    case 11:
      return cursor.i64();
    case 12:
      return cursor.f64();
    default:
      throw corruptModel(`the metadata key ${quoted(key)} has the unknown type ${type}`);
  }
}

type RawTensor = Omit<GgufTensor, 'bytes'>;

function readTensorInfo(cursor: ByteCursor): RawTensor {
  const name = cursor.string('a tensor name', TENSOR_NAME_BYTES_MAX);
  const dimensionCount = cursor.u32();
  if (dimensionCount < 1 || dimensionCount > DIMENSION_COUNT_MAX) {
    throw corruptModel(`tensor ${quoted(name)} has ${dimensionCount} dimensions`);
  }
  const shape: number[] = [];
  let elements = 1;
  for (let i = 0; i < dimensionCount; i++) {
    const size = cursor.size(`a dimension of tensor ${quoted(name)}`, TENSOR_ELEMENTS_MAX);
    elements *= size;
    if (size === 0 || elements > TENSOR_ELEMENTS_MAX) {
      throw corruptModel(`tensor ${quoted(name)} cannot have ${elements} elements`);
    }
    shape.unshift(size);
  }
  const type = cursor.u32();
  const offset = cursor.size(`the offset of tensor ${quoted(name)}`, Number.MAX_SAFE_INTEGER);
  return { name, type, shape, offset };
}

function alignmentOf(metadata: ReadonlyMap<string, GgufValue>): number {
  const value = metadata.get('general.alignment') ?? ALIGNMENT_DEFAULT;
  const alignment = typeof value === 'bigint' ? Number(value) : value;
  if (
    typeof alignment !== 'number' ||
    !Number.isInteger(Math.log2(alignment)) ||
    alignment < 8 ||
    alignment > ALIGNMENT_MAX
  ) {
    throw corruptModel(`general.alignment is ${quoted(String(value))}, not a power of two from 8`);
  }
  return alignment;
}

/** Turns offsets into file positions, and checks that tensors are inside the file and do not overlap. */
function placeTensors(
  raw: readonly RawTensor[],
  dataStart: number,
  alignment: number,
  fileBytes: number,
): Map<string, GgufTensor> {
  const tensors = new Map<string, GgufTensor>();
  for (const tensor of raw) {
    const name = quoted(tensor.name);
    if (tensors.has(tensor.name)) throw corruptModel(`tensor ${name} comes twice`);
    if (tensor.offset % alignment !== 0) throw corruptModel(`tensor ${name} is not aligned to ${alignment}`);
    const offset = dataStart + tensor.offset;
    const bytes = tensorBytes(tensor);
    if (offset + bytes > fileBytes) {
      throw corruptModel(
        `it is truncated: tensor ${name} ends at byte ${offset + bytes}, the file at ${fileBytes}`,
      );
    }
    tensors.set(tensor.name, { ...tensor, offset, bytes });
  }
  const inOrder = [...tensors.values()].sort((a, b) => a.offset - b.offset);
  for (let i = 1; i < inOrder.length; i++) {
    const before = inOrder[i - 1]!;
    if (before.offset + before.bytes > inOrder[i]!.offset) {
      throw corruptModel(`tensors ${quoted(before.name)} and ${quoted(inOrder[i]!.name)} overlap`);
    }
  }
  return tensors;
}

function tensorBytes(tensor: RawTensor): number {
  const type = tensorType(tensor.type);
  if (type === undefined) {
    throw unsupportedModel(`tensor ${quoted(tensor.name)} has the type ${tensorTypeName(tensor.type)}`);
  }
  const rowLength = tensor.shape.at(-1)!;
  if (rowLength % type.blockSize !== 0) {
    throw corruptModel(
      `rows of tensor ${quoted(tensor.name)} (${rowLength}) do not fill ${type.name} blocks`,
    );
  }
  return bytesOf(type, elementsOf(tensor.shape));
}

/*
 * Reads a file's header forwards through a sliding window, so that a header of any size takes one window of memory. Every
 * read is checked against the end of the file first, so a wrong length fails before anything is allocated for it.
 */

const WINDOW_BYTES = 1024 * 1024;
/** No string in a real header is longer: chat templates reach some tens of kilobytes. */
const STRING_BYTES_MAX = WINDOW_BYTES;

class ByteCursor {
  readonly #fd: number;
  readonly #limit: number;
  readonly #window = Buffer.allocUnsafe(WINDOW_BYTES + 16);
  readonly #view = new DataView(this.#window.buffer, this.#window.byteOffset, this.#window.byteLength);
  /** Keeps byte-order marks, which can be tokens. */
  readonly #decoder = new TextDecoder('utf-8', { ignoreBOM: true });
  #windowStart = 0;
  #windowEnd = 0;
  #position = 0;

  /** `limit`: the first byte that may not be read, at most the file's size. */
  constructor(fd: number, limit: number) {
    this.#fd = fd;
    this.#limit = limit;
  }

  get position(): number {
    return this.#position;
  }

  get remaining(): number {
    return this.#limit - this.#position;
  }

  u8(): number {
    return this.#view.getUint8(this.#take(1));
  }
  i8(): number {
    return this.#view.getInt8(this.#take(1));
  }
  u16(): number {
    return this.#view.getUint16(this.#take(2), true);
  }
  i16(): number {
    return this.#view.getInt16(this.#take(2), true);
  }
  u32(): number {
    return this.#view.getUint32(this.#take(4), true);
  }
  i32(): number {
    return this.#view.getInt32(this.#take(4), true);
  }
  f32(): number {
    return this.#view.getFloat32(this.#take(4), true);
  }
  f64(): number {
    return this.#view.getFloat64(this.#take(8), true);
  }
  u64(): bigint {
    return this.#view.getBigUint64(this.#take(8), true);
  }
  i64(): bigint {
    return this.#view.getBigInt64(this.#take(8), true);
  }

  /** A 64-bit count or size that must not exceed `max`. */
  size(what: string, max: number): number {
    const value = this.u64();
    const bound = Math.floor(max);
    if (value > BigInt(bound)) throw corruptModel(`${what} is ${value}, more than ${bound}`);
    return Number(value);
  }

  string(what: string, max: number = STRING_BYTES_MAX): string {
    const bytes = this.size(`the length of ${what}`, Math.min(max, STRING_BYTES_MAX));
    const start = this.#take(bytes);
    return this.#decoder.decode(this.#window.subarray(start, start + bytes));
  }

  /** Moves past `bytes`; returns their start in the window. */
  #take(bytes: number): number {
    if (bytes > this.remaining) {
      throw corruptModel(`it ends inside its header (byte ${this.#limit}, ${bytes} more are announced)`);
    }
    if (this.#position + bytes > this.#windowEnd) this.#fill(bytes);
    const start = this.#position - this.#windowStart;
    this.#position += bytes;
    return start;
  }

  #fill(bytes: number): void {
    this.#windowStart = this.#position;
    this.#windowEnd = this.#position;
    const wanted = Math.min(WINDOW_BYTES, this.remaining);
    while (this.#windowEnd - this.#windowStart < wanted) {
      const at = this.#windowEnd - this.#windowStart;
      const read = readSync(this.#fd, this.#window, at, wanted - at, this.#windowEnd);
      if (read === 0) break;
      this.#windowEnd += read;
    }
    if (this.#windowEnd - this.#windowStart < bytes)
      throw corruptModel('it became shorter while it was read');
  }
}
