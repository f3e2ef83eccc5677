/**
 * `weights.bin`: all large tensors of a model in one file beside the graph, which ONNX Runtime maps into memory. Tensors are
 * appended; several initializers may share a range.
 */
import { closeSync, fsyncSync, openSync, writeSync } from 'node:fs';
import type { Mask } from '../../shared/mask/mask.ts';
import type { InitializerData } from '../onnx/graph.ts';
import type { ModelConfig } from './model-source.ts';

/** A page of memory, so that a tensor can be mapped alone. */
const ALIGNMENT_bytes = 4096;

export type WeightRange = { readonly file: string; readonly offset: number; readonly bytes: number };

export class WeightsFile {
  readonly descriptor: number;
  readonly #file: string;
  #offset = 0;

  constructor(path: string, file: string) {
    this.#file = file;
    this.descriptor = openSync(path, 'w');
  }

  append(data: Uint8Array | Int8Array | Float32Array): WeightRange {
    const range = this.reserve(data.byteLength);
    writeAt(this.descriptor, range.offset, data);
    return range;
  }

  /** Reserves room for `bytes`, which the caller writes later. */
  reserve(bytes: number): WeightRange {
    const offset = Math.ceil(this.#offset / ALIGNMENT_bytes) * ALIGNMENT_bytes;
    this.#offset = offset + bytes;
    return { file: this.#file, offset, bytes };
  }

  close(): void {
    // A full disk may show here first, and the descriptor is freed all the same.
    try {
      fsyncSync(this.descriptor);
    } finally {
      closeSync(this.descriptor);
    }
  }
}

/** Writes all of `data` from byte `offset` on. Works in any thread, as threads share open files. */
export function writeAt(
  descriptor: number,
  offset: number,
  data: Uint8Array | Int8Array | Float32Array,
): void {
  const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
  for (let written = 0; written < bytes.length; )
    written += writeSync(descriptor, bytes, written, bytes.length - written, offset + written);
}

export const external = (range: WeightRange): InitializerData => ({ kind: 'external', ...range });

/** A part of a range, such as some rows of a matrix. */
export const slice = (range: WeightRange, start_bytes: number, bytes: number): WeightRange => ({
  file: range.file,
  offset: range.offset + start_bytes,
  bytes,
});

/* The weights that a decoded token reads, which limit decoding on most machines. */

/** Number of weights (and multiply-adds) of a token, without surrogates. A skipped attention still reads those of K and V. */
export function weightsRead(config: ModelConfig, mask: Mask): number {
  const { hiddenSize: H, ffnSize: F, headCount: N, kvHeadCount: G, headSize: D, vocabularySize: V } = config;
  return mask.runs.reduce((sum, runs, block) => {
    if (block % 2 === 1) return sum + (runs ? 3 * H * F : 0);
    return sum + 2 * H * G * D + (runs ? 2 * H * N * D : 0);
  }, H * V);
}
