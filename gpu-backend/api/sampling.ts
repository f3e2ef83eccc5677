/** From a request's fields to what the engine samples with. Defaults are OpenAI's. */
import { MaskrouteError } from '../../shared/errors.ts';
import type { ChatRequest, CompletionRequest } from '../../shared/openai.ts';
import type { Sampling } from '../serving/engine.ts';

type SamplingFields = Pick<
  ChatRequest & CompletionRequest,
  | 'temperature'
  | 'top_p'
  | 'top_k'
  | 'min_p'
  | 'presence_penalty'
  | 'frequency_penalty'
  | 'repetition_penalty'
  | 'logit_bias'
  | 'seed'
>;

/** @throws MaskrouteError `invalid_request` when `logit_bias` names a token that the model does not have. */
export function samplingOf(request: SamplingFields, vocabularySize: number): Sampling {
  const logitBias = Object.entries(request.logit_bias ?? {}).map(([id, bias]) => [Number(id), bias] as const);
  const unknown = logitBias.find(([id]) => id >= vocabularySize);
  if (unknown !== undefined) throw unknownToken('logit_bias', unknown[0], vocabularySize);
  return {
    temperature: request.temperature ?? 1,
    topP: request.top_p ?? 1,
    topK: Math.max(0, request.top_k ?? 0),
    minP: request.min_p ?? 0,
    presencePenalty: request.presence_penalty ?? 0,
    frequencyPenalty: request.frequency_penalty ?? 0,
    repetitionPenalty: request.repetition_penalty ?? 1,
    logitBias,
    seed: request.seed ?? undefined,
  };
}

/** Choices of one prompt differ: each adds its number to the request's seed. */
export const withChoiceSeed = (sampling: Sampling, choice: number): Sampling =>
  sampling.seed === undefined ? sampling : { ...sampling, seed: sampling.seed + choice };

export const unknownToken = (param: string, tokenId: number, vocabularySize: number): MaskrouteError =>
  new MaskrouteError(
    'invalid_request',
    `${param}: token ${tokenId} is outside the vocabulary of ${vocabularySize} tokens.`,
    { param },
  );
