/**
 * The table that ships, in Node; `test/workers/routing/static-golden.test.ts` asks the same of workerd, so that a centroid
 * means the same on both sides. When the table is distilled anew, the figures are those that this code then gives.
 */
import { readFile } from 'node:fs/promises';
import { describe, expect, it } from 'vitest';
import { STATIC_TABLE_PATH, staticKernel } from '../../../gpu-backend/learning/data/encoders.ts';
import { EMBED_CHARS_MAX, normalise } from '../../../shared/embedding/encoder.ts';
import { loadStaticEncoder } from '../../../shared/embedding/static-encoder.ts';
import {
  parseStaticTable,
  STATIC_TABLE_BYTES_MAX,
  verifyStaticTable,
} from '../../../shared/embedding/static-table.ts';
import { loadWordPiece } from '../../../shared/embedding/wordpiece.ts';
import golden from '../../support/static-golden.json' with { type: 'json' };

const bytes = await readFile(STATIC_TABLE_PATH);
const encoder = loadStaticEncoder(bytes, await staticKernel());

const embed = async (text: string) => (await encoder.embed([text]))[0]!;
const cosine = (a: Float32Array, b: Float32Array) => a.reduce((sum, value, i) => sum + value * b[i]!, 0);

describe('the static encoder that ships', () => {
  it('is whole, small enough, and the one that the figures were taken with', () => {
    verifyStaticTable(bytes);
    expect(bytes.length).toBeLessThanOrEqual(STATIC_TABLE_BYTES_MAX);
    expect(encoder.spec).toEqual({
      id: 'static',
      revision: golden.revision,
      pooling: 'weighted-mean',
      dimensions: 248,
    });
  });

  it.each(golden.rows)('gives $text the vector that it gave', async ({ text, vector }) => {
    const found = await embed(text);
    expect(Math.hypot(...found)).toBeCloseTo(1, 5);
    vector.forEach((value, i) => {
      expect(found[i]).toBeCloseTo(value, 6);
    });
  });

  it('sums token by token, to the last bit, however many there are', async () => {
    const { dimensions, scales, vectors, vocabulary } = parseStaticTable(bytes);
    const tokenizer = loadWordPiece(vocabulary);
    const words = golden.rows
      .map(({ text }) => text)
      .join(' ')
      .split(' ');
    for (let count = 1; count < Math.min(words.length, 70); count++) {
      const text = words.slice(0, count).join(' ');
      const sum = new Float32Array(dimensions);
      for (const id of tokenizer.tokenIds(text.slice(0, EMBED_CHARS_MAX))) {
        sum.forEach((before, i) => {
          sum[i] = before + Math.fround(scales[id]! * vectors[id * dimensions + i]!);
        });
      }
      expect(await embed(text)).toEqual(normalise(sum));
    }
  });

  it('puts prompts of a kind nearer to each other than to another kind', async () => {
    const sum = await embed('Tom has 3 apples and buys 5 more. How many apples does he have now?');
    const price = await embed('A shirt costs $20 and is 15% off. What is the total for 4 shirts?');
    const code = await embed('Write a Python function that reverses a linked list.');
    const sort = await embed('Write a Python function to sort a list of tuples with quicksort.');
    expect(cosine(sum, price)).toBeGreaterThan(cosine(sum, code) + 0.1);
    expect(cosine(code, sort)).toBeGreaterThan(cosine(code, price) + 0.1);
  });

  it('gives the zero vector for nothing, and nothing past the limit counts', async () => {
    expect((await embed(' \n\t')).every((value) => value === 0)).toBe(true);
    const long = 'word '.repeat(EMBED_CHARS_MAX);
    expect(await embed(long)).toEqual(await embed(long.slice(0, EMBED_CHARS_MAX)));
  });

  it('takes half a surrogate pair, which a cut text may end with', async () => {
    const vector = await embed('a smile \ud83d');
    expect(Math.hypot(...vector)).toBeCloseTo(1, 5);
  });

  it('stops when it is called off', async () => {
    await expect(encoder.embed(['x'], AbortSignal.abort())).rejects.toThrow();
  });
});
