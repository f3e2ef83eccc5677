/**
 * One row of logits → one token. The order is vLLM's: penalties and bias, then what a grammar allows, min_tokens,
 * temperature, top_k, top_p and min_p, then a draw. Log-probabilities are those of the model itself, before any of it.
 *
 * V = vocabulary. Greedy costs one pass over V; a draw costs two, and a sort of the candidates only with
 * top_k or top_p.
 */
import { argmax, logSumExp } from '../logits.ts';
import type { Sampling, TokenLogprob } from './engine.ts';
import type { SequenceGrammar } from './grammar.ts';

/** Tokens less likely than e^-30 of the best one are never drawn: together they hold under 5e-9 at V = 49152. */
const LOG_RATIO_MIN = -30;
/** Beyond any model's, and far enough from infinity: a tiny repetition_penalty would divide to it. */
const LOGIT_MAX = 1e30;

export type SamplerState = {
  /** How often each token was generated so far. */
  readonly generated: ReadonlyMap<number, number>;
  /** Tokens of the prompt: repetition_penalty counts them too. */
  readonly prompt: ReadonlySet<number>;
  /** Forbidden now: stop ids while min_tokens is not reached. */
  readonly forbidden: readonly number[];
  /** What the answer must look like, if anything; stop ids come where it may end. */
  readonly grammar?: SequenceGrammar | undefined;
  readonly stopTokenIds?: readonly number[];
  readonly random: () => number;
};

/** `logits` `[V]` is changed in place. */
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

type Candidates = { ids: Int32Array; weights: Float64Array; count: number };

function draw(logits: Float32Array, sampling: Sampling, random: () => number): number {
  const candidates = likely(logits, sampling.temperature);
  const needsOrder = sampling.topP < 1 || (sampling.topK > 0 && sampling.topK < candidates.count);
  const kept = cut(needsOrder ? sorted(candidates) : candidates, sampling, needsOrder);
  let total = 0;
  for (let i = 0; i < kept.count; i++) total += kept.weights[i]!;
  let left = random() * total;
  for (let i = 0; i < kept.count; i++) {
    left -= kept.weights[i]!;
    if (left < 0) return kept.ids[i]!;
  }
  return kept.ids[kept.count - 1]!;
}

/** Tokens that can be drawn at all, with weights e^((logit - best) / temperature). */
function likely(logits: Float32Array, temperature: number): Candidates {
  const best = logits[argmax(logits)]!;
  const floor = best + LOG_RATIO_MIN * temperature;
  const ids = new Int32Array(logits.length);
  const weights = new Float64Array(logits.length);
  let count = 0;
  for (let i = 0; i < logits.length; i++) {
    if (logits[i]! < floor) continue;
    ids[count] = i;
    weights[count++] = Math.exp((logits[i]! - best) / temperature);
  }
  return { ids, weights, count };
}

function sorted({ ids, weights, count }: Candidates): Candidates {
  const order = Array.from({ length: count }, (_, i) => i).sort((a, b) => weights[b]! - weights[a]! || a - b);
  return {
    ids: Int32Array.from(order, (i) => ids[i]!),
    weights: Float64Array.from(order, (i) => weights[i]!),
    count,
  };
}

/** top_k, then top_p over what is left, then min_p; the best token always stays. */
function cut(candidates: Candidates, sampling: Sampling, ordered: boolean): Candidates {
  let { count } = candidates;
  if (ordered && sampling.topK > 0) count = Math.min(count, sampling.topK);
  if (ordered && sampling.topP < 1) {
    let total = 0;
    for (let i = 0; i < count; i++) total += candidates.weights[i]!;
    let sum = 0;
    for (let i = 0; i < count; i++) {
      sum += candidates.weights[i]!;
      if (sum >= sampling.topP * total) count = i + 1;
    }
  }
  return sampling.minP > 0 ? overMinP({ ...candidates, count }, sampling.minP) : { ...candidates, count };
}

/** The best token's weight is 1, so min_p is a threshold on the weight itself. */
function overMinP({ ids, weights, count }: Candidates, minP: number): Candidates {
  let kept = 0;
  for (let i = 0; i < count; i++) {
    if (weights[i]! < minP) continue;
    ids[kept] = ids[i]!;
    weights[kept++] = weights[i]!;
  }
  return { ids, weights, count: kept };
}

/** The model's own log-probability of `tokenId` and of the `topCount` likeliest tokens. Read before `sample`. */
export function tokenLogprob(logits: Float32Array, tokenId: number, topCount: number): TokenLogprob {
  const total = logSumExp(logits);
  const top = topIds(logits, topCount).map((id) => ({ tokenId: id, logprob: logits[id]! - total }));
  return { tokenId, logprob: logits[tokenId]! - total, top };
}

/** Ids of the `count` largest values, largest first: one pass with a short sorted list. */
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
