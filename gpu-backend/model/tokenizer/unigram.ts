/**
 * Unigram tokenization (Kudo, 2018): splits a word into the pieces with the highest sum of scores (Viterbi), in steps of
 * bounded work. Gives the same ids as Hugging Face's unigram/model.rs.
 */
import { remembering } from './byte-pairs.ts';

export type UnigramJson = {
  readonly type: 'Unigram';
  /** By id: a piece and its score. */
  readonly vocab: readonly (readonly [string, number])[];
  readonly unk_id: number | null;
  readonly byte_fallback?: boolean;
};

/** An unknown character's score is so much lower than the lowest score of a piece. */
const UNKNOWN_PENALTY = 10;
const CHARS_A_PIECE = 4096;

/**
 * Returns a function that appends the ids of one word. `reserved`: names of special tokens, which text never becomes.
 * @throws Error without an unknown token.
 */
export function createUnigram(json: UnigramJson, reserved: ReadonlySet<string>) {
  const { vocab, unk_id: unknown } = json;
  if (unknown === null || vocab[unknown] === undefined) throw new Error('it has no unknown token');
  const scores = Float64Array.from(vocab, ([, score]) => score);
  const unknownScore = scores.reduce((least, score) => Math.min(least, score), Infinity) - UNKNOWN_PENALTY;
  const pieces = piecesByPrefix(vocab, reserved);
  const byteIds = json.byte_fallback ? bytePieces(vocab) : undefined;

  /** For the best path to each position: the position before, and the piece between. */
  function* bestWays(word: string): Generator<void, { from: Int32Array; ids: Int32Array }> {
    const best = new Float64Array(word.length + 1);
    const from = new Int32Array(word.length + 1).fill(-1);
    const ids = new Int32Array(word.length + 1);
    const offer = (start: number, end: number, id: number, score: number) => {
      const total = best[start]! + score;
      if (from[end] !== -1 && total <= best[end]!) return;
      best[end] = total;
      from[end] = start;
      ids[end] = id;
    };
    let work = 0;
    for (let start = 0; start < word.length; start = next(word, start)) {
      const one = next(word, start);
      let hasOne = false;
      for (let end = one; ; end = next(word, end)) {
        const id = pieces.get(word.slice(start, end));
        if (++work % CHARS_A_PIECE === 0) yield;
        if (id !== undefined && id !== PREFIX) {
          offer(start, end, id, scores[id]!);
          hasOne ||= end === one;
        }
        if (id === undefined || end >= word.length) break;
      }
      if (!hasOne) offer(start, one, unknown!, unknownScore);
    }
    return { from, ids };
  }

  function* spelled(word: string): Generator<void, readonly number[]> {
    const { from, ids } = yield* bestWays(word);
    const found: number[] = [];
    // Backwards; neighbouring unknown characters are joined.
    for (let end = word.length; end > 0; ) {
      let start = from[end]!;
      if (ids[end] !== unknown) {
        found.push(ids[end]!);
        end = start;
        continue;
      }
      while (start > 0 && ids[start] === unknown) start = from[start]!;
      found.push(...ofUnknown(word.slice(start, end), unknown!, byteIds).reverse());
      end = start;
    }
    return found.reverse();
  }

  return remembering(spelled);
}

const next = (word: string, at: number): number => at + (word.codePointAt(at)! > 0xffff ? 2 : 1);

/** Marks a prefix of pieces that is no piece itself. */
const PREFIX = -1;

function piecesByPrefix(vocab: UnigramJson['vocab'], reserved: ReadonlySet<string>): Map<string, number> {
  const pieces = new Map<string, number>();
  vocab.forEach(([piece], id) => {
    if (piece === '' || reserved.has(piece)) return;
    for (let end = next(piece, 0); end < piece.length; end = next(piece, end)) {
      const prefix = piece.slice(0, end);
      if (!pieces.has(prefix)) pieces.set(prefix, PREFIX);
    }
    // Of two pieces with the same name, the later counts, as in the original.
    pieces.set(piece, id);
  });
  return pieces;
}

/** The piece of each byte; undefined for a byte without a piece. */
function bytePieces(vocab: UnigramJson['vocab']): readonly (number | undefined)[] {
  const ids = new Map(vocab.map(([piece], id) => [piece, id]));
  return Array.from({ length: 256 }, (_, byte) =>
    ids.get(`<0x${byte.toString(16).toUpperCase().padStart(2, '0')}>`),
  );
}

const utf8 = new TextEncoder();

function ofUnknown(
  text: string,
  unknown: number,
  byteIds: readonly (number | undefined)[] | undefined,
): number[] {
  const ids = byteIds && Array.from(utf8.encode(text), (byte) => byteIds[byte]);
  return ids?.every((id) => id !== undefined) ? (ids as number[]) : [unknown];
}

/* The pre-tokenizer: splits at white space, which is dropped, and before spaces, which become U+2581. */

type MetaspaceJson = {
  readonly type: string;
  readonly replacement?: string;
  readonly prepend_scheme?: string;
  readonly add_prefix_space?: boolean;
  readonly split?: boolean;
};

/** White space as Unicode and Rust define it. */
const WHITE_SPACE = /[\t-\r \u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/;

/**
 * `parts`: `WhitespaceSplit` and `Metaspace`, in this order, each at most once. `isFirst`: whether the text is the beginning
 * of the encoded text. @throws Error for other parts.
 */
export function metaspaceCutter(
  parts: readonly MetaspaceJson[],
): (text: string, isFirst: boolean) => Iterable<string> {
  const drops = parts[0]?.type === 'WhitespaceSplit';
  const [metaspace, ...others] = drops ? parts.slice(1) : parts;
  if (others.length > 0 || (metaspace !== undefined && metaspace.type !== 'Metaspace')) {
    throw new Error(`it splits text by ${parts.map(({ type }) => type).join(', ')}`);
  }
  const scheme = metaspace?.prepend_scheme ?? (metaspace?.add_prefix_space === false ? 'never' : 'always');
  const mark = metaspace?.replacement ?? '\u2581';
  const splits = metaspace !== undefined && metaspace.split !== false;
  return function* (text, isFirst) {
    const pieces = drops ? text.split(WHITE_SPACE) : [text];
    for (const [i, piece] of pieces.entries()) {
      if (piece === '') continue;
      if (metaspace === undefined) {
        yield piece;
        continue;
      }
      const prepends = scheme === 'always' || (scheme === 'first' && isFirst && i === 0);
      const marked = piece.replaceAll(' ', mark);
      const word = prepends && !marked.startsWith(mark) ? mark + marked : marked;
      if (splits) yield* beginningWith(word, mark);
      else yield word;
    }
  };
}

/** Splits a text before every mark. */
function* beginningWith(text: string, mark: string): Generator<string> {
  for (let at = 0; at < text.length; ) {
    const following = text.indexOf(mark, at + 1);
    const end = following === -1 ? text.length : following;
    yield text.slice(at, end);
    at = end;
  }
}
