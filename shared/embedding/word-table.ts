/**
 * Words of ASCII by their place in a text: finds a word's id without cutting it out, which a `Map` would need, and which
 * is most of a tokenizer's time. Whoever scans the text hashes the word as it goes (FNV-1a, 32 bits).
 */

export const HASH_START = 0x811c9dc5;
export const hashNext = (hash: number, code: number): number => Math.imul(hash ^ code, 0x01000193);

/** The id of `text.slice(start, end)`, whose codes `hash` is of; -1 when it is no word of the table. */
export type WordTable = (text: string, start: number, end: number, hash: number) => number;

/** @param ids what is more than small letters and digits is left out. */
export function createWordTable(ids: ReadonlyMap<string, number>): WordTable {
  const words: string[] = [];
  const wordIds = new Int32Array(ids.size);
  // At most half full, so that a search ends after a step or two.
  const slots = new Int32Array(2 ** Math.ceil(Math.log2(2 * ids.size + 1))).fill(EMPTY);
  const mask = slots.length - 1;
  const first = (hash: number): number => (hash ^ (hash >>> 16)) & mask;
  for (const [word, id] of ids) {
    const hash = hashOf(word);
    if (hash === undefined) continue;
    let slot = first(hash);
    while (slots[slot] !== EMPTY) slot = (slot + 1) & mask;
    slots[slot] = words.length;
    wordIds[words.length] = id;
    words.push(word);
  }
  return (text, start, end, hash) => {
    for (let slot = first(hash); ; slot = (slot + 1) & mask) {
      const index = slots[slot]!;
      if (index === EMPTY) return -1;
      const word = words[index]!;
      if (word.length === end - start && isAt(text, start, word)) return wordIds[index]!;
    }
  };
}

const EMPTY = -1;

/** Undefined for a word of anything but small letters and digits. */
function hashOf(word: string): number | undefined {
  let hash = HASH_START;
  for (let i = 0; i < word.length; i++) {
    const code = word.charCodeAt(i);
    const isPlain = (code >= 0x61 && code <= 0x7a) || (code >= 0x30 && code <= 0x39);
    if (!isPlain) return undefined;
    hash = hashNext(hash, code);
  }
  return hash;
}

/** `text.startsWith(word, start)`, without a call into the runtime. */
function isAt(text: string, start: number, word: string): boolean {
  for (let i = 0; i < word.length; i++) {
    if (text.charCodeAt(start + i) !== word.charCodeAt(i)) return false;
  }
  return true;
}
