/**
 * Speculative decoding from a text that the answer probably repeats in large part: OpenAI's `prediction`. A step computes the
 * tokens that come next in that text (the draft) together with the answer's own last token. Each row's token is sampled as
 * always, and the rows behind the first token that differs from the draft are thrown away. So the model decides every token,
 * and a good prediction makes the answer come sooner.
 *
 * The limit: a step of a few rows reads the weights once, as a step of one row does, and takes longer by the products of each
 * row (`step-cost.ts`).
 */
import type { PredictedTokens } from './engine.ts';

/** Longer drafts save little more, and cost more where the answer leaves the prediction. */
export const DRAFT_TOKENS_MAX = 15;
const DRAFT_TOKENS_FIRST = 4;
const DRAFT_TOKENS_MIN = 2;

export class Prediction {
  readonly #tokenIds: Int32Array;
  /** The place in the prediction that the answer has reached; undefined after a token that differs. */
  #at: number | undefined = 0;
  /** Where the answer left the prediction. It is more likely to come back behind this place than before. */
  #leftAt = 0;
  #last: number | undefined;
  #length = DRAFT_TOKENS_FIRST;
  /** Tokens of the step's draft, and how many of them the answer has so far. */
  #drafted = 0;
  #right = 0;
  #accepted = 0;
  #computed = 0;

  constructor(tokenIds: Int32Array) {
    this.#tokenIds = tokenIds;
  }

  /** Predicted tokens that the answer has, and those that were computed in vain. */
  get tokens(): PredictedTokens {
    return { accepted: this.#accepted, rejected: this.#computed - this.#accepted };
  }

  /** The tokens that are expected next, at most `max`. */
  draft(max: number): Int32Array {
    if (this.#at === undefined || max <= 0) return new Int32Array();
    return this.#tokenIds.subarray(this.#at, this.#at + Math.min(this.#length, max));
  }

  /** Call it when a step has computed a draft, before the answer's tokens that it gave. */
  computed(draftTokens: number): void {
    this.#drafted = draftTokens;
    this.#right = 0;
    this.#computed += draftTokens;
  }

  /** Call it for each token of the answer. */
  follow(tokenId: number): void {
    const isExpected = this.#at !== undefined && this.#tokenIds[this.#at] === tokenId;
    if (this.#right < this.#drafted) this.#judge(isExpected);
    if (isExpected) this.#at!++;
    else this.#search(tokenId);
    this.#last = tokenId;
  }

  /** A draft that is right throughout makes the next one longer. Behind any other, the next is as long as its right part. */
  #judge(isRight: boolean): void {
    if (!isRight) {
      this.#length = Math.max(DRAFT_TOKENS_MIN, this.#right);
      this.#drafted = 0;
      return;
    }
    this.#accepted++;
    this.#right++;
    if (this.#right === this.#drafted) this.#length = Math.min(DRAFT_TOKENS_MAX, 2 * this.#length);
  }

  /** Finds the answer's last two tokens: first from where the answer left the prediction, then from its beginning. */
  #search(tokenId: number): void {
    this.#leftAt = this.#at ?? this.#leftAt;
    const ids = this.#tokenIds;
    const find = (from: number, to: number): number | undefined => {
      for (let at = Math.max(1, from); at < to; at++)
        if (ids[at] === tokenId && ids[at - 1] === this.#last) return at + 1;
      return undefined;
    };
    this.#at = find(this.#leftAt, ids.length) ?? find(0, this.#leftAt);
  }
}
