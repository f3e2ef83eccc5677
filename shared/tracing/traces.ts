/**
 * A request's trace, from the client to the edge and from there to a backend: who gets it, the headers by which it goes on,
 * and what its spans say.
 */
import {
  type Attributes,
  type Context,
  ROOT_CONTEXT,
  type Span,
  SpanStatusCode,
  trace,
} from '@opentelemetry/api';
import { parseKeyPairsIntoRecord, parseTraceParent, W3CTraceContextPropagator } from '@opentelemetry/core';
import { z } from 'zod';
import { ERROR_CODES, isErrorCode, MaskrouteError } from '../wire/errors.ts';
import type { ChatRequest, CompletionRequest } from '../wire/openai.ts';
import { type RouteEcho, splitModelName } from '../wire/protocol.ts';

/* Whether traces are made, and who gets them: what OpenTelemetry's own variables say. */

export type Collector = {
  /** Of `OTEL_EXPORTER_OTLP_ENDPOINT`, with the path of traces. */
  readonly url: string;
  readonly headers: Record<string, string>;
  /** Of the requests that come without a trace, 0 to 1. Whoever brings a trace has decided. */
  readonly share: number;
};

/** A variable that is set to nothing counts as absent. */
export const unlessEmpty = <T extends z.ZodType>(schema: T) =>
  z.preprocess((value) => (value === '' ? undefined : value), schema);

/** Without an endpoint nothing is traced. */
export const collectorVariables = {
  OTEL_EXPORTER_OTLP_ENDPOINT: unlessEmpty(z.url({ protocol: /^https?$/ }).optional()),
  /** `name=value,name=value`, percent-encoded: a key, usually. */
  OTEL_EXPORTER_OTLP_HEADERS: unlessEmpty(z.string().optional()),
  OTEL_TRACES_SAMPLER_ARG: unlessEmpty(z.coerce.number().min(0).max(1).default(1)),
} as const;
const collectorSchema = z.object(collectorVariables);

const TRACES_PATH = '/v1/traces';

export function collectorOf(variables: z.output<typeof collectorSchema>): Collector | undefined {
  const { OTEL_EXPORTER_OTLP_ENDPOINT: endpoint, OTEL_EXPORTER_OTLP_HEADERS: headers } = variables;
  if (endpoint === undefined) return undefined;
  return {
    url: `${endpoint.replace(/\/+$/, '')}${TRACES_PATH}`,
    headers: parseKeyPairsIntoRecord(headers),
    share: variables.OTEL_TRACES_SAMPLER_ARG,
  };
}

/** The variables that say so. */
export const variablesOf = ({ url, headers, share }: Collector): Record<string, string> => ({
  OTEL_EXPORTER_OTLP_ENDPOINT: url.slice(0, -TRACES_PATH.length),
  OTEL_EXPORTER_OTLP_HEADERS: Object.entries(headers)
    .map((pair) => pair.map(encodeURIComponent).join('='))
    .join(','),
  OTEL_TRACES_SAMPLER_ARG: String(share),
});

/** As a process's environment says; undefined: nobody gets any. @throws MaskrouteError `invalid_argument`. */
export function collectorFrom(environment: Record<string, string | undefined>): Collector | undefined {
  const parsed = collectorSchema.safeParse(environment);
  if (parsed.success) return collectorOf(parsed.data);
  const { path, message } = parsed.error.issues[0]!;
  throw new MaskrouteError('invalid_argument', `${String(path[0])}: ${message}.`);
}

/* The headers by which a trace comes in and goes on: W3C's. */

export type ReadHeader = (name: string) => string | null | undefined;

const propagator = new W3CTraceContextPropagator();

/** The trace that a request is part of; none when it names none, or not in W3C's words. */
export const traceOf = (header: ReadHeader): Context =>
  propagator.extract(ROOT_CONTEXT, header, {
    keys: () => [],
    get: (read, name) => read(name) ?? undefined,
  }) as Context;

/** For what is asked further in a trace. */
export function traceHeaders(context: Context): Record<string, string> {
  const headers: Record<string, string> = {};
  propagator.inject(context, headers, {
    set: (into, name, value) => {
      into[name] = value;
    },
  });
  return headers;
}

/** What W3C allows at the least. */
const TRACE_STATE_CHARS_MAX = 512;

/** The headers of a trace that somebody else keeps, as they came; none of a trace that is not in W3C's words. */
export function passedTrace(header: ReadHeader): Record<string, string> {
  const traceparent = header('traceparent');
  if (traceparent == null || parseTraceParent(traceparent) === null) return {};
  const tracestate = header('tracestate') ?? '';
  const isKept = tracestate !== '' && tracestate.length <= TRACE_STATE_CHARS_MAX;
  return { traceparent, ...(isKept ? { tracestate } : {}) };
}

export const contextWith = (parent: Context, span: Parameters<typeof trace.setSpan>[1]): Context =>
  trace.setSpan(parent, span);

/*
 * What spans say of a request, by OpenTelemetry's conventions for generative AI, and of its mask in names of our own.
 * Never what was asked or answered: no prompt, no text, no stop string.
 */

/** Those that are known. */
const known = (attributes: Record<string, Attributes[string] | null>): Attributes =>
  Object.fromEntries(Object.entries(attributes).filter(([, value]) => value != null)) as Attributes;

type Operation = 'chat' | 'text_completion';

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
type AnswerFacts = {
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
  const statusOfCode = isErrorCode(code) ? ERROR_CODES[code][0] : 500;
  if (status >= 500 || statusOfCode >= 500) span.setStatus({ code: SpanStatusCode.ERROR, message: code });
}
