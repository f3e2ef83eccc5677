/**
 * A request's trace, from the client to the edge and on to a backend: the collector, the propagated headers, and the
 * spans' attributes.
 */
import {
  type Attributes,
  type Context,
  defaultTextMapSetter,
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

/* Whether to trace, and where to send traces: OpenTelemetry's standard environment variables. */

export type Collector = {
  /** `OTEL_EXPORTER_OTLP_ENDPOINT` with the path for traces. */
  readonly url: string;
  readonly headers: Record<string, string>;
  /** Sampling ratio of requests without a `traceparent`, 0 to 1; others follow its sampling decision. */
  readonly share: number;
};

/** A variable that is set to the empty string counts as absent. */
export const variablesSet = (environment: object): Record<string, unknown> =>
  Object.fromEntries(Object.entries(environment).filter(([, value]) => value !== ''));

/** Without an endpoint nothing is traced. */
export const collectorVariables = {
  OTEL_EXPORTER_OTLP_ENDPOINT: z.url({ protocol: /^https?$/ }).optional(),
  /** `name=value,name=value`, percent-encoded; usually an API key. */
  OTEL_EXPORTER_OTLP_HEADERS: z.string().optional(),
  OTEL_TRACES_SAMPLER_ARG: z.coerce.number().min(0).max(1).default(1),
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

/** A collector as environment variables, the inverse of {@link collectorFrom}. */
export const variablesOf = ({ url, headers, share }: Collector): Record<string, string> => ({
  OTEL_EXPORTER_OTLP_ENDPOINT: url.slice(0, -TRACES_PATH.length),
  OTEL_EXPORTER_OTLP_HEADERS: Object.entries(headers)
    .map((pair) => pair.map(encodeURIComponent).join('='))
    .join(','),
  OTEL_TRACES_SAMPLER_ARG: String(share),
});

/** The collector of a process's environment; undefined: tracing is off. @throws MaskrouteError `invalid_argument`. */
export function collectorFrom(environment: Record<string, string | undefined>): Collector | undefined {
  const parsed = collectorSchema.safeParse(variablesSet(environment));
  if (parsed.success) return collectorOf(parsed.data);
  const { path, message } = parsed.error.issues[0]!;
  throw new MaskrouteError('invalid_argument', `${String(path[0])}: ${message}.`);
}

/* Propagation: the W3C Trace Context headers. */

export type ReadHeader = (name: string) => string | null | undefined;

const propagator = new W3CTraceContextPropagator();

/** The trace that a request is part of; the empty context when its header is absent or malformed. */
export const traceOf = (header: ReadHeader): Context =>
  propagator.extract(ROOT_CONTEXT, header, {
    keys: () => [],
    get: (read, name) => read(name) ?? undefined,
  }) as Context;

/** Headers for requests that are made as part of a trace. */
export function traceHeaders(context: Context): Record<string, string> {
  const headers: Record<string, string> = {};
  propagator.inject(context, headers, defaultTextMapSetter);
  return headers;
}

/** The length that W3C requires everybody to propagate. */
const TRACE_STATE_CHARS_MAX = 512;

/** A client's trace headers, unchanged, for passing on where the edge itself does not trace; none if malformed. */
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
 * Span attributes: a request by OpenTelemetry's conventions for generative AI, and its mask under names of our own.
 * They never contain prompts, answers or stop strings.
 */

/** Leaves out attributes that are not known. */
const known = (attributes: Record<string, Attributes[string] | null>): Attributes =>
  Object.fromEntries(Object.entries(attributes).filter(([, value]) => value != null)) as Attributes;

type Operation = 'chat' | 'text_completion';

export const operationOf = (kind: string): Operation =>
  kind.startsWith('completion') ? 'text_completion' : 'chat';

/** A span's name by the conventions. */
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
    // An attribute is a signed integer of 64 bits; a seed may be larger.
    'gen_ai.request.seed': Number.isSafeInteger(body.seed) ? body.seed : undefined,
    'gen_ai.request.choice.count': body.n === 1 ? undefined : body.n,
    'gen_ai.request.stream': body.stream === true,
    'gen_ai.response.model': splitModelName(body.model).model,
  });
}

/** Facts about an answer; null and undefined: not known. */
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
 * Records how a request ended: its status, and the code of an error, including an error late in a stream of status 200.
 * Errors that the client caused, including a hang-up, do not set the span's status to error.
 */
export function setOutcome(span: Span, status: number, code: string | null): void {
  span.setAttribute('http.response.status_code', status);
  if (code === null) return;
  span.setAttribute('error.type', code);
  const statusOfCode = isErrorCode(code) ? ERROR_CODES[code][0] : 500;
  if (status >= 500 || statusOfCode >= 500) span.setStatus({ code: SpanStatusCode.ERROR, message: code });
}
