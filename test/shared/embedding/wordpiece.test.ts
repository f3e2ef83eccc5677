/** Plain ASCII takes a short way past the library; its ids must be the library's. */
import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { parseStaticTable } from '../../../shared/embedding/static-encoder.ts';
import { loadWordPiece } from '../../../shared/embedding/wordpiece.ts';

const { vocabulary } = parseStaticTable(readFileSync('workers/assets/encoder/static.bin'));
const { tokenIds, unkTokenId } = loadWordPiece(vocabulary);

/** What the library says of `text`: an accent sends all of it there, and its own id is taken off again. */
const libraryIds = (text: string): readonly number[] => tokenIds(`${text} é`).slice(0, -1);

/** Seeded, so that a failure can be met again. */
function random(seed: number): () => number {
  let state = seed;
  return () => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    return state / 2 ** 32;
  };
}

describe('the ids of plain ASCII', () => {
  it.each([
    '',
    ' \t\r\n ',
    'Why is the sky blue?',
    'unaffable antidisestablishmentarianism qzxqzx',
    "it's 12*12=144; (a_b) {c}~`d` $e ^f |g #h @i",
    'a\tb\nc\r\nd',
    'x'.repeat(100),
    'x'.repeat(101),
    `${'un'.repeat(60)} and more`,
    '[CLS] is text and ] is too',
    'a\u0000b\u007fc\u0001d',
    // Its small letter is ASCII.
    'at 300 \u212a it melts',
  ])('of %j are the library’s', (text) => {
    expect(tokenIds(text)).toEqual(libraryIds(text));
  });

  it('are the library’s for ten thousand texts of words, pieces and punctuation', () => {
    const next = random(7);
    const pick = <T>(list: readonly T[]): T => list[Math.floor(next() * list.length)]!;
    const ascii = Array.from({ length: 95 }, (_, i) => String.fromCharCode(32 + i));
    const plain = vocabulary.filter((token) => /^[\x21-\x7e]+$/.test(token) && !token.startsWith('['));
    for (let round = 0; round < 10_000; round++) {
      const parts = Array.from({ length: 1 + Math.floor(next() * 8) }, () => {
        const word = pick(plain).replace(/^##/, '');
        const cased = next() < 0.3 ? word.toUpperCase() : word;
        return next() < 0.3 ? cased + pick(ascii) + pick(ascii) : cased;
      });
      const text = parts.join(next() < 0.5 ? ' ' : pick(ascii));
      expect(tokenIds(text), JSON.stringify(text)).toEqual(libraryIds(text));
    }
  });

  it.each(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]'])(
    'read a %s that somebody wrote as text',
    (token) => {
      const [open, close] = ['[', ']'].map((mark) => vocabulary.indexOf(mark));
      const letters = tokenIds(token.slice(1, -1));
      expect(tokenIds(token)).toEqual([open, ...letters, close]);
      expect(tokenIds(`${token} é`).slice(0, -1)).toEqual([open, ...letters, close]);
    },
  );

  it('know an unknown word', () => {
    expect(tokenIds('x'.repeat(101))).toEqual([unkTokenId]);
  });
});
