/** A stored quantized matrix in fp32 again. */
import type { FileHandle } from 'node:fs/promises';
import type { StoredLinear } from '../model/linear.ts';
import { corruptModel } from '../model/model-errors.ts';
import { QUANT_BLOCK } from '../model/quantize.ts';
import type { WeightRange } from '../model/weights-file.ts';

/** `[outputs, inputs]`. @throws MaskrouteError `corrupt_model` when the file ends early. */
export async function dequantizeLinear(weights: FileHandle, linear: StoredLinear): Promise<Float32Array> {
  const codes = await readRange(weights, linear.values);
  const scales = new Float32Array((await readRange(weights, linear.scales!)).buffer);
  const zeroPoints = linear.zeroPoints && (await readRange(weights, linear.zeroPoints));
  const rows = new Float32Array(linear.outputs * linear.inputs);
  for (let i = 0; i < rows.length; i++) {
    const block = Math.floor(i / QUANT_BLOCK);
    const code = linear.kind === 'q8' ? codes[i]! : i % 2 === 0 ? codes[i >> 1]! & 15 : codes[i >> 1]! >> 4;
    // 4 bits are symmetric around 8.
    rows[i] = (code - (zeroPoints ? zeroPoints[block]! : 8)) * scales[block]!;
  }
  return rows;
}

async function readRange(file: FileHandle, { offset, bytes: length }: WeightRange): Promise<Uint8Array> {
  const bytes = new Uint8Array(length);
  for (let done = 0; done < length; ) {
    const { bytesRead } = await file.read(bytes, done, length - done, offset + done);
    if (bytesRead === 0) throw corruptModel('its weights file ends early');
    done += bytesRead;
  }
  return bytes;
}
