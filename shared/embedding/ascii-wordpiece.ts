/**
 * WordPiece for plain ASCII text: nothing to normalise but the case, so words are found and looked up in one pass. It
 * gives the ids that the library gives (a test compares them), in a tenth of its time.
 */
import { createWordTable, HASH_START, hashNext } from './word-table.ts';

/** A longer word is unknown. */
const WORD_CHARS_MAX = 100;
const CONTINUED = '##';

/** Ids of a text's words; undefined for a text that is not plain ASCII, or may hold a special token. */
export type AsciiWordPiece = (text: string) => number[] | undefined;

export function createAsciiWordPiece(ids: ReadonlyMap<string, number>, unkTokenId: number): AsciiWordPiece {
  /** Pieces that go on a word, without their mark. */
  const continued = new Map(
    [...ids].flatMap(([token, id]): [string, number][] =>
      token.startsWith(CONTINUED) ? [[token.slice(CONTINUED.length), id]] : [],
    ),
  );

  /**
   * Of a word that is not known as a whole. Greedy: always the longest piece that is known. If a rest is not known either,
   * all of the word is unknown.
   */
  const pushPieces = (found: number[], word: string): void => {
    const before = found.length;
    let start = word.length > WORD_CHARS_MAX ? -1 : 0;
    while (start >= 0 && start < word.length) {
      const pieces = start === 0 ? ids : continued;
      let end = start === 0 ? word.length - 1 : word.length;
      let id: number | undefined;
      while (end > start) {
        id = pieces.get(word.slice(start, end));
        if (id !== undefined) break;
        end--;
      }
      if (id !== undefined) found.push(id);
      start = id === undefined ? -1 : end;
    }
    if (start >= 0) return;
    found.length = before;
    found.push(unkTokenId);
  };

  const words = createWordTable(ids);
  /** Of a single character, by its code. */
  const marks = Int32Array.from(KINDS, (_, code) => ids.get(String.fromCharCode(code)) ?? unkTokenId);
  return (text) => {
    const lower = text.toLowerCase();
    const found: number[] = [];
    let wordAt = -1;
    let hash = HASH_START;
    for (let i = 0; i <= lower.length; i++) {
      const code = i === lower.length ? SPACE_CODE : lower.charCodeAt(i);
      const kind = code < KINDS.length ? KINDS[code]! : OTHER;
      if (kind === OTHER) return undefined;
      if (kind === WORD) {
        if (wordAt < 0) {
          wordAt = i;
          hash = HASH_START;
        }
        hash = hashNext(hash, code);
        continue;
      }
      if (wordAt >= 0) {
        const whole = words(lower, wordAt, i, hash);
        if (whole < 0) pushPieces(found, lower.slice(wordAt, i));
        else found.push(whole);
        wordAt = -1;
      }
      if (kind === PUNCTUATION) found.push(marks[code]!);
    }
    return found;
  };
}

const SPACE_CODE = 0x20;
const [OTHER, SPACE, WORD, PUNCTUATION] = [0, 1, 2, 3] as const;

/** By character code. `[` may begin a special token, and control characters vanish: the library knows how. */
const KINDS: Uint8Array = Uint8Array.from({ length: 128 }, (_, code) => {
  const char = String.fromCharCode(code);
  if (/[\t\n\r ]/.test(char)) return SPACE;
  if (code < 0x20 || code === 0x7f || char === '[') return OTHER;
  return /[a-z0-9]/i.test(char) ? WORD : PUNCTUATION;
});
