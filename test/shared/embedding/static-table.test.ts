import { describe, expect, it } from 'vitest';
import type { StaticTable } from '../../../shared/embedding/static-table.ts';
import {
  encodeStaticTable,
  parseStaticTable,
  verifyStaticTable,
} from '../../../shared/embedding/static-table.ts';

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
