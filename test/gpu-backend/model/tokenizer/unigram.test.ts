/** Unigram vocabularies against Hugging Face's `tokenizers`, with SentencePiece's table of replacements or without. */
import { readFileSync } from 'node:fs';
import { gunzipSync } from 'node:zlib';
import { describe, expect, test } from 'vitest';
import { TOKEN_TYPES } from '../../../../gpu-backend/model/formats/gguf.ts';
import type { GgufValue } from '../../../../gpu-backend/model/formats/gguf-header.ts';
import { tokenizerFromGguf } from '../../../../gpu-backend/model/tokenizer/gguf-tokenizer.ts';
import { createTokenizer } from '../../../../gpu-backend/model/tokenizer/tokenizer.ts';

type NormalizerJson = { type: string; precompiled_charsmap?: string; normalizers?: NormalizerJson[] };
type Json = {
  normalizer: NormalizerJson | null;
  pre_tokenizer: object;
  model: { type: 'Unigram'; vocab: [string, number][]; unk_id: number; byte_fallback: boolean };
};
const figures: { texts: string[]; models: { name: string; json: Json; ids: number[][] }[] } = JSON.parse(
  readFileSync(new URL('fixtures/unigram.json', import.meta.url), 'utf8'),
);
const packed = readFileSync(new URL('fixtures/nmt_nfkc.gz', import.meta.url));
for (const { json } of figures.models) {
  for (const part of json.normalizer?.normalizers ?? []) {
    if (part.precompiled_charsmap) part.precompiled_charsmap = gunzipSync(packed).toString('base64');
  }
}

describe.each(figures.models)('a unigram vocabulary, $name', ({ json, ids }) => {
  const named = (all: readonly (readonly number[])[]) =>
    all.map((some, i) => [figures.texts[i], some.join()]);

  test('gives the reference’s ids, and special tokens of a text are text', () => {
    const tokenizer = createTokenizer(json, {});
    expect(figures.texts.length).toBeGreaterThan(120);
    expect(named(figures.texts.map((text) => [...tokenizer.encode(text)]))).toEqual(named(ids));
    const said = 'a <s> b </s><s>c';
    const spelled = [...tokenizer.encode(said, { addSpecial: false })];
    expect(spelled.filter((id) => id === 1 || id === 2)).toEqual([]);
    const parsed = [...tokenizer.encode(said, { addSpecial: false, parseSpecial: true })];
    expect(parsed.filter((id) => id === 1 || id === 2)).toEqual([1, 2, 1]);
  });

  test('the same from GGUF metadata', () => {
    const { vocab, unk_id: unknown } = json.model;
    const typeOf = (piece: string, id: number) => {
      if (id === unknown) return TOKEN_TYPES.unknown;
      if (piece === '<s>' || piece === '</s>') return TOKEN_TYPES.control;
      return /^<0x..>$/.test(piece) ? TOKEN_TYPES.byte : TOKEN_TYPES.normal;
    };
    const table = json.normalizer?.normalizers?.[0]?.precompiled_charsmap;
    const metadata = new Map<string, GgufValue>([
      ['tokenizer.ggml.model', 't5'],
      ['tokenizer.ggml.tokens', vocab.map(([piece]) => piece)],
      ['tokenizer.ggml.scores', vocab.map(([, score]) => score)],
      ['tokenizer.ggml.token_type', vocab.map(([piece], id) => typeOf(piece, id))],
      ['tokenizer.ggml.bos_token_id', 1],
      ['tokenizer.ggml.eos_token_id', 2],
      ['tokenizer.ggml.remove_extra_whitespaces', table !== undefined],
      ...(table
        ? ([['tokenizer.ggml.precompiled_charsmap', [...Buffer.from(table, 'base64')]]] as const)
        : []),
    ]);
    const { tokenizerJson, tokenizerConfig } = tokenizerFromGguf(metadata, vocab.length);
    const tokenizer = createTokenizer(tokenizerJson, tokenizerConfig);
    // One of the two files cuts at all white space, the other at spaces.
    const texts = figures.texts
      .map((text) => text.trim())
      .filter((text) => !/[^\S ]|[\u0085\u200b-\u200f]/.test(text));
    expect(texts.length).toBeGreaterThan(60);
    const direct = createTokenizer(json, {});
    for (const text of texts) {
      expect([...tokenizer.encode(text, { addSpecial: false })], text).toEqual([
        ...direct.encode(text, { addSpecial: false }),
      ]);
    }
    // As a file has 64-bit numbers.
    metadata.set('tokenizer.ggml.precompiled_charsmap', [1n, 2n]);
    expect(() => tokenizerFromGguf(metadata, vocab.length)).toThrowError(
      expect.objectContaining({
        code: 'corrupt_model',
        message: expect.stringContaining('not a list of numbers'),
      }),
    );
  });

  test('half a surrogate pair is U+FFFD, and takes nothing with it', () => {
    const tokenizer = createTokenizer(json, {});
    for (const text of ['a?漢', '漢?é b?', '?'])
      expect([...tokenizer.encode(text.replaceAll('?', '\ud800'))], text).toEqual([
        ...tokenizer.encode(text.replaceAll('?', '\ufffd')),
      ]);
  });

  test('long text comes in steps of bounded work', () => {
    const tokenizer = createTokenizer(json, {});
    const steps = tokenizer.encodeSteps('foxdogté漢'.repeat(20_000));
    let count = 0;
    while (!steps.next().done) count++;
    expect(count).toBeGreaterThan(10);
  });
});

test('a long text that is not split at its spaces has the ids of one that is', () => {
  const { json } = figures.models[1]!;
  const [whole, cut] = [false, true].map((split) =>
    createTokenizer({ ...json, pre_tokenizer: { ...json.pre_tokenizer, split } }, {}),
  );
  const long = 'the lazy dog runs again and falls '.repeat(1000);
  expect([...whole!.encode(long)]).toEqual([...cut!.encode(long)]);
});

test('a long text without spaces has the ids of its parts, as no token reaches over their seams', () => {
  const { json } = figures.models[1]!;
  const pieces = ['▁', 'a', 'b', 'ab', 'ba', '。', '漢', '漢字'].map((piece, i) => [piece, -1 - i / 8]);
  const vocab = [['<unk>', 0], ...pieces];
  const model = { ...json.model, vocab, unk_id: 0, byte_fallback: false };
  const tokenizer = createTokenizer({ ...json, model }, {});
  const encode = (text: string) => [...tokenizer.encode(text, { addSpecial: false })];
  // A part of 10,000 characters would end within `ab`.
  const sentence = 'abab漢字字éüab漢字ba漢。';
  const [first, ...ids] = encode(sentence);
  expect(encode(sentence.repeat(1000))).toEqual([first, ...Array.from({ length: 1000 }, () => ids).flat()]);
  // Unknown characters in a row are one unknown token, wherever seams are.
  expect(encode('éü')).toEqual([1, 0]);
  expect(encode('aéü漢')).toEqual(encode('aé漢'));
});

test('an unknown character is less likely than every piece, also than special ones', () => {
  const { json } = figures.models[1]!;
  const vocab = [
    ...[['<unk>', 0] as const, ['<s>', 0] as const],
    ...['▁', 'w', 'o', 'r', 'd', 'dé'].map((piece) => [piece, -10] as const),
    ['▁word', -1] as const,
  ];
  const idsWith = (special: number) => {
    const model = { ...json.model, byte_fallback: false };
    const scored = vocab.map(([piece, score]) => [piece, piece === '<s>' ? special : score]);
    const tokenizer = createTokenizer({ ...json, model: { ...model, vocab: scored } }, {});
    return [...tokenizer.encode('wordé', { addSpecial: false })];
  };
  // An unknown character costs 10 more than the least score: 20, or 110.
  expect(idsWith(0)).toEqual([8, 0]);
  expect(idsWith(-100)).toEqual([2, 3, 4, 5, 7]);
});

test('a table of replacements that is cut short is an error', () => {
  const { json } = figures.models[0]!;
  const broken = (table: string) => ({
    ...json,
    normalizer: { type: 'Precompiled', precompiled_charsmap: table },
  });
  expect(() => createTokenizer(broken('AAAA'), {})).toThrow(/damaged/);
  expect(() => createTokenizer(broken('/////w=='), {})).toThrow(/damaged/);
});
