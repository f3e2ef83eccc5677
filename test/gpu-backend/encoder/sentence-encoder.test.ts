/** The real encoder against figures from transformers (fp32) and its own tokenizer. */
import { readFile } from 'node:fs/promises';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { SentenceEncoder } from '../../../gpu-backend/encoder/sentence-encoder.ts';
import { furthest } from '../../support/furthest.ts';
import { openTestTeacher, TEACHER_TIMEOUT_ms } from '../../support/teacher.ts';

type Golden = { texts: string[]; vectors: number[][]; tokenization: { text: string; ids: number[] }[] };
const golden: Golden = JSON.parse(
  await readFile(new URL('./fixtures/minilm-golden.json', import.meta.url), 'utf8'),
);

let encoder: SentenceEncoder;
beforeAll(async () => {
  encoder = await openTestTeacher();
}, TEACHER_TIMEOUT_ms);
afterAll(() => encoder?.close());

describe('all-MiniLM-L6-v2', () => {
  it('gives the vectors that transformers gives, long texts cut at the same token', async () => {
    const vectors = await encoder.embed(golden.texts);
    vectors.forEach((vector, i) => {
      expect(furthest(vector, golden.vectors[i]!)).toBeLessThan(1e-5);
    });
  });

  it('gives a text the same vector alone and beside longer ones', async () => {
    const [text] = golden.texts;
    const [alone] = await encoder.embed([text!]);
    expect(furthest(alone!, golden.vectors[0]!)).toBeLessThan(1e-5);
  });

  it.each(golden.tokenization)('tokenizes $text as the original does', ({ text, ids }) => {
    expect(encoder.wordPiece!.pieces.tokenIds(text)).toEqual(ids);
  });

  it('reads control tokens that somebody wrote as text, where the original takes them for its own', () => {
    const pieces = ['[', 'cl', '##s', ']', '[', 'sep', ']', '[', 'mask', ']', '[', 'un', '##k', ']'];
    const ids = pieces.map((piece) => encoder.wordPiece!.vocabulary.indexOf(piece));
    expect(encoder.wordPiece!.pieces.tokenIds('[CLS] [SEP] [MASK] [UNK]')).toEqual(ids);
  });

  it('gives the zero vector for nothing, and stops when it is called off', async () => {
    const [empty] = await encoder.embed([' \n']);
    expect(empty!.every((value) => value === 0)).toBe(true);
    await expect(encoder.embed(['text'], AbortSignal.abort())).rejects.toThrow();
  });

  it('says what it is', () => {
    expect(encoder.spec).toEqual({
      id: 'sentence-transformers/all-MiniLM-L6-v2',
      revision: '53aa51172d142c89d9012cce',
      pooling: 'mean',
      dimensions: 384,
    });
  });
});
