/** Tensors of a safetensors file by name, read when asked for: what the sentence encoder's graph is built from. */
import { open } from 'node:fs/promises';
import { endianness } from 'node:os';
import { z } from 'zod';
import { MaskrouteError } from '../../shared/errors.ts';
import type { BertWeights } from '../model/architectures/bert.ts';

const HEADER_BYTES_MAX = 16 * 1024 * 1024;
const entrySchema = z.strictObject({
  dtype: z.string(),
  shape: z.array(z.int().min(0)).max(8),
  data_offsets: z.tuple([z.int().min(0), z.int().min(0)]),
});
const headerSchema = z.record(z.string(), z.unknown());
type Entry = z.infer<typeof entrySchema>;

/** The caller closes it. */
export type EncoderWeights = BertWeights & { close(): Promise<void> };

/** @throws MaskrouteError `invalid_encoder` for a file that is malformed or whose sizes lie. */
export async function openEncoderWeights(path: string): Promise<EncoderWeights> {
  if (endianness() !== 'LE') throw invalid('this machine is not little-endian');
  const file = await open(path, 'r');
  try {
    const { size } = await file.stat();
    const head = Buffer.alloc(8);
    await file.read(head, 0, 8, 0);
    const headerBytes = Number(head.readBigUInt64LE());
    if (size < 8 || headerBytes > HEADER_BYTES_MAX || headerBytes > size - 8) {
      throw invalid(`${path} is not a safetensors file: its header claims ${headerBytes} bytes of ${size}`);
    }
    const header = Buffer.alloc(headerBytes);
    await file.read(header, 0, headerBytes, 8);
    const start = 8 + headerBytes;
    const entries = parseEntries(header.toString('utf8'), size - start);
    const find = (name: string): Entry => {
      const entry = entries.get(name);
      if (entry === undefined) throw invalid(`${path} has no tensor ${name}`);
      return entry;
    };
    return {
      has: (name) => entries.has(name),
      shape: (name) => find(name).shape,
      async read(name) {
        const { dtype, data_offsets } = find(name);
        if (dtype !== 'F32') throw invalid(`${name} has type ${dtype}; sentence encoders are read as F32`);
        const bytes = new Uint8Array(data_offsets[1] - data_offsets[0]);
        const { bytesRead } = await file.read(bytes, 0, bytes.length, start + data_offsets[0]);
        if (bytesRead !== bytes.length) throw invalid(`${path} ended within ${name}`);
        return new Float32Array(bytes.buffer);
      },
      close: () => file.close(),
    };
  } catch (error) {
    await file.close();
    throw error;
  }
}

function parseEntries(text: string, dataBytes: number): Map<string, Entry> {
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (cause) {
    throw invalid('its header is not JSON', cause);
  }
  const header = headerSchema.safeParse(json);
  if (!header.success) throw invalid('its header is not an object');
  const entries = new Map<string, Entry>();
  for (const [name, value] of Object.entries(header.data)) {
    if (name === '__metadata__') continue;
    const entry = entrySchema.safeParse(value);
    if (!entry.success) throw invalid(`the entry of ${name} is malformed`);
    const [from, to] = entry.data.data_offsets;
    const count = entry.data.shape.reduce((product, dimension) => product * dimension, 1);
    if (from > to || to > dataBytes || (entry.data.dtype === 'F32' && to - from !== 4 * count)) {
      throw invalid(`${name} lies outside the file or has another size than its shape`);
    }
    entries.set(name, entry.data);
  }
  return entries;
}

const invalid = (reason: string, cause?: unknown): MaskrouteError =>
  new MaskrouteError('invalid_encoder', `The encoder cannot be used: ${reason}.`, { cause });
