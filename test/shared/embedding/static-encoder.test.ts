/**
 * The table that ships, in Node; `test/workers/routing/encoders.ts` asks the same of workerd, so that a centroid
 * means the same on both sides. When the table is distilled anew, the figures are those that this code then gives.
 */
import { readFile } from 'node:fs/promises';
import { describe, expect, it } from 'vitest';
import { STATIC_TABLE_PATH } from '../../../gpu-backend/learning/data/encoders.ts';
import { EMBED_CHARS_MAX } from '../../../shared/embedding/encoder.ts';
import {
  encodeStaticTable,
  loadStaticEncoder,
  parseStaticTable,
  STATIC_TABLE_BYTES_MAX,
  type StaticTable,
  verifyStaticTable,
} from '../../../shared/embedding/static-encoder.ts';
import { loadWordPiece } from '../../../shared/embedding/wordpiece.ts';
import golden from '../../support/static-golden.json' with { type: 'json' };

const bytes = await readFile(STATIC_TABLE_PATH);
const encoder = loadStaticEncoder(bytes);

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

  it('is the plain sum of its tokens, however many there are', async () => {
    const { dimensions, scales, vectors, vocabulary } = parseStaticTable(bytes);
    const tokenizer = loadWordPiece(vocabulary);
    const words = golden.rows
      .map(({ text }) => text)
      .join(' ')
      .split(' ');
    for (const count of [...Array.from({ length: 70 }, (_, i) => i + 1), 1_000]) {
      const text = Array.from({ length: count }, (_, i) => words[i % words.length]).join(' ');
      const sum = new Array<number>(dimensions).fill(0);
      for (const id of tokenizer.tokenIds(text.slice(0, EMBED_CHARS_MAX))) {
        for (let i = 0; i < dimensions; i++) sum[i]! += scales[id]! * vectors[id * dimensions + i]!;
      }
      const length = Math.hypot(...sum);
      const found = await embed(text);
      sum.forEach((value, i) => {
        expect(Math.abs(found[i]! - value / length)).toBeLessThan(1e-6);
      });
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

const table: StaticTable = {
  dimensions: 3,
  vocabulary: ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'a', 'é'],
  scales: Float32Array.from([0, 1, 0, 0, 0, 0.5, 2]),
  vectors: Int8Array.from({ length: 21 }, (_, i) => i * 12 - 128),
};

describe('the file of the static encoder', () => {
  it('gives back what was written', () => {
    const read = parseStaticTable(encodeStaticTable(table));
    expect(read).toEqual({ ...table, revision: expect.stringMatching(/^t_[0-9a-f]{24}$/) });
  });

  it('reads from a view that starts at an odd offset of its buffer', () => {
    const bytes = encodeStaticTable(table);
    const shifted = new Uint8Array(bytes.length + 3);
    shifted.set(bytes, 3);
    expect(parseStaticTable(shifted.subarray(3)).vectors).toEqual(table.vectors);
  });

  it('names equal content equally and different content differently', () => {
    const other = { ...table, scales: table.scales.with(5, 0.25) };
    const revision = (one: StaticTable) => parseStaticTable(encodeStaticTable(one)).revision;
    expect(revision(table)).toBe(revision({ ...table }));
    expect(revision(table)).not.toBe(revision(other));
  });

  it.each([
    ['nothing', () => new Uint8Array(0)],
    [
      'another file',
      () => new TextEncoder().encode('not a table at all, but long enough to hold a header ...'),
    ],
    ['a truncated file', () => encodeStaticTable(table).slice(0, -1)],
    ['a file with more behind it', () => new Uint8Array([...encodeStaticTable(table), 0])],
    ['another version', () => patched(8, 2)],
    ['no dimensions', () => patched(12, 0)],
    ['sizes of gigabytes', () => patched(16, 0xffff_ffff)],
    ['fewer tokens than the vocabulary has', () => patched(20, 0)],
    ['a scale that is not a number', () => patched(56, 0x7fc0_0000)],
  ])('refuses %s', (_, bytes) => {
    expect(() => parseStaticTable(bytes())).toThrow(expect.objectContaining({ code: 'invalid_encoder' }));
  });

  it('finds a flipped bit by its hash', () => {
    const bytes = encodeStaticTable(table);
    verifyStaticTable(bytes);
    bytes[90] = bytes[90]! ^ 1;
    expect(() => verifyStaticTable(bytes)).toThrow(/damaged/);
  });

  it('refuses to write more than a worker may hold', () => {
    const vocabulary = Array.from({ length: 30_000 }, (_, i) => `token${i}`);
    const large = {
      dimensions: 300,
      vocabulary,
      scales: new Float32Array(30_000),
      vectors: new Int8Array(9_000_000),
    };
    expect(() => encodeStaticTable(large)).toThrow(expect.objectContaining({ code: 'invalid_encoder' }));
  });
});

function patched(offset: number, value: number): Uint8Array {
  const bytes = encodeStaticTable(table);
  new DataView(bytes.buffer).setUint32(offset, value, true);
  return bytes;
}
