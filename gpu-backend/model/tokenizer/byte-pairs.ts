/**
 * Byte-pair encoding that can pause. It gives the same ids as @huggingface/tokenizers and the original, but merges a long
 * word in steps of bounded work, so that its thread can serve other requests or stop. The library merges a word of half a
 * million letters in one call, which takes seconds. (BPE: Sennrich et al., 2016; a heap of ranks as in Hugging Face's
 * word.rs.)
 */

export type BytePairsJson = {
  readonly vocab: Readonly<Record<string, number>>;
  readonly merges: readonly (string | readonly [string, string])[];
  readonly unk_token?: string | null;
  readonly byte_fallback?: boolean;
  readonly ignore_merges?: boolean;
  readonly end_of_word_suffix?: string | null;
  readonly continuing_subword_prefix?: string | null;
};

type BytePairs = {
  /**
   * Appends the ids of one pre-token to `ids`. Yields after each some milliseconds of work; a short pre-token never yields.
   */
  encode(word: string, ids: number[]): Generator<void, void>;
  /** Whether no token contains U+2581 after another character, so that text may be split before each U+2581. */
  readonly cutsAtSpaces: boolean;
};

/** Merge steps, or looked-up symbols, between two yields. */
const STEPS_A_PIECE = 4096;
/** Heap values are rank · POSITIONS + position, which fit into 53 bits. */
const POSITIONS = 2 ** 26;

/**
 * @param reserved names of special tokens, which text never becomes.
 * @param byteNames the vocabulary's names of the 256 bytes for byte-level BPE; undefined when symbols are characters.
 * @throws Error for a kind of merging that is not supported.
 */
export function createBytePairs(
  json: BytePairsJson,
  reserved: ReadonlySet<string>,
  byteNames: readonly string[] | undefined,
): BytePairs {
  if (json.end_of_word_suffix || json.continuing_subword_prefix) {
    throw new Error('its tokens are marked at the ends of words');
  }
  const idOf = new Map(Object.entries(json.vocab).filter(([name]) => !reserved.has(name)));
  const table = readMerges(json.merges, idOf);
  const unknown = json.unk_token == null ? undefined : json.vocab[json.unk_token];
  const symbolsOf = byteNames ? byteSymbols(idOf, byteNames, unknown) : characterSymbols(json, idOf, unknown);
  const nameOf = byteNames ? (word: string) => inByteNames(word, byteNames) : (word: string) => word;
  const nameChars = json.ignore_merges ? longestName(idOf) : 0;

  function* merged(word: string): Generator<void, readonly number[]> {
    if (word.length <= nameChars) {
      const whole = idOf.get(nameOf(word));
      if (whole !== undefined) return [whole];
    }
    const symbols: number[] = [];
    yield* symbolsOf(word, symbols);
    return yield* merge(symbols, table);
  }

  return {
    encode: remembering(merged),
    cutsAtSpaces: ![...idOf.keys()].some((name) => /[^\u2581]\u2581/.test(name)),
  };
}

/** Words up to this length are cached. */
const SHORT_CHARS = 64;
const WORDS_REMEMBERED_MAX = 10_000;

/** `encode`, which finds a word's ids, with a cache of short words: the returned function appends them to `ids`. */
export function remembering(encode: (word: string) => Generator<void, readonly number[]>) {
  const remembered = new Map<string, readonly number[]>();
  return function* (word: string, ids: number[]): Generator<void, void> {
    const known = remembered.get(word);
    const found = known ?? (yield* encode(word));
    // `push(...found)` would overflow the stack for a long list.
    for (const id of found) ids.push(id);
    if (known !== undefined || word.length > SHORT_CHARS) return;
    if (remembered.size >= WORDS_REMEMBERED_MAX) remembered.delete(remembered.keys().next().value!);
    remembered.set(word, found);
  };
}

type MergeTable = {
  /** Rank of a pair of ids. */
  readonly ranks: ReadonlyMap<number, number>;
  /** The merged id, by rank. */
  readonly products: Int32Array;
};

/** Two ids as one number. */
const pairOf = (left: number, right: number): number => left * 2 ** 24 + right;

/** Merges from or into names that are no tokens of text are ignored. */
function readMerges(merges: BytePairsJson['merges'], idOf: ReadonlyMap<string, number>): MergeTable {
  const ranks = new Map<number, number>();
  const products = new Int32Array(merges.length);
  merges.forEach((pair, rank) => {
    const [left, right] = typeof pair === 'string' ? (pair.split(' ', 2) as [string, string]) : pair;
    const [leftId, rightId, product] = [idOf.get(left), idOf.get(right), idOf.get(left + right)];
    if (leftId === undefined || rightId === undefined || product === undefined) return;
    ranks.set(pairOf(leftId, rightId), rank);
    products[rank] = product;
  });
  return { ranks, products };
}

/** Appends a word's initial symbols. Negative symbols never merge: {@link ofUnknown}. */
type SymbolsOf = (word: string, symbols: number[]) => Generator<void, void>;

/** A symbol for a character without a token: it becomes `id` at the end, but does not merge. Its own inverse. */
const ofUnknown = (id: number): number => -1 - id;
/** A character that the vocabulary cannot write at all; it is dropped. */
const NO_TOKEN = -(2 ** 30);

function byteSymbols(
  idOf: ReadonlyMap<string, number>,
  byteNames: readonly string[],
  unknown: number | undefined,
): SymbolsOf {
  const missing = unknown === undefined ? NO_TOKEN : ofUnknown(unknown);
  const table = byteNames.map((name) => idOf.get(name) ?? missing);
  const utf8 = new TextEncoder();
  return function* (word, symbols) {
    const bytes = utf8.encode(word);
    for (let i = 0; i < bytes.length; i++) {
      symbols.push(table[bytes[i]!]!);
      if (i % STEPS_A_PIECE === STEPS_A_PIECE - 1) yield;
    }
  };
}

function characterSymbols(
  { byte_fallback }: BytePairsJson,
  idOf: ReadonlyMap<string, number>,
  unknown: number | undefined,
): SymbolsOf {
  const utf8 = new TextEncoder();
  const byteIds = Array.from({ length: 256 }, (_, byte) =>
    byte_fallback ? idOf.get(`<0x${byte.toString(16).toUpperCase().padStart(2, '0')}>`) : undefined,
  );
  return function* (word, symbols) {
    let count = 0;
    for (const character of word) {
      if (++count % STEPS_A_PIECE === 0) yield;
      const id = idOf.get(character);
      if (id !== undefined) {
        symbols.push(id);
        continue;
      }
      const bytes = Array.from(utf8.encode(character), (byte) => byteIds[byte]);
      if (bytes.every((byte) => byte !== undefined)) for (const byte of bytes) symbols.push(ofUnknown(byte));
      else symbols.push(unknown === undefined ? NO_TOKEN : ofUnknown(unknown));
    }
  };
}

const inByteNames = (word: string, byteNames: readonly string[]): string =>
  Array.from(new TextEncoder().encode(word), (byte) => byteNames[byte]).join('');

const longestName = (idOf: ReadonlyMap<string, number>): number =>
  [...idOf.keys()].reduce((longest, name) => Math.max(longest, name.length), 0);

/** Merges the pair with the lowest rank, among equal ranks the leftmost, until no pair is left. */
function* merge(symbols: number[], { ranks, products }: MergeTable): Generator<void, readonly number[]> {
  const count = symbols.length;
  const next = Int32Array.from({ length: count }, (_, i) => (i + 1 < count ? i + 1 : -1));
  const previous = Int32Array.from({ length: count }, (_, i) => i - 1);
  const heap = new MinHeap();
  const consider = (left: number) => {
    const right = left < 0 ? -1 : next[left]!;
    if (right < 0 || symbols[left]! < 0 || symbols[right]! < 0) return;
    const rank = ranks.get(pairOf(symbols[left]!, symbols[right]!));
    if (rank !== undefined) heap.push(rank * POSITIONS + left);
  };
  for (let i = 0; i < count; i++) {
    consider(i);
    if (i % STEPS_A_PIECE === STEPS_A_PIECE - 1) yield;
  }
  /** 1 for symbols that were merged into the symbol before. */
  const gone = new Uint8Array(count);
  for (let steps = 1; heap.size > 0; steps++) {
    if (steps % STEPS_A_PIECE === 0) yield;
    const top = heap.pop();
    const rank = Math.floor(top / POSITIONS);
    const left = top % POSITIONS;
    const right = next[left]!;
    // An earlier merge may have changed one of the two.
    if (gone[left] || right < 0 || ranks.get(pairOf(symbols[left]!, symbols[right]!)) !== rank) continue;
    symbols[left] = products[rank]!;
    gone[right] = 1;
    const after = next[right]!;
    next[left] = after;
    if (after >= 0) previous[after] = left;
    consider(left);
    consider(previous[left]!);
  }
  const found: number[] = [];
  for (let i = 0; i >= 0 && i < count; i = next[i]!) {
    const symbol = symbols[i]!;
    if (symbol !== NO_TOKEN) found.push(symbol < 0 ? ofUnknown(symbol) : symbol);
  }
  return found;
}

class MinHeap {
  readonly #values: number[] = [];

  get size(): number {
    return this.#values.length;
  }

  push(value: number): void {
    const values = this.#values;
    let at = values.length;
    values.push(value);
    while (at > 0) {
      const parent = (at - 1) >> 1;
      if (values[parent]! <= value) break;
      values[at] = values[parent]!;
      at = parent;
    }
    values[at] = value;
  }

  /** The heap must not be empty. */
  pop(): number {
    const values = this.#values;
    const top = values[0]!;
    const last = values.pop()!;
    const size = values.length;
    if (size === 0) return top;
    let at = 0;
    for (;;) {
      let child = 2 * at + 1;
      if (child >= size) break;
      if (child + 1 < size && values[child + 1]! < values[child]!) child++;
      if (values[child]! >= last) break;
      values[at] = values[child]!;
      at = child;
    }
    values[at] = last;
    return top;
  }
}
