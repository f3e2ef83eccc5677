/** Every tensor type against the `gguf` Python package, bit for bit. */
import { readFileSync } from 'node:fs';
import { describe, expect, test } from 'vitest';
import { tensorType } from '../../../../gpu-backend/model/formats/dequantize.ts';

type Case = { type: number; name: string; bytes: string; values: string };
const cases: Case[] = JSON.parse(readFileSync(new URL('fixtures/dequantize.json', import.meta.url), 'utf8'));

describe('dequantize', () => {
  test.each(cases)('$name gives the reference’s values', ({ type, name, bytes, values }) => {
    const kind = tensorType(type)!;
    expect(kind.name).toBe(name);
    const blocks = Uint8Array.from(Buffer.from(bytes, 'base64'));
    const expected = new Float32Array(Uint8Array.from(Buffer.from(values, 'base64')).buffer);
    expect(blocks.length / kind.blockBytes).toBe(expected.length / kind.blockSize);
    const out = new Float32Array(expected.length);
    kind.dequantize(blocks, out);
    expect(bits(out)).toEqual(bits(expected));
  });

  test('all fifteen types are covered', () => {
    expect(cases.map(({ name }) => name).sort()).toEqual(
      [
        ...['BF16', 'F16', 'F32', 'IQ4_NL', 'IQ4_XS', 'Q2_K', 'Q3_K', 'Q4_0', 'Q4_1', 'Q4_K'],
        ...['Q5_0', 'Q5_1', 'Q5_K', 'Q6_K', 'Q8_0'],
      ].sort(),
    );
  });
});

const bits = (values: Float32Array): number[] => Array.from(new Uint32Array(values.buffer));
