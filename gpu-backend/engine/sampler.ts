/**
 * One row of logits → one token. The order is vLLM's: penalties and bias, then what a grammar allows, min_tokens,
 * temperature, top_k, top_p and min_p, then a draw. Log-probabilities are those of the model itself, before any of it.
 *
 * V = vocabulary. Greedy costs one pass over V; a draw costs two, and with top_k or top_p another one and a sort of few: 0.1, 0.7 and
 * 1 ms at V = 49152.
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

/** `ids` and `weights` may be longer. */
type Candidates = {
  readonly ids: Int32Array;
  readonly weights: Float64Array;
  readonly count: number;
  /** The sum of their weights. */
  readonly total: number;
};

function draw(logits: Float32Array, sampling: Sampling, random: () => number): number {
  const candidates = likely(logits, sampling);
  const kept = cut(candidates, sampling);
  let left = random() * kept.total;
  for (let i = 0; i < kept.count; i++) {
    left -= kept.weights[i]!;
    if (left < 0) return kept.ids[i]!;
  }
  return kept.ids[kept.count - 1]!;
}

/* Memory of the last draw: that of a vocabulary is large, and new memory takes longer than the draw. */
let ids = new Int32Array(0);
let weights = new Float64Array(0);

/** Candidates by likelihood, a step of a factor e^(1/8) each: enough to find where few of them end. */
const STEPS_A_UNIT = 8;
const stepCounts = new Int32Array(-LOG_RATIO_MIN * STEPS_A_UNIT + 1);
const stepTotals = new Float64Array(stepCounts.length);

/** How far below the best one, in e-folds. */
const depth = (best: number, logit: number, temperature: number): number => (best - logit) / temperature;
const stepOf = (depth: number): number => Math.min(stepCounts.length - 1, (depth * STEPS_A_UNIT) | 0);

/** Tokens that can be drawn at all, with weights e^((logit - best) / temperature); with top_k or top_p the likeliest first. */
function likely(logits: Float32Array, sampling: Sampling): Candidates {
  const { temperature, topK, topP } = sampling;
  const best = logits[argmax(logits)]!;
  const floor = best + LOG_RATIO_MIN * temperature;
  if (ids.length < logits.length) {
    ids = new Int32Array(logits.length);
    weights = new Float64Array(logits.length);
  }
  const needsOrder = topP < 1 || topK > 0;
  if (needsOrder) {
    stepCounts.fill(0);
    stepTotals.fill(0);
  }
  let [count, total] = [0, 0];
  for (let id = 0; id < logits.length; id++) {
    const logit = logits[id]!;
    if (logit < floor) continue;
    const below = depth(best, logit, temperature);
    const weight = Math.exp(-below);
    ids[count] = id;
    weights[count++] = weight;
    total += weight;
    if (!needsOrder) continue;
    const step = stepOf(below);
    stepCounts[step]!++;
    stepTotals[step]! += weight;
  }
  const all = { ids, weights, count, total };
  if (!needsOrder) return all;
  const last = lastStep(all, sampling);
  const leading: number[] = [];
  for (let i = 0; i < count; i++) {
    if (stepOf(depth(best, logits[ids[i]!]!, temperature)) <= last) leading.push(i);
  }
  return { ...sorted(all, leading), total };
}

/** The step where top_k or top_p is full, for certain. */
function lastStep({ count, total }: Candidates, { topK, topP }: Sampling): number {
  const mostCount = topK > 0 ? Math.min(topK, count) : Number.POSITIVE_INFINITY;
  // Sums in another order differ in their last bits. Within top_k top_p counts what is left.
  const mostTotal = topK > 0 ? Number.POSITIVE_INFINITY : topP * total * (1 + 1e-9);
  let [found, sum] = [0, 0];
  for (let step = 0; step < stepCounts.length; step++) {
    found += stepCounts[step]!;
    sum += stepTotals[step]!;
    if (found >= mostCount || sum >= mostTotal) return step;
  }
  return stepCounts.length - 1;
}

/** Those at `places`, largest weight first. */
function sorted({ ids, weights }: Candidates, places: number[]): Omit<Candidates, 'total'> {
  places.sort((a, b) => weights[b]! - weights[a]! || a - b);
  return {
    ids: Int32Array.from(places, (i) => ids[i]!),
    weights: Float64Array.from(places, (i) => weights[i]!),
    count: places.length,
  };
}

/** top_k, then top_p over what is left, then min_p; the best token always stays. */
function cut(candidates: Candidates, { topK, topP, minP }: Sampling): Candidates {
  let kept = candidates;
  if (topK > 0) kept = first(kept, Math.min(kept.count, topK));
  if (topP < 1) {
    let sum = 0;
    for (let i = 0; i < kept.count; i++) {
      sum += kept.weights[i]!;
      if (sum >= topP * kept.total) kept = first(kept, i + 1);
    }
  }
  return minP > 0 ? overMinP(kept, minP) : kept;
}

function first({ ids, weights }: Candidates, count: number): Candidates {
  let total = 0;
  for (let i = 0; i < count; i++) total += weights[i]!;
  return { ids, weights, count, total };
}

/** The best token's weight is 1, so min_p is a threshold on the weight itself. */
function overMinP({ ids, weights, count }: Candidates, minP: number): Candidates {
  let [kept, total] = [0, 0];
  for (let i = 0; i < count; i++) {
    const weight = weights[i]!;
    if (weight < minP) continue;
    ids[kept] = ids[i]!;
    weights[kept++] = weight;
    total += weight;
  }
  return { ids, weights, count: kept, total };
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
