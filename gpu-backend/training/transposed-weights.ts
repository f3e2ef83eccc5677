/**
 * Quantized products are differentiated by a second copy of their weights: blocks of 32 run along a row, so
 * W `[out, in]` and Wᵀ `[in, out]` have codes of their own. The copies are 8 bits whatever the model has, lie
 * beside the model in one file, and are made once. fp32 weights serve both directions and need none.
 */
import { open, readFile, rename, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { z } from 'zod';
import type { StoredLlama } from '../model/architectures/llama.ts';
import { WEIGHTS_FILE } from '../model/emit.ts';
import type { StoredLinear } from '../model/linear.ts';
import { storedRows, storeLinear } from '../model/linear.ts';
import { QUANT_BLOCK } from '../model/quantize.ts';
import { transpose } from '../model/rotation.ts';
import type { LlamaConfig } from '../model/types.ts';
import { WeightsFile } from '../model/weights-file.ts';
import { partOf, writeWhole } from './write-whole.ts';

/** Raised whenever the copies' layout changes. */
const VERSION = 1;
const COPIES_FILE = `training-v${VERSION}.bin`;
const INDEX_FILE = `training-v${VERSION}.json`;

/** The matrices of one layer, apart: sharing a product saves less than cutting its result costs. */
export type LayerLinears = Readonly<
  Record<'q' | 'k' | 'v' | 'output' | 'gate' | 'up' | 'down', StoredLinear>
>;

export function layerLinears(config: LlamaConfig, stored: StoredLlama['layers'][number]): LayerLinears {
  const { headCount: N, kvHeadCount: G, headSize: D, ffnSize: F } = config;
  return {
    q: storedRows(stored.qkv, 0, N * D),
    k: storedRows(stored.qkv, N * D, (N + G) * D),
    v: storedRows(stored.qkv, (N + G) * D, (N + 2 * G) * D),
    output: stored.output,
    gate: storedRows(stored.gateUp, 0, F),
    up: storedRows(stored.gateUp, F, 2 * F),
    down: stored.down,
  };
}

/** Every matrix that a gradient goes back through, by its name in the training graph. */
export function namedLinears(config: LlamaConfig, stored: StoredLlama): Map<string, StoredLinear> {
  const named = new Map<string, StoredLinear>([['head', stored.head]]);
  stored.layers.forEach((layer, index) => {
    for (const [name, linear] of Object.entries(layerLinears(config, layer))) {
      named.set(`layer_${index}.${name}`, linear);
    }
  });
  return named;
}

const rangeSchema = z.strictObject({ file: z.literal(COPIES_FILE), offset: z.int(), bytes: z.int() });
const indexSchema = z.record(
  z.string(),
  z.strictObject({
    kind: z.literal('q8'),
    outputs: z.int(),
    inputs: z.int(),
    values: rangeSchema,
    scales: rangeSchema,
    zeroPoints: rangeSchema,
  }),
);

/** The transposed copies by the names of `linears`; written first if they are not there. */
export async function transposedWeights(
  folder: string,
  linears: ReadonlyMap<string, StoredLinear>,
): Promise<ReadonlyMap<string, StoredLinear>> {
  if ([...linears.values()].every(({ kind }) => kind === 'f32')) return new Map();
  return (await readIndex(folder)) ?? (await writeCopies(folder, linears));
}

/** The index is written last, so where it is, the copies are whole. */
async function readIndex(folder: string): Promise<Map<string, StoredLinear> | undefined> {
  try {
    const json = JSON.parse(await readFile(join(folder, INDEX_FILE), 'utf8'));
    return new Map(Object.entries(indexSchema.parse(json)));
  } catch {
    return undefined;
  }
}

async function writeCopies(
  folder: string,
  linears: ReadonlyMap<string, StoredLinear>,
): Promise<Map<string, StoredLinear>> {
  const part = partOf(join(folder, COPIES_FILE));
  const weights = await open(join(folder, WEIGHTS_FILE), 'r');
  const file = new WeightsFile(part, COPIES_FILE);
  const index = new Map<string, StoredLinear>();
  try {
    for (const [name, linear] of linears) {
      const rows = await dequantize(weights, linear);
      const columns = transpose(rows, linear.outputs, linear.inputs);
      index.set(name, storeLinear(file, 'q8', columns, linear.inputs, linear.outputs));
    }
    file.close();
    await rename(part, join(folder, COPIES_FILE));
    await writeWhole(join(folder, INDEX_FILE), JSON.stringify(Object.fromEntries(index)));
    return index;
  } finally {
    await weights.close();
    await rm(part, { force: true });
  }
}

type Reader = Awaited<ReturnType<typeof open>>;

/** `[out, in]` in fp32. */
async function dequantize(weights: Reader, linear: StoredLinear): Promise<Float32Array> {
  const read = async (range: StoredLinear['values'] | undefined): Promise<Uint8Array> => {
    const bytes = new Uint8Array(range?.bytes ?? 0);
    for (let done = 0; done < bytes.length; ) {
      const { bytesRead } = await weights.read(bytes, done, bytes.length - done, range!.offset + done);
      if (bytesRead === 0) throw new Error(`${WEIGHTS_FILE} ends early`);
      done += bytesRead;
    }
    return bytes;
  };
  const codes = await read(linear.values);
  const scales = new Float32Array((await read(linear.scales)).buffer);
  const zeroPoints = await read(linear.zeroPoints);
  const rows = new Float32Array(linear.outputs * linear.inputs);
  for (let i = 0; i < rows.length; i++) {
    const block = Math.floor(i / QUANT_BLOCK);
    const code = linear.kind === 'q8' ? codes[i]! : i % 2 === 0 ? codes[i >> 1]! & 15 : codes[i >> 1]! >> 4;
    rows[i] = (code - (linear.kind === 'q8' ? zeroPoints[block]! : 8)) * scales[block]!;
  }
  return rows;
}
