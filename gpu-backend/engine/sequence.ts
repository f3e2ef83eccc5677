/** The engine's state of one request: its tokens, its cache, its timings. */
import { seededRandom } from '../random.ts';
import type { EngineEvent, GenerateRequest, TokenLogprob } from './engine.ts';
import { SequenceGrammar } from './grammar.ts';
import type { SequenceCache } from './kv-cache.ts';
import { Prediction } from './prediction.ts';
import type { SamplerState } from './sampler.ts';
import type { ScheduledRequest } from './scheduler.ts';

export type Sequence = {
  readonly request: GenerateRequest;
  readonly scheduled: ScheduledRequest;
  readonly tokenIds: number[];
  readonly generatedMax: number;
  /** How often each token was generated. */
  readonly generated: Map<number, number>;
  /** Distinct tokens of the prompt; empty unless the repetition penalty needs them. */
  readonly promptSet: ReadonlySet<number>;
  readonly promptLogprobs: (TokenLogprob | null)[];
  readonly random: () => number;
  /** The grammar's state; it follows the tokens, so a preemption does not change it. */
  readonly grammar: SequenceGrammar | undefined;
  readonly prediction: Prediction | undefined;
  /** Prompt tokens whose K and V came from the prefix cache. */
  cachedTokens: number;
  /** So many of its first tokens were offered to the prefix cache already. */
  keptTokens: number;
  /** Undefined while the request waits. */
  cache: SequenceCache | undefined;
  startedAt_ms: number | undefined;
  prefilledAt_ms: number | undefined;
  /** When its last step ended; undefined before the first. */
  steppedAt_ms: number | undefined;
  /** The longest time from the end of one of its steps to the start of the next. */
  stepGap_ms: number;
};

export function newSequence(
  request: GenerateRequest,
  contextTokens: number,
  promptLookup: boolean,
  now_ms: number,
): Sequence {
  const promptTokens = request.promptTokenIds.length;
  const generatedMax = Math.min(request.maxTokens, contextTokens - promptTokens);
  return {
    request,
    scheduled: {
      requestId: request.requestId,
      tenant: request.tenant,
      cacheTokens: promptTokens + generatedMax,
      arrivedAt_ms: now_ms,
      answerSince_ms: request.answerSince_ms ?? performance.timeOrigin + now_ms,
      promptCount: promptTokens,
      isScored: request.promptLogprobs !== undefined,
      tokenCount: promptTokens,
      computedCount: 0,
      draftCount: 0,
      preemptions: 0,
    },
    tokenIds: [...request.promptTokenIds],
    generatedMax,
    generated: new Map(),
    promptSet: request.sampling.repetitionPenalty === 1 ? new Set() : new Set(request.promptTokenIds),
    promptLogprobs: request.promptLogprobs === undefined ? [] : [null],
    random: seededRandom(request.sampling.seed ?? Math.floor(Math.random() * Number.MAX_SAFE_INTEGER)),
    grammar: request.grammar && new SequenceGrammar(request.grammar),
    prediction:
      request.predictedTokenIds !== undefined
        ? Prediction.byClient(request.predictedTokenIds)
        : promptLookup
          ? Prediction.fromPrompt(request.promptTokenIds, generatedMax)
          : undefined,
    cachedTokens: 0,
    keptTokens: 0,
    cache: undefined,
    startedAt_ms: undefined,
    prefilledAt_ms: undefined,
    steppedAt_ms: undefined,
    stepGap_ms: 0,
  };
}

export const promptTokens = (sequence: Sequence): number => sequence.request.promptTokenIds.length;
export const generatedTokens = (sequence: Sequence): number =>
  sequence.tokenIds.length - promptTokens(sequence);

/** The answer's next tokens, as predicted. Each step gives one more token, so there is room for that one, too. */
const draftOf = (sequence: Sequence): Int32Array =>
  sequence.prediction?.draft(sequence.generatedMax - generatedTokens(sequence) - 1) ?? NO_DRAFT;
const NO_DRAFT = new Int32Array();

/** The next `tokens` tokens to compute; those that the answer does not have yet are predicted. */
export function nextTokenIds(sequence: Sequence, tokens: number): number[] {
  const { computedCount } = sequence.scheduled;
  const known = sequence.tokenIds.slice(computedCount, computedCount + tokens);
  return known.length === tokens
    ? known
    : [...known, ...draftOf(sequence).subarray(0, tokens - known.length)];
}

/** Indices among the next `tokens` tokens whose logits are needed: to score the prompt, and to sample. */
export function logitRows(sequence: Sequence, tokens: number): number[] {
  const { request, scheduled } = sequence;
  const rows: number[] = [];
  // A prompt that is computed again after a preemption is scored already.
  const isToBeScored = request.promptLogprobs !== undefined && sequence.prefilledAt_ms === undefined;
  for (let row = 0; row < tokens; row++) {
    const next = scheduled.computedCount + row + 1;
    const scoresPrompt = isToBeScored && next < promptTokens(sequence);
    const samples = next >= sequence.tokenIds.length && sequence.generatedMax > 0;
    if (scoresPrompt || samples) rows.push(row);
  }
  return rows;
}

export function samplerState(sequence: Sequence): SamplerState {
  const { request, grammar } = sequence;
  // A complete answer ends even below min_tokens.
  const mustGoOn =
    generatedTokens(sequence) < request.minTokens && grammar?.isOver(request.stopTokenIds) !== true;
  return {
    generated: sequence.generated,
    prompt: sequence.promptSet,
    forbidden: mustGoOn ? request.stopTokenIds : [],
    grammar,
    stopTokenIds: request.stopTokenIds,
    random: sequence.random,
  };
}

export function appendToken(sequence: Sequence, tokenId: number): void {
  sequence.tokenIds.push(tokenId);
  sequence.scheduled.tokenCount++;
  sequence.generated.set(tokenId, (sequence.generated.get(tokenId) ?? 0) + 1);
  sequence.grammar?.accept(tokenId);
  sequence.prediction?.follow(tokenId);
  sequence.scheduled.draftCount = draftOf(sequence).length;
}

type Finished = Extract<EngineEvent, { type: 'finished' }>;

export function finishedEvent(sequence: Sequence, reason: Finished['reason'], now_ms: number): Finished {
  const { prediction } = sequence;
  const started_ms = sequence.startedAt_ms ?? now_ms;
  const prefilled_ms = sequence.prefilledAt_ms ?? now_ms;
  return {
    type: 'finished',
    reason,
    promptTokens: promptTokens(sequence),
    completionTokens: generatedTokens(sequence),
    cachedTokens: sequence.cachedTokens,
    ...(prediction && { predicted: prediction.tokens }),
    timings: {
      queue_ms: started_ms - sequence.scheduled.arrivedAt_ms,
      prefill_ms: prefilled_ms - started_ms,
      decode_ms: now_ms - prefilled_ms,
      stepGap_ms: sequence.stepGap_ms,
    },
  };
}
