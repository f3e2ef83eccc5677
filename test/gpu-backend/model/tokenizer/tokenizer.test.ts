/** The installed model's tokenizer against Hugging Face's own, and the way back against decoding all at once. */
import { readFileSync } from 'node:fs';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import fc from 'fast-check';
import { beforeAll, describe, expect, test } from 'vitest';
import { type ModelText, openModelText } from '../../../../gpu-backend/model/tokenizer/model-text.ts';
import { createTokenizer, type Tokenizer } from '../../../../gpu-backend/model/tokenizer/tokenizer.ts';
import { installedModel } from '../../../support/installed-model.ts';

type Case = { text: string; ids: number[]; plainIds?: number[] };
const cases: Case[] = JSON.parse(readFileSync(new URL('fixtures/tokenizer.json', import.meta.url), 'utf8'));

let text: ModelText;
let tokenizer: Tokenizer;
beforeAll(async () => {
  const { folder, manifest } = await installedModel();
  text = await openModelText(folder, manifest);
  tokenizer = text.tokenizer;
});

describe('encode', () => {
  test('gives the reference’s ids, special tokens recognised or not', () => {
    expect(cases.length).toBeGreaterThan(200);
    for (const { text: line, ids, plainIds = ids } of cases) {
      expect([...tokenizer.encode(line, { parseSpecial: true })], JSON.stringify(line)).toEqual(ids);
      expect([...tokenizer.encode(line, { parseSpecial: false })], JSON.stringify(line)).toEqual(plainIds);
    }
  });

  test('nothing is nothing, and half a surrogate pair is U+FFFD', () => {
    expect([...tokenizer.encode('')]).toEqual([]);
    expect(tokenizer.decode(tokenizer.encode('a\ud800b'))).toBe('a\ufffdb');
  });

  test('leaves out merges of what is no token, and into what is none: text would vanish', () => {
    const vocab = Object.fromEntries(['a', 'b', 'c', 'd', 'ab', 'xa'].map((name, id) => [name, id]));
    const byteLevel = { type: 'ByteLevel', add_prefix_space: false, use_regex: false };
    const model = { type: 'BPE', vocab, merges: ['c d', 'x a', 'a b', 'ab c'] };
    const { encode } = createTokenizer({ model, pre_tokenizer: byteLevel, decoder: byteLevel }, {});
    expect([...encode('abcd')]).toEqual([4, 2, 3]);
    expect([...encode('xab')]).toEqual([4]);
  });

  test('does not keep a text in memory for a word of it', () => {
    setFlagsFromString('--expose-gc');
    const collect = runInNewContext('gc') as () => void;
    const used_MiB = () => {
      collect();
      return process.memoryUsage().heapUsed / 2 ** 20;
    };
    const before = used_MiB();
    for (let i = 0; i < 100; i++) {
      const word = `unmistakable${'abcdefghij'[i % 10]}${'abcdefghij'[Math.floor(i / 10)]}`;
      // Read from bytes, as a request's text is; encoded to where it turns out to be too long.
      tokenizer.encodeSteps(Buffer.from(`${word}${' a'.repeat(250_000)}`).toString()).next();
    }
    expect(used_MiB() - before).toBeLessThan(20);
  });

  test('prose of 100,000 tokens and long runs of anything take seconds at most', () => {
    const long = {
      prose: 'The rain in Spain stays mainly in the plain. '.repeat(9000),
      'one word': 'abcdefghij'.repeat(6000),
      spaces: ' '.repeat(60_000),
      digits: '7'.repeat(20_000),
      'almost special': '<|im_'.repeat(4000),
      'characters of two units': `a${'𝒳'.repeat(9000)}`,
    };
    for (const [kind, prompt] of Object.entries(long)) {
      const before = process.cpuUsage();
      const ids = tokenizer.encode(prompt);
      const { user, system } = process.cpuUsage(before);
      expect((user + system) / 1000, `ms of the processor for ${kind}`).toBeLessThan(10_000);
      expect(tokenizer.decode(ids) === prompt, kind).toBe(true);
    }
  });
});

test('a step ends within a long word', () => {
  const word = Array.from({ length: 9000 }, (_, i) => String.fromCharCode(0x4e00 + ((i * 7919) % 5000)));
  const steps = tokenizer.encodeSteps(word.join(''));
  const first = steps.next();
  expect(first.done).toBe(false);
  expect(first.value).toBeLessThan(0.5 * tokenizer.encode(word.join('')).length);
});

describe('decode', () => {
  test('gives every line back', () => {
    for (const { text: line, ids } of cases) expect(tokenizer.decode(ids)).toBe(line);
  });

  test('a stream shows what decoding all bytes at once shows, and never half a character', () => {
    const ids = fc.array(fc.oneof(fc.nat(49_151), fc.constantFrom(...tokenizer.encode('漢👩‍🚀é🇩🇪'))), {
      maxLength: 40,
    });
    fc.assert(
      fc.property(ids, (sequence) => {
        const decoder = tokenizer.createDecoder({ showSpecial: true });
        const parts = sequence.map((id) => decoder.push(id));
        const bytes = Buffer.concat(sequence.map((id) => tokenizer.tokenBytes(id)));
        expect(parts.join('') + decoder.flush()).toBe(
          new TextDecoder('utf-8', { ignoreBOM: true }).decode(bytes),
        );
      }),
      { seed: 1, numRuns: 500 },
    );
    const decoder = tokenizer.createDecoder({ showSpecial: true });
    const shown = Array.from(tokenizer.encode('👩‍🚀'), (id) => decoder.push(id));
    expect(shown.join('')).toBe('👩‍🚀');
    expect(shown.every((part) => part.isWellFormed() && !part.includes('\ufffd'))).toBe(true);
    expect(decoder.flush()).toBe('');
  });

  test('what is no stand-in of a byte, in a damaged vocabulary, is shown as it is', () => {
    const byteLevel = { type: 'ByteLevel', add_prefix_space: false, use_regex: false };
    const model = { type: 'BPE', vocab: { a漢Ġ: 0, '😀b': 1 }, merges: [] };
    const { decode } = createTokenizer({ model, pre_tokenizer: byteLevel, decoder: byteLevel }, {});
    expect(decode([0, 1])).toBe('a漢 😀b');
  });

  test('an unfinished character shows as U+FFFD at the end, and only there', () => {
    const ids = tokenizer.encode('𓀀');
    expect(ids.length).toBeGreaterThan(1);
    expect(tokenizer.decode(ids.subarray(0, -1))).toBe('\ufffd');
  });

  test('special tokens are shown or left out', () => {
    const ids = tokenizer.encode('<|im_start|>user\nHi<|im_end|>', { parseSpecial: true });
    expect(tokenizer.decode(ids)).toBe('<|im_start|>user\nHi<|im_end|>');
    const decoder = tokenizer.createDecoder({ showSpecial: false });
    expect(Array.from(ids, (id) => decoder.push(id)).join('') + decoder.flush()).toBe('user\nHi');
    expect(Buffer.from(tokenizer.tokenBytes(2)).toString()).toBe('<|im_end|>');
  });

  test('no token is longer than tokenBytesMax, and an unknown id has no bytes', () => {
    const lengths = Array.from({ length: 49_152 }, (_, id) => tokenizer.tokenBytes(id).length);
    expect(Math.max(...lengths)).toBe(tokenizer.tokenBytesMax);
    expect(Math.min(...lengths)).toBeGreaterThan(0);
    expect(tokenizer.tokenBytes(49_152).length).toBe(0);
  });
});

test('a conversation is written as the model’s template has it', async () => {
  const ids = text.encodeChat([
    { role: 'user', content: 'Hi' },
    { role: 'assistant', content: [{ type: 'text', text: 'Hello' }] },
    { role: 'user', content: 'Bye' },
  ]);
  expect(tokenizer.decode(ids)).toBe(
    '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' +
      '<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n' +
      '<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n',
  );
  expect((await installedModel()).manifest.eosTokenIds).toEqual([2, 0]);
});
