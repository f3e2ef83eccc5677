/** SentencePiece vocabularies out of GGUF metadata, against SentencePiece itself. */
import { describe, expect, test } from 'vitest';
import { TOKEN_TYPES } from '../../../../gpu-backend/model/formats/gguf.ts';
import type { GgufValue } from '../../../../gpu-backend/model/formats/gguf-header.ts';
import { tokenizerFromGguf } from '../../../../gpu-backend/model/tokenizer/gguf-tokenizer.ts';
import { createTokenizer } from '../../../../gpu-backend/model/tokenizer/tokenizer.ts';
import { sentencePieceFixture } from '../../../support/tokenizer-files.ts';

const fixture = sentencePieceFixture();

function importFixture(changes: Record<string, GgufValue> = {}) {
  const metadata = new Map([...fixture.metadata, ...Object.entries(changes)]);
  const imported = tokenizerFromGguf(metadata, fixture.tokens.length);
  // Through text, as the store keeps it.
  const json = JSON.parse(JSON.stringify(imported.tokenizerJson));
  return { imported, tokenizer: createTokenizer(json, imported.tokenizerConfig) };
}

describe('a SentencePiece tokenizer', () => {
  const { imported, tokenizer } = importFixture();

  test('gives SentencePiece’s ids and every line back', () => {
    expect(fixture.cases.length).toBeGreaterThan(90);
    for (const { text, ids } of fixture.cases) {
      const found = [...tokenizer.encode(text, { addSpecial: false, parseSpecial: false })];
      expect(found, JSON.stringify(text)).toEqual(ids);
      // A U+2581 of the text's own cannot be told from a space.
      expect(tokenizer.decode(found)).toBe(text.replaceAll('\u2581', ' '));
    }
  });

  test('puts BOS first and recognises special tokens where it is told to', () => {
    expect(imported).toMatchObject({ addBos: true, bosTokenId: 1, eosTokenIds: [2] });
    const plain = tokenizer.encode('the fox', { addSpecial: false });
    expect([...tokenizer.encode('the fox')]).toEqual([1, ...plain]);
    expect([...tokenizer.encode('the fox</s>', { addSpecial: false, parseSpecial: true })]).toEqual([
      ...plain,
      2,
    ]);
    expect([...tokenizer.encode('the fox</s>')]).not.toContain(2);
  });

  test('runs of spaces that are tokens of their own are spaces again', () => {
    const json = imported.tokenizerJson as { readonly added_tokens: readonly object[] };
    const id = fixture.tokens.length;
    const run = { ...json.added_tokens[0], id, content: '\u2581\u2581', special: false };
    const withRun = createTokenizer(
      { ...json, added_tokens: [...json.added_tokens, run] },
      imported.tokenizerConfig,
    );
    expect(withRun.tokenBytes(id)).toEqual(Uint8Array.of(0x20, 0x20));
  });

  test('a tag of HTML ends no answer, though it is named as the end of text is elsewhere', () => {
    const types = [...(fixture.metadata.get('tokenizer.ggml.token_type') as number[])];
    types[2] = TOKEN_TYPES.userDefined;
    const changes = { 'tokenizer.ggml.token_type': types, 'tokenizer.ggml.eos_token_id': 1 };
    expect(importFixture(changes).imported.eosTokenIds).toEqual([1]);
  });

  test('a stream joins bytes into characters and keeps the space that follows a prompt', () => {
    const decoder = tokenizer.createDecoder({ showSpecial: false });
    const parts = Array.from(tokenizer.encode('漢 fox'), (id) => decoder.push(id));
    expect(parts.join('') + decoder.flush()).toBe(' 漢 fox');
    expect(parts.every((part) => !part.includes('\ufffd'))).toBe(true);
    expect(tokenizer.tokenBytes(fixture.tokens.indexOf('<0xE6>'))).toEqual(Uint8Array.of(0xe6));
  });

  test('without the prefix no space is added and none is taken away', () => {
    const bare = importFixture({ 'tokenizer.ggml.add_space_prefix': false }).tokenizer;
    const ids = bare.encode(' fox', { addSpecial: false });
    expect(bare.decode(ids)).toBe(' fox');
    expect(bare.decode(bare.encode('fox', { addSpecial: false }))).toBe('fox');
  });

  test('of a Phi-3 drops white space behind special tokens, but not behind BOS', () => {
    const phi3 = importFixture({ 'general.architecture': 'phi3' }).tokenizer;
    const [own, plain] = [phi3, tokenizer].map(({ encode }) => (line: string) => [
      ...encode(line, { addSpecial: false, parseSpecial: true }),
    ]);
    const line = '</s>\n the fox';
    expect(own!(line)).toEqual([2, ...plain!('the fox')]);
    expect(plain!(line)).not.toEqual(own!(line));
    expect(own!('<s>\n the fox')).toEqual(plain!('<s>\n the fox'));
  });

  test('cuts a long text at its spaces, also where a control token has some in its name', () => {
    const named = fixture.tokens.map((token, id) => (id === 2 ? '<end\u2581of\u2581answer>' : token));
    const other = importFixture({ 'tokenizer.ggml.tokens': named }).tokenizer;
    const long = 'the quick brown foxes '.repeat(2000);
    expect([...other.encode(long)]).toEqual([...tokenizer.encode(long)]);
  });

  test.each([
    ['a token of a million characters', ['x'.repeat(1_000_000)]],
    ['very many long tokens', Array.from({ length: 477 }, (_, i) => `${i}${'x'.repeat(1000)}`)],
  ])('%s does not hold up an import', (_, tokens) => {
    const before = process.cpuUsage();
    const all = [...fixture.tokens.slice(0, 3), ...tokens];
    try {
      importFixture({ 'tokenizer.ggml.tokens': all });
    } catch (error) {
      expect(error).toMatchObject({ code: 'corrupt_model' });
    }
    const { user, system } = process.cpuUsage(before);
    expect((user + system) / 1000, 'ms of the processor').toBeLessThan(2000);
  });

  test('scores that are missing are damage', () => {
    expect(() => importFixture({ 'tokenizer.ggml.scores': [1, 2] })).toThrowError(
      expect.objectContaining({ code: 'corrupt_model' }),
    );
  });
});
