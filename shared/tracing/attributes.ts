/**
 * What spans say of a request, by OpenTelemetry's conventions for generative AI, and of its mask in names of our own.
 * Never what was asked or answered: no prompt, no text, no stop string.
 */
import { type Attributes, type Span, SpanStatusCode } from '@opentelemetry/api';
import { ERROR_CODES } from '../wire/errors.ts';
import type { ChatRequest, CompletionRequest } from '../wire/openai.ts';
import { type RouteEcho, splitModelName } from '../wire/protocol.ts';

/** Those that are known. */
const known = (attributes: Record<string, Attributes[string] | null>): Attributes =>
  Object.fromEntries(Object.entries(attributes).filter(([, value]) => value != null)) as Attributes;

export type Operation = 'chat' | 'text_completion';

export const operationOf = (kind: string): Operation =>
  kind.startsWith('completion') ? 'text_completion' : 'chat';

/** As the conventions name a span. */
export const spanName = (operation: Operation, model: string): string => `${operation} ${model}`;

/** What the client asks for. */
export function requestAttributes(operation: Operation, body: ChatRequest | CompletionRequest): Attributes {
  const max_tokens =
    'max_completion_tokens' in body ? (body.max_completion_tokens ?? body.max_tokens) : body.max_tokens;
  return known({
    'gen_ai.operation.name': operation,
    'gen_ai.provider.name': 'maskroute',
    'gen_ai.request.model': body.model,
    'gen_ai.request.max_tokens': max_tokens,
    'gen_ai.request.temperature': body.temperature,
    'gen_ai.request.top_p': body.top_p,
    'gen_ai.request.top_k': body.top_k,
    'gen_ai.request.frequency_penalty': body.frequency_penalty,
    'gen_ai.request.presence_penalty': body.presence_penalty,
    'gen_ai.request.seed': body.seed,
    'gen_ai.request.choice.count': body.n === 1 ? undefined : body.n,
    'gen_ai.request.stream': body.stream === true,
    'gen_ai.response.model': splitModelName(body.model).model,
  });
}

/** What an answer was and cost; null and undefined are not known. */
export type AnswerFacts = {
  readonly id?: string | undefined;
  readonly input_tokens?: number | undefined;
  readonly output_tokens?: number | undefined;
  readonly cached_tokens?: number | undefined;
  readonly finishReasons?: readonly string[] | undefined;
  readonly first_ms?: number | null | undefined;
};

export const answerAttributes = (facts: AnswerFacts): Attributes =>
  known({
    'gen_ai.response.id': facts.id,
    'gen_ai.usage.input_tokens': facts.input_tokens,
    'gen_ai.usage.output_tokens': facts.output_tokens,
    'gen_ai.usage.cache_read.input_tokens': facts.cached_tokens,
    'gen_ai.response.finish_reasons': facts.finishReasons?.length ? [...facts.finishReasons] : undefined,
    'gen_ai.response.time_to_first_chunk': facts.first_ms == null ? undefined : facts.first_ms / 1000,
  });

/** The routing decision. */
export const decisionAttributes = (
  route: Omit<RouteEcho, 'completion'>,
  mask: string,
  sparsity: number | null,
): Attributes =>
  known({
    'maskroute.mask_set': route.mask_set,
    'maskroute.version': route.version,
    'maskroute.cluster': route.cluster,
    'maskroute.similarity': route.similarity,
    'maskroute.mask': mask,
    'maskroute.sparsity': sparsity,
    'maskroute.experiment': route.experiment,
    'maskroute.variant': route.variant,
    'maskroute.region': route.region,
    'maskroute.fallback': route.fallback,
  });

/**
 * How a request ended: its status, and the code of an error, also of an error that came late in a stream of status 200.
 * What is the client's own doing, its leaving among it, is no error of the server's.
 */
export function setOutcome(span: Span, status: number, code: string | null): void {
  span.setAttribute('http.response.status_code', status);
  if (code === null) return;
  span.setAttribute('error.type', code);
  const [ofCode] = ERROR_CODES[code as keyof typeof ERROR_CODES] ?? [500];
  if (status >= 500 || ofCode >= 500) span.setStatus({ code: SpanStatusCode.ERROR, message: code });
}
