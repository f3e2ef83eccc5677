/**
 * The grammar of one answer, as the engine sees it. A thread of its own matches what was generated and says which tokens
 * may follow (`grammar/xgrammar.ts`); both share some words of memory, so that the engine asks nobody and the thread
 * works while the model computes the next step.
 */
import { MaskrouteError } from '../../shared/wire/errors.ts';

/** Plain data: it goes from thread to thread. */
export type GrammarSession = {
  /** One answer's: the header, then a bit a token. */
  readonly words: SharedArrayBuffer;
  /** One for all answers of the thread; it counts what it was told. */
  readonly bell: SharedArrayBuffer;
};

/** The header of a session's words. */
export const HEADER = {
  /** Tokens that the engine has accepted. */
  accepted: 0,
  /** For how many accepted tokens the bits stand; `FAILED` when the thread gave the session up, `UNKNOWN` at first. */
  matched: 1,
  /** The last token that was accepted. */
  token: 2,
  /** 1 when the answer may end here. */
  mayEnd: 3,
  words: 8,
} as const;
const UNKNOWN = -1;
export const FAILED = -2;

export const newSession = (vocabularySize: number, bell: SharedArrayBuffer): GrammarSession => {
  const words = HEADER.words + Math.ceil(vocabularySize / 32);
  const session = { words: new SharedArrayBuffer(words * Int32Array.BYTES_PER_ELEMENT), bell };
  new Int32Array(session.words)[HEADER.matched] = UNKNOWN;
  return session;
};

/** Nothing matches the answer any more: an engine that waits for it, or will, fails it at once and holds up no other answer. */
export function giveUp(words: SharedArrayBuffer): void {
  const header = new Int32Array(words, 0, HEADER.words);
  Atomics.store(header, HEADER.matched, FAILED);
  Atomics.notify(header, HEADER.matched);
}

/** The thread has had the time of the model's step; past this it is lost. */
const LATE_ms = 2000;

export class SequenceGrammar {
  readonly #header: Int32Array;
  readonly #allowed: Int32Array;
  readonly #bell: Int32Array;

  constructor({ words, bell }: GrammarSession) {
    this.#header = new Int32Array(words, 0, HEADER.words);
    this.#allowed = new Int32Array(words, HEADER.words * Int32Array.BYTES_PER_ELEMENT);
    this.#bell = new Int32Array(bell);
  }

  /** Whether the answer may end here. @throws as `restrict`. */
  get mayEnd(): boolean {
    this.#wait();
    return this.#header[HEADER.mayEnd] === 1;
  }

  /** Whether no token but `stopTokenIds` may follow: the answer cannot go on. @throws as `restrict`. */
  isOver(stopTokenIds: readonly number[]): boolean {
    this.#wait();
    return this.#allowed.every((bits, word) => {
      let others = bits;
      for (const id of stopTokenIds) if (id >> 5 === word) others &= ~(1 << (id & 31));
      return others === 0;
    });
  }

  /**
   * Leaves `logits` of tokens that may follow, and of `stopTokenIds` where the answer may end.
   * @throws MaskrouteError `engine_failed` when the thread gives no answer.
   */
  restrict(logits: Float32Array, stopTokenIds: readonly number[]): void {
    this.#wait();
    const mayEnd = this.#header[HEADER.mayEnd] === 1;
    const kept = mayEnd ? stopTokenIds.map((id) => [id, logits[id]] as const) : [];
    for (let word = 0; word < this.#allowed.length; word++) {
      const bits = this.#allowed[word]!;
      if (bits === -1) continue;
      const first = 32 * word;
      if (bits === 0) logits.fill(Number.NEGATIVE_INFINITY, first, first + 32);
      else {
        const end = Math.min(32, logits.length - first);
        for (let bit = 0; bit < end; bit++) {
          if (((bits >>> bit) & 1) === 0) logits[first + bit] = Number.NEGATIVE_INFINITY;
        }
      }
    }
    // A stop id is no part of the answer, whatever the token would be in it.
    for (const id of stopTokenIds) if (id < logits.length) logits[id] = Number.NEGATIVE_INFINITY;
    for (const [id, logit] of kept) if (logit !== undefined) logits[id] = logit;
  }

  /** What was generated; the thread goes on from there while the model computes. */
  accept(tokenId: number): void {
    this.#header[HEADER.token] = tokenId;
    Atomics.add(this.#header, HEADER.accepted, 1);
    Atomics.add(this.#bell, 0, 1);
    Atomics.notify(this.#bell, 0);
  }

  #wait(): void {
    const until_ms = performance.now() + LATE_ms;
    for (;;) {
      const accepted = Atomics.load(this.#header, HEADER.accepted);
      const matched = Atomics.load(this.#header, HEADER.matched);
      if (matched === accepted) return;
      const left_ms = until_ms - performance.now();
      if (matched === FAILED || left_ms <= 0)
        throw new MaskrouteError('engine_failed', 'The form of the answer could not be kept.');
      Atomics.wait(this.#header, HEADER.matched, matched, left_ms);
    }
  }
}
