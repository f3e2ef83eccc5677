/**
 * The engine's side of a grammar. A separate thread matches the generated tokens and finds the allowed next tokens
 * (`grammar/xgrammar.ts`). The two share memory instead of sending messages, so that the thread works while the model
 * computes the next step.
 */
import { MaskrouteError } from '../../shared/wire/errors.ts';

/** Shared memory of one answer's grammar; plain data, so that it can be sent between threads. */
export type GrammarSession = {
  /** 32-bit words: the header, then one bit for each token of the vocabulary. */
  readonly words: SharedArrayBuffer;
  /** One counter for all answers of the thread; the engine increments and notifies it to wake the thread. */
  readonly bell: SharedArrayBuffer;
};

/** Indices of the header's words. */
export const HEADER = {
  /** Tokens that the engine has accepted. */
  accepted: 0,
  /** The number of accepted tokens that the bits are valid for; `UNKNOWN` at first, `FAILED` or `TOO_SLOW` at a bad end. */
  matched: 1,
  /** The last token that was accepted. */
  token: 2,
  /** 1 when the answer may end here. */
  mayEnd: 3,
  words: 8,
} as const;
const UNKNOWN = -1;
export const FAILED = -2;
/** Its tokens took so long that the other answers of the thread would wait too long. */
export const TOO_SLOW = -3;

export const newSession = (vocabularySize: number, bell: SharedArrayBuffer): GrammarSession => {
  const words = HEADER.words + Math.ceil(vocabularySize / 32);
  const session = { words: new SharedArrayBuffer(words * Int32Array.BYTES_PER_ELEMENT), bell };
  new Int32Array(session.words)[HEADER.matched] = UNKNOWN;
  return session;
};

/** Marks a session as failed: the engine fails its answer at once instead of waiting, which would delay other answers. */
export function giveUp(words: SharedArrayBuffer, why: typeof FAILED | typeof TOO_SLOW = FAILED): void {
  const header = new Int32Array(words, 0, HEADER.words);
  Atomics.store(header, HEADER.matched, why);
  Atomics.notify(header, HEADER.matched);
}

/** How long after the engine first asked the thread may take, which serves other answers, too; then the answer fails. */
const LATE_ms = 10_000;

export class SequenceGrammar {
  readonly #header: Int32Array;
  readonly #allowed: Int32Array;
  readonly #bell: Int32Array;
  /** When the engine first asked for bits that are not there yet. */
  #askedAt_ms: number | undefined;

  constructor({ words, bell }: GrammarSession) {
    this.#header = new Int32Array(words, 0, HEADER.words);
    this.#allowed = new Int32Array(words, HEADER.words * Int32Array.BYTES_PER_ELEMENT);
    this.#bell = new Int32Array(bell);
  }

  /**
   * Whether the allowed tokens are known; blocks up to `wait_ms` for them. Also true once they will never be known: then the
   * methods that need them throw.
   */
  isReady(wait_ms: number): boolean {
    const until_ms = performance.now() + wait_ms;
    for (;;) {
      const matched = this.#unmatched();
      if (matched === undefined) return true;
      const left_ms = Math.min(until_ms, this.#lateAt_ms()) - performance.now();
      if (left_ms <= 0) return performance.now() >= this.#lateAt_ms();
      Atomics.wait(this.#header, HEADER.matched, matched, left_ms);
    }
  }

  /** Resolves when `isReady` may have become true; blocks nothing. */
  async changed(): Promise<void> {
    const matched = this.#unmatched();
    const left_ms = this.#lateAt_ms() - performance.now();
    if (matched === undefined || left_ms <= 0) return;
    await Atomics.waitAsync(this.#header, HEADER.matched, matched, left_ms).value;
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
   * Sets `logits` `[V]` to -∞ in place, except those of allowed tokens, and of `stopTokenIds` where the answer may end.
   * @throws MaskrouteError `engine_failed` when the thread has failed or does not answer in time, `invalid_schema` when the
   * grammar takes too long.
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
    // A stop token ends the answer and is never part of it, even if the grammar allows its text.
    for (const id of stopTokenIds) if (id < logits.length) logits[id] = Number.NEGATIVE_INFINITY;
    for (const [id, logit] of kept) if (logit !== undefined) logits[id] = logit;
  }

  /** Passes a generated token to the thread, which matches it while the model computes. */
  accept(tokenId: number): void {
    this.#header[HEADER.token] = tokenId;
    Atomics.add(this.#header, HEADER.accepted, 1);
    Atomics.add(this.#bell, 0, 1);
    Atomics.notify(this.#bell, 0);
  }

  #wait(): void {
    this.isReady(LATE_ms);
    const isKnown = this.#unmatched() === undefined;
    const matched = this.#header[HEADER.matched];
    if (isKnown && matched !== FAILED && matched !== TOO_SLOW) return;
    if (matched === TOO_SLOW)
      throw new MaskrouteError(
        'invalid_schema',
        'The answer ends here, since its schema allows its text in too many ways: use simpler patterns.',
      );
    throw new MaskrouteError('engine_failed', 'The grammar of the answer could not be enforced.');
  }

  /** The number of tokens that the bits are valid for; undefined when that is all of them, or when matching has failed. */
  #unmatched(): number | undefined {
    const accepted = Atomics.load(this.#header, HEADER.accepted);
    const matched = Atomics.load(this.#header, HEADER.matched);
    if (matched === accepted || matched === FAILED || matched === TOO_SLOW) {
      this.#askedAt_ms = undefined;
      return undefined;
    }
    this.#askedAt_ms ??= performance.now();
    return matched;
  }

  #lateAt_ms(): number {
    return (this.#askedAt_ms ?? performance.now()) + LATE_ms;
  }
}
