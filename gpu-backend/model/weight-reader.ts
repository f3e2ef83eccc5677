/** Reads one tensor of a file in pieces of a few megabytes, so that only the result is held whole. */
import type { FileHandle } from 'node:fs/promises';
import type { TensorType } from './dequantize.ts';
import { corruptModel } from './model-errors.ts';

const CHUNK_BYTES = 8 * 1024 * 1024;

/**
 * `elements` values in fp32 from byte `offset` on.
 * @throws MaskrouteError `corrupt_model` when the file ends early or holds a value that is not finite.
 */
export async function readTensor(
  file: FileHandle,
  name: string,
  type: TensorType,
  offset: number,
  elements: number,
): Promise<Float32Array> {
  const out = new Float32Array(elements);
  const chunkBlocks = Math.max(1, Math.floor(CHUNK_BYTES / type.blockBytes));
  const blocks = elements / type.blockSize;
  const buffer = new Uint8Array(Math.min(chunkBlocks, blocks) * type.blockBytes);
  for (let block = 0; block < blocks; block += chunkBlocks) {
    const count = Math.min(chunkBlocks, blocks - block);
    const bytes = buffer.subarray(0, count * type.blockBytes);
    await readFully(file, name, bytes, offset + block * type.blockBytes);
    const values = out.subarray(block * type.blockSize, (block + count) * type.blockSize);
    type.dequantize(bytes, values);
    requireFinite(name, values);
  }
  return out;
}

async function readFully(file: FileHandle, name: string, bytes: Uint8Array, position: number): Promise<void> {
  let done = 0;
  while (done < bytes.length) {
    const { bytesRead } = await file.read(bytes, done, bytes.length - done, position + done);
    if (bytesRead === 0) throw corruptModel(`it ends inside tensor ${JSON.stringify(name)}`);
    done += bytesRead;
  }
}

/** One NaN or infinity in a weight turns every answer into noise, silently. x − x is 0 for finite x alone. */
function requireFinite(name: string, values: Float32Array): void {
  let sum = 0;
  for (let i = 0; i < values.length; i++) sum += values[i]! - values[i]!;
  if (sum !== 0) throw corruptModel(`tensor ${JSON.stringify(name)} holds values that are not finite`);
}
