/**
 * Reads and writes safetensors files; tensors are read when needed. Layout:
 * https://github.com/huggingface/safetensors#format (length, JSON header, data). The header is checked against the size of
 * the file.
 */
import type { FileHandle } from 'node:fs/promises';
import { z } from 'zod';
import { isJsonObject } from '../../../shared/wire/parse-body.ts';
import { openRegular } from '../../files.ts';
import { corruptModel, quoted, type TensorPlace, unsupportedModel } from '../model-source.ts';
import { bytesOf, elementsOf, tensorType } from './dequantize.ts';
import { readTensor } from './tensor-parts.ts';

export type SafetensorsFile = {
  readonly names: readonly string[];
  /** `__metadata__` of the header; empty when missing or malformed. */
  readonly metadata: Readonly<Record<string, string>>;
  has(name: string): boolean;
  shape(name: string): readonly number[];
  /** The whole tensor in fp32, row-major. @throws MaskrouteError `unsupported_model` unless it is F32, F16 or BF16. */
  read(name: string): Promise<Float32Array>;
  /** @throws as `read`. */
  place(name: string): TensorPlace;
  close(): Promise<void>;
};

/** A header of a thousand layers is some hundred kilobytes. */
const HEADER_BYTES_MAX = 32 * 1024 * 1024;
const TENSOR_COUNT_MAX = 100_000;
const ELEMENTS_MAX = 2 ** 32;

/** The supported element types, with their ids in GGUF. */
const FLOAT_TYPES: Readonly<Record<string, number>> = { F32: 0, F16: 1, BF16: 30 };

const entrySchema = z.object({
  dtype: z.string().max(20),
  shape: z.array(z.int().min(0)).max(8),
  data_offsets: z.tuple([z.int().min(0), z.int().min(0)]),
});
type Entry = z.infer<typeof entrySchema>;

/** `folder`: the file must be inside it. @throws MaskrouteError `corrupt_model`, and as `openRegular`. */
export async function openSafetensors(path: string, folder?: string): Promise<SafetensorsFile> {
  const file = await openRegular(path, folder);
  try {
    const { dataStart, entries, metadata } = await readHeader(file);
    const find = (name: string): Entry => {
      const entry = entries.get(name);
      if (entry === undefined) throw corruptModel(`it has no tensor ${quoted(name)}`);
      return entry;
    };
    const place = (name: string): TensorPlace => {
      const { dtype, shape, data_offsets } = find(name);
      const [descriptor, offset] = [file.fd, dataStart + data_offsets[0]];
      const type = floatType(name, dtype);
      return { name, descriptor, offset, type, shape, interleavedHeads: undefined, added: 0, scale: 1 };
    };
    return {
      names: [...entries.keys()],
      metadata,
      has: (name) => entries.has(name),
      shape: (name) => find(name).shape,
      place,
      read: async (name) => readTensor(place(name)),
      close: () => file.close(),
    };
  } catch (error) {
    await file.close();
    throw error;
  }
}

/** GGUF's id of an element type; undefined when unsupported. */
const typeIdOf = (dtype: string): number | undefined =>
  Object.hasOwn(FLOAT_TYPES, dtype) ? FLOAT_TYPES[dtype] : undefined;

function floatType(name: string, dtype: string): number {
  const id = typeIdOf(dtype);
  if (id !== undefined) return id;
  throw unsupportedModel(`tensor ${quoted(name)} has the type ${quoted(dtype)} (supported: F32, F16, BF16)`);
}

type Header = { dataStart: number; entries: Map<string, Entry>; metadata: Record<string, string> };

async function readHeader(file: FileHandle): Promise<Header> {
  const { size } = await file.stat();
  if (size < 8) throw corruptModel(`it ends after ${size} bytes, inside its header`);
  const head = await headerBytes(file, 8, 0);
  const length = new DataView(head.buffer).getBigUint64(0, true);
  if (length > HEADER_BYTES_MAX || Number(length) > size - 8) {
    throw corruptModel(`its header claims ${length} bytes, the file has ${size}`);
  }
  const bytes = await headerBytes(file, Number(length), 8);
  let json: unknown;
  try {
    json = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(bytes));
  } catch (error) {
    throw corruptModel('its header is not JSON', error);
  }
  if (!isJsonObject(json)) {
    throw corruptModel('its header is not a JSON object');
  }
  const dataStart = 8 + Number(length);
  return { dataStart, entries: checkEntries(json, size - dataStart), metadata: checkMetadata(json) };
}

async function headerBytes(file: FileHandle, length: number, position: number): Promise<Uint8Array> {
  const bytes = new Uint8Array(length);
  for (let done = 0; done < length; ) {
    const { bytesRead } = await file.read(bytes, done, length - done, position + done);
    if (bytesRead === 0) throw corruptModel('it ends inside its header');
    done += bytesRead;
  }
  return bytes;
}

/** Empty for missing or malformed metadata, which do not affect the weights. */
function checkMetadata(json: object): Record<string, string> {
  const parsed = z
    .record(z.string(), z.string())
    .safeParse((json as { __metadata__?: unknown }).__metadata__);
  return parsed.data ?? {};
}

function checkEntries(json: object, dataBytes: number): Map<string, Entry> {
  const raw = Object.entries(json).filter(([name]) => name !== '__metadata__');
  if (raw.length > TENSOR_COUNT_MAX) throw corruptModel(`it announces ${raw.length} tensors`);
  const entries = new Map<string, Entry>();
  for (const [name, value] of raw) {
    const parsed = entrySchema.safeParse(value);
    if (!parsed.success) throw corruptModel(`the entry of tensor ${quoted(name)} is malformed`);
    const { dtype, shape, data_offsets } = parsed.data;
    const [begin, end] = data_offsets;
    if (begin > end || end > dataBytes) {
      throw corruptModel(`tensor ${quoted(name)} lies outside the file (it may be truncated)`);
    }
    const typeId = typeIdOf(dtype);
    const elements = elementsOf(shape);
    if (elements > ELEMENTS_MAX)
      throw corruptModel(`tensor ${quoted(name)} cannot have ${elements} elements`);
    if (typeId !== undefined && bytesOf(tensorType(typeId)!, elements) !== end - begin) {
      throw corruptModel(`tensor ${quoted(name)} has ${end - begin} bytes, which is not its shape`);
    }
    entries.set(name, parsed.data);
  }
  const inOrder = [...entries].sort(([, a], [, b]) => a.data_offsets[0] - b.data_offsets[0]);
  for (let i = 1; i < inOrder.length; i++) {
    if (inOrder[i - 1]![1].data_offsets[1] > inOrder[i]![1].data_offsets[0]) {
      throw corruptModel(`tensors ${quoted(inOrder[i - 1]![0])} and ${quoted(inOrder[i]![0])} overlap`);
    }
  }
  return entries;
}

/* Writing. */

type HalfTensor = {
  readonly name: string;
  readonly shape: readonly number[];
  readonly data: Float32Array;
};

/** The bytes of a file with `tensors` in half precision. @throws RangeError for a value that halves cannot hold. */
export function encodeHalfTensors(
  tensors: readonly HalfTensor[],
  metadata: Readonly<Record<string, string>>,
): Uint8Array {
  const header: Record<string, unknown> = { __metadata__: metadata };
  let end = 0;
  for (const { name, shape, data } of tensors) {
    header[name] = { dtype: 'F16', shape, data_offsets: [end, end + 2 * data.length] };
    end += 2 * data.length;
  }
  const text = new TextEncoder().encode(JSON.stringify(header));
  // Readers map the data, so it is aligned to 8 bytes.
  const length = Math.ceil(text.length / 8) * 8;
  const file = new Uint8Array(8 + length + end).fill(0x20, 8, 8 + length);
  new DataView(file.buffer).setBigUint64(0, BigInt(length), true);
  file.set(text, 8);
  let at = 8 + length;
  for (const { name, data } of tensors) {
    const halves = new Float16Array(data);
    if (!halves.every(Number.isFinite)) throw new RangeError(`${name} holds a value outside half precision`);
    file.set(new Uint8Array(halves.buffer), at);
    at += halves.byteLength;
  }
  return file;
}
