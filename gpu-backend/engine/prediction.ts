/**
 * Speculative decoding from a text that the answer probably repeats in large part: OpenAI's `prediction`, or with prompt lookup
 * the request's own prompt and answer. A step computes the tokens that come next in that text (the draft) together with the
 * answer's own last token. Each row's token is sampled as always, and the rows behind the first token that differs from the draft
 * are thrown away. So the model decides every token, and a good prediction makes the answer come sooner.
 *
 * The limit: a step of a few rows reads the weights once, as a step of one row does, and takes longer by the products of each
 * row (`step-cost.ts`).
 */
import type { PredictedTokens } from './engine.ts';

/** Longer drafts save little more, and cost more where the answer leaves the prediction. */
export const DRAFT_TOKENS_MAX = 15;
const DRAFT_TOKENS_FIRST = 4;
const DRAFT_TOKENS_MIN = 2;

/** The answer goes on in the text where its last so many tokens are. Fewer would often be there by chance. */
const MATCHED_TOKENS = { client: 2, prompt: 3 };

export class Prediction {
  readonly #by: PredictedTokens['by'];
  /** The text; of a prompt, with the answer's tokens behind it. */
  readonly #tokenIds: Int32Array;
  #count: number;
  /** The place in the text that the answer has reached; undefined after a token that differs. */
  #at: number | undefined;
  /** Where the answer left the text. It is more likely to come back behind this place than before. */
  #leftAt = 0;
  /** The last tokens, at most as many as are matched. */
  readonly #last: number[];
  #length = DRAFT_TOKENS_FIRST;
  /** Tokens of the step's draft, and how many of them the answer has so far. */
  #drafted = 0;
  #right = 0;
  #accepted = 0;
  #computed = 0;

  private constructor(by: PredictedTokens['by'], tokenIds: Int32Array, count: number) {
    this.#by = by;
    this.#tokenIds = tokenIds;
    this.#count = count;
    this.#at = by === 'client' ? 0 : undefined;
    this.#last = by === 'client' ? [] : Array.from(tokenIds.subarray(0, count).slice(-MATCHED_TOKENS.prompt));
  }

  static byClient(tokenIds: Int32Array): Prediction {
    return new Prediction('client', tokenIds, tokenIds.length);
  }

  /** Prompt lookup, for an answer of at most `generatedMax` tokens. */
  static fromPrompt(promptTokenIds: Int32Array, generatedMax: number): Prediction {
    const tokenIds = new Int32Array(promptTokenIds.length + generatedMax);
    tokenIds.set(promptTokenIds);
    return new Prediction('prompt', tokenIds, promptTokenIds.length);
  }

  /** Predicted tokens that the answer has, and those that were computed in vain. */
  get tokens(): PredictedTokens {
    return { by: this.#by, accepted: this.#accepted, rejected: this.#computed - this.#accepted };
  }

  /** The tokens that are expected next, at most `max`. */
  draft(max: number): Int32Array {
    if (this.#at === undefined || max <= 0) return new Int32Array();
    return this.#tokenIds.subarray(this.#at, Math.min(this.#at + Math.min(this.#length, max), this.#count));
  }

  /** Call it when a step has computed a draft, before the answer's tokens that it gave. */
  computed(draftTokens: number): void {
    this.#drafted = draftTokens;
    this.#right = 0;
    this.#computed += draftTokens;
  }

  /** Call it for each token of the answer. */
  follow(tokenId: number): void {
    const isExpected =
      this.#at !== undefined && this.#at < this.#count && this.#tokenIds[this.#at] === tokenId;
    if (this.#right < this.#drafted) this.#judge(isExpected);
    if (this.#by === 'prompt') this.#tokenIds[this.#count++] = tokenId;
    this.#last.push(tokenId);
    if (this.#last.length > MATCHED_TOKENS[this.#by]) this.#last.shift();
    if (isExpected) this.#at!++;
    else this.#search();
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

  /** Finds the answer's last tokens: first from where the answer left the text, then from its beginning. */
  #search(): void {
    this.#leftAt = this.#at ?? this.#leftAt;
    const ids = this.#tokenIds;
    const last = this.#last;
    this.#at = undefined;
    if (last.length < MATCHED_TOKENS[this.#by]) return;
    const find = (from: number, to: number): number | undefined => {
      const text = ids.subarray(0, Math.max(0, to - 1));
      // `indexOf` reads a long prompt several times as fast as a loop.
      const next = (at: number) => text.indexOf(last.at(-1)!, at) + 1;
      for (let at = next(Math.max(last.length, from) - 1); at > 0; at = next(at))
        if (last.every((id, i) => text[at - last.length + i] === id)) return at;
      return undefined;
    };
    // Behind the last place nothing is known: there are the answer's last tokens themselves, if it is part of the text.
    this.#at = find(this.#leftAt, this.#count) ?? find(0, this.#leftAt);
  }
}
