/**
 * Samples one token from one row of logits. The order is vLLM's: penalties and bias, grammar, min_tokens, temperature,
 * top_k, top_p, min_p, then a random draw. Log-probabilities are computed from the model's unchanged logits.
 *
 * V = vocabulary. Greedy sampling takes one pass over V (0.07 ms at V = 49152), random sampling two (0.4 ms); top_k, top_p
 * and min_p add two more passes and a sort of few tokens (0.7 to 1.2 ms).
 */
import { argmax, logSumExp } from '../logits.ts';
import type { Sampling, TokenLogprob } from './engine.ts';
import type { SequenceGrammar } from './grammar.ts';

/** Tokens less likely than e^-30 times the best one are never drawn; together they have under 5e-9 at V = 49152. */
const LOG_RATIO_MIN = -30;
/** Larger than any model's logits; dividing by a tiny repetition_penalty would otherwise give infinity. */
const LOGIT_MAX = 1e30;

export type SamplerState = {
  /** How often each token was generated so far. */
  readonly generated: ReadonlyMap<number, number>;
  /** Tokens of the prompt, to which repetition_penalty also applies. */
  readonly prompt: ReadonlySet<number>;
  /** Tokens not allowed now: stop tokens until min_tokens is reached. */
  readonly forbidden: readonly number[];
  /** Allows `stopTokenIds` only where the answer may end. */
  readonly grammar?: SequenceGrammar | undefined;
  readonly stopTokenIds?: readonly number[];
  readonly random: () => number;
};

/** Changes `logits` `[V]` in place. @returns the token's id. */
export function sample(logits: Float32Array, sampling: Sampling, state: SamplerState): number {
  adjust(logits, sampling, state);
  return sampling.temperature === 0 ? argmax(logits) : draw(logits, sampling, state.random);
}

function adjust(logits: Float32Array, sampling: Sampling, state: SamplerState): void {
  if (sampling.repetitionPenalty !== 1) {
    const seen = new Set([...state.prompt, ...state.generated.keys()]);
    for (const id of seen) {
      const logit = logits[id]!;
      logits[id] =
        logit > 0
          ? Math.min(LOGIT_MAX, logit / sampling.repetitionPenalty)
          : logit * sampling.repetitionPenalty;
    }
  }
  if (sampling.presencePenalty !== 0 || sampling.frequencyPenalty !== 0) {
    for (const [id, count] of state.generated) {
      logits[id]! -= sampling.presencePenalty + sampling.frequencyPenalty * count;
    }
  }
  for (const [id, bias] of sampling.logitBias) if (id < logits.length) logits[id]! += bias;
  state.grammar?.restrict(logits, state.stopTokenIds ?? []);
  for (const id of state.forbidden) if (id < logits.length) logits[id] = Number.NEGATIVE_INFINITY;
}

function draw(logits: Float32Array, sampling: Sampling, random: () => number): number {
  const { topK, topP, minP } = sampling;
  const weighed = weigh(logits, sampling.temperature);
  if (topK === 0 && topP === 1 && minP === 0) {
    let left = random() * weighed.total;
    for (let id = 0; id < logits.length; id++) {
      left -= weights[id]!;
      if (left < 0) return id;
    }
    return argmax(logits);
  }
  const kept = cut(leading(weighed, sampling), weighed.total, sampling);
  let left = random() * sumOf(kept);
  for (const id of kept) {
    left -= weights[id]!;
    if (left < 0) return id;
  }
  return kept.at(-1)!;
}

/* Buffers that all draws share, since allocating them for a vocabulary takes longer than a draw. */

/** The weight of each token. */
let weights = new Float64Array(0);

/** Table of e^-x, with a short series between its steps: an error of 3e-9 in less than half the time of `Math.exp`. */
const STEPS_A_UNIT = 64;
const exponentials = Float64Array.from({ length: -LOG_RATIO_MIN * STEPS_A_UNIT + 1 }, (_, step) =>
  Math.exp(-step / STEPS_A_UNIT),
);
const stepOf = (x: number): number => Math.min(exponentials.length - 1, (x * STEPS_A_UNIT) | 0);

function exponential(x: number): number {
  const step = stepOf(x);
  const rest = x - step / STEPS_A_UNIT;
  return exponentials[step]! * (1 - rest * (1 - rest * (0.5 - rest / 6)));
}

/** A row whose {@link weights} are computed. */
type Weighed = {
  readonly logits: Float32Array;
  readonly best: number;
  /** Tokens with lower logits have weight 0. */
  readonly floor: number;
  readonly total: number;
};

/** Computes each token's weight, e^((logit - best) / temperature); 0 if it would never be drawn. */
function weigh(logits: Float32Array, temperature: number): Weighed {
  const best = logits[argmax(logits)]!;
  const floor = best + LOG_RATIO_MIN * temperature;
  if (weights.length < logits.length) weights = new Float64Array(logits.length);
  let total = 0;
  for (let id = 0; id < logits.length; id++) {
    const logit = logits[id]!;
    const weight = logit < floor ? 0 : exponential((best - logit) / temperature);
    weights[id] = weight;
    total += weight;
  }
  return { logits, best, floor, total };
}

/* A histogram over the steps of the table: number of tokens and sum of their weights. It gives a cut-off without a sort. */
const stepCounts = new Int32Array(exponentials.length);
const stepTotals = new Float64Array(exponentials.length);

/** Candidates, likeliest first: all tokens that top_k, top_p and min_p may keep, and few others. */
function leading({ logits, best, floor, total }: Weighed, sampling: Sampling): number[] {
  const { temperature, topK, topP, minP } = sampling;
  stepCounts.fill(0);
  stepTotals.fill(0);
  for (let id = 0; id < logits.length; id++) {
    const logit = logits[id]!;
    if (logit < floor) continue;
    const step = stepOf((best - logit) / temperature);
    stepCounts[step]!++;
    stepTotals[step]! += weights[id]!;
  }
  const mostCount = topK > 0 ? topK : Number.POSITIVE_INFINITY;
  // The margin is for rounding: the sum in another order differs in its last bits. With top_k, top_p applies to what top_k
  // keeps.
  const mostTotal = topK > 0 ? Number.POSITIVE_INFINITY : topP * total * (1 + 1e-9);
  // min_p bounds the steps. Not with top_k, since top_p then needs the sum of all tokens that top_k keeps.
  const deepest = topK === 0 && minP > 0 ? stepOf(-Math.log(minP)) + 1 : stepCounts.length - 1;
  let [last, count, sum] = [0, stepCounts[0]!, stepTotals[0]!];
  while (last < Math.min(deepest, stepCounts.length - 1) && count < mostCount && sum < mostTotal) {
    last++;
    count += stepCounts[last]!;
    sum += stepTotals[last]!;
  }
  const ids: number[] = [];
  for (let id = 0; id < logits.length; id++) {
    const logit = logits[id]!;
    if (logit >= floor && stepOf((best - logit) / temperature) <= last) ids.push(id);
  }
  return ids.sort((a, b) => weights[b]! - weights[a]! || a - b);
}

/** Applies top_k, then top_p to the rest, then min_p; the best token always stays. `total`: weight of all tokens. */
function cut(ids: readonly number[], total: number, { topK, topP, minP }: Sampling): number[] {
  const few = topK > 0 ? ids.slice(0, topK) : [...ids];
  if (topP < 1) {
    const most = topP * (topK > 0 ? sumOf(few) : total);
    let sum = 0;
    const crossing = few.findIndex((id) => {
      sum += weights[id]!;
      return sum >= most;
    });
    if (crossing >= 0) few.length = crossing + 1;
  }
  // The best token's weight is 1, so min_p is a threshold on the weight itself.
  return few.filter((id, place) => place === 0 || weights[id]! >= minP);
}

const sumOf = (ids: readonly number[]): number => ids.reduce((sum, id) => sum + weights[id]!, 0);

/** Log-probabilities of `tokenId` and of the `topCount` likeliest tokens. Call it before `sample` changes the logits. */
export function tokenLogprob(logits: Float32Array, tokenId: number, topCount: number): TokenLogprob {
  const total = logSumExp(logits);
  const top = topIds(logits, topCount).map((id) => ({ tokenId: id, logprob: logits[id]! - total }));
  return { tokenId, logprob: logits[tokenId]! - total, top };
}

/** Ids of the `count` largest values, largest first; one pass with a short sorted list. */
function topIds(logits: Float32Array, count: number): number[] {
  const ids: number[] = [];
  if (count === 0) return ids;
  for (let id = 0; id < logits.length; id++) {
    if (ids.length === count && logits[id]! <= logits[ids[count - 1]!]!) continue;
    let at = ids.length;
    while (at > 0 && logits[ids[at - 1]!]! < logits[id]!) at--;
    ids.splice(at, 0, id);
    if (ids.length > count) ids.pop();
  }
  return ids;
}
