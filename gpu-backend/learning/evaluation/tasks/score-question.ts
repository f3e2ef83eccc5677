/**
 * Log-likelihoods of choices as in lm-evaluation-harness: Σ log p of a continuation's tokens after its context, without
 * special tokens; spaces at the end of a context belong to the continuation. The common prefix of a question's
 * sequences is computed once.
 */
import type { Mask } from '../../../../shared/mask/mask.ts';
import type { SequenceCache } from '../../../engine/kv-cache.ts';
import type { Runner } from '../../../engine/runner-interface.ts';
import { sumOf } from '../../../measure.ts';
import type { Tokenizer } from '../../../model/tokenizer/tokenizer.ts';
import { commonLength } from '../../data/samples.ts';
import type { ScoreSession } from '../../search/score-masks.ts';
import type { Question } from './read-task.ts';

/** Tokens of a choice: the first `contextTokens` are the context, the others are scored. */
type TokenChoice = { readonly tokenIds: Int32Array; readonly contextTokens: number };

/**
 * The harness's `_encode_pair`: the continuation's tokens are those of the whole text after as many tokens as the
 * context alone has.
 * @param contextMax sequences are cut at their start to `contextMax` + 1 tokens.
 * @throws RangeError when a continuation alone is longer, or context or continuation have no token of their own.
 */
export function encodeChoices(
  { choices }: Question,
  tokenizer: Pick<Tokenizer, 'encode'>,
  contextMax: number,
): TokenChoice[] {
  const encode = (text: string) => tokenizer.encode(text, { addSpecial: false });
  return choices.map(({ context, continuation }) => {
    const bare = context.trimEnd();
    const given = encode(bare);
    const scored = encode(context + continuation).slice(given.length);
    const cut = Math.max(0, given.length + scored.length - (contextMax + 1));
    if (given.length === 0) throw new RangeError('a choice continues nothing');
    if (scored.length === 0) throw new RangeError('a choice adds no token to what it continues');
    if (cut >= given.length) throw new RangeError(`a choice has more than ${contextMax} tokens`);
    return { tokenIds: Int32Array.from([...given.slice(cut), ...scored]), contextTokens: given.length - cut };
  });
}

/** Σ log p of each choice. */
export async function scoreChoices(
  { runner, session, cache }: { runner: Runner; session: ScoreSession; cache: SequenceCache },
  choices: readonly TokenChoice[],
  mask: Mask,
): Promise<number[]> {
  const plan = { mask, kv: 'preserve' } as const;
  const found: number[] = [];
  let held = new Int32Array(0);
  for (const { tokenIds, contextTokens } of choices) {
    const input = tokenIds.subarray(0, -1);
    // The last given token predicts the first scored one, so it runs again.
    const kept = Math.min(commonLength(held, input), contextTokens - 1);
    cache.truncate(kept);
    const first = contextTokens - 1 - kept;
    const logitRows = Array.from({ length: tokenIds.length - contextTokens }, (_, i) => first + i);
    const logits = await runner.run({ cache, tokenIds: input.subarray(kept), plan, logitRows });
    const { losses } = await session.losses(logits, tokenIds.subarray(contextTokens));
    found.push(-sumOf(losses));
    held = Int32Array.from(input);
  }
  cache.truncate(0);
  return found;
}

/** Index of the highest value; the first of several equal ones. */
export const highest = (values: readonly number[]): number =>
  values.reduce((best, value, index) => (value > values[best]! ? index : best), 0);

/**
 * Whether the most likely choice is right, 1 or 0: by the sum of log-probabilities, and by the sum divided by
 * characters.
 */
export function judge({ gold, lengths }: Question, logLikelihoods: readonly number[]) {
  return {
    acc: Number(highest(logLikelihoods) === gold),
    accNorm: Number(highest(logLikelihoods.map((value, i) => value / lengths[i]!)) === gold),
  };
}
