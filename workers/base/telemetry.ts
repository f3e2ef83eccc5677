/**
 * Telemetry of the edge: log lines and trace spans.
 *
 * A log line is one JSON object, for Workers Logs and `wrangler tail`. It never contains keys or prompts.
 */
import { type Attributes, type Context, type Span, SpanKind, SpanStatusCode } from '@opentelemetry/api';
import { ProtobufTraceSerializer } from '@opentelemetry/otlp-transformer';
import type { ReadableSpan, SpanProcessor } from '@opentelemetry/sdk-trace';
import { createTracer } from '../../shared/tracing/tracer.ts';
import {
  type Collector,
  contextWith,
  passedTrace,
  type ReadHeader,
  setOutcome,
  traceHeaders,
  traceOf,
} from '../../shared/tracing/traces.ts';
import { TRACES } from '../limits.ts';
import { sleep, steadyNow_ms, UnderWay } from './waiting.ts';

export function log(
  level: 'info' | 'warn' | 'error',
  event: string,
  fields: Record<string, string | number | boolean | null | undefined> = {},
): void {
  console[level](JSON.stringify({ level, event, ...fields }));
}

/**
 * The innermost cause's message: database layers wrap it with the statement and its parameters, which must not be
 * logged.
 */
export function reasonOf(error: unknown): string {
  let cause = error;
  while (cause instanceof Error && cause.cause !== undefined) cause = cause.cause;
  return String(cause);
}

/*
 * Spans of the edge: one for each request, with child spans for the steps of its decision and for each attempt at a
 * backend. They are sent in batches after the answers, and lost if the collector is unreachable.
 *
 * Without a collector there are no spans; a client's trace headers are passed on to the backend unchanged.
 */

export interface Traces {
  /** Starts a request's span. */
  begin(header: ReadHeader, route: string, requestId: string): RequestTrace;
}

/** The trace of one request. Times are ms since the epoch. */
export interface RequestTrace {
  /** Whether the trace is sampled. */
  readonly isRecorded: boolean;
  /** Adds a finished child span. */
  part(name: string, from_ms: number, to_ms: number, attributes?: Attributes): void;
  /** Starts a child span for an attempt at a backend. */
  attempt(backend: { readonly id: string; readonly url: string }, nth: number): AttemptTrace;
  /**
   * Ends the request's span; call it once. The promise, for `waitUntil`, settles when this request need not stay alive
   * for its spans; it never rejects.
   */
  end(ended: Ended): Promise<void>;
}

interface AttemptTrace {
  /** Propagation headers for the backend. */
  readonly headers: Record<string, string>;
  /** `status` null: it gave no answer. */
  end(outcome: string, status: number | null): void;
}

export type Ended = {
  /** Undefined: the operation is not known yet. */
  readonly name: string | undefined;
  readonly status: number;
  readonly code: string | null;
  readonly attributes: Attributes;
  readonly at_ms: number;
};

export function createTraces(collector: Collector | undefined): Traces {
  if (collector === undefined) return UNTRACED;
  const spans = new SpanPost(collector);
  const { tracer } = createTracer('maskroute-edge', undefined, collector.share, spans);
  return {
    begin(header, route, requestId) {
      const parent = traceOf(header);
      const attributes = {
        'http.request.method': 'POST',
        'http.route': route,
        'maskroute.request_id': requestId,
      };
      const options = { kind: SpanKind.SERVER, startTime: Date.now(), attributes };
      const span = tracer.startSpan(`POST ${route}`, options, parent);
      return recorded(tracer, span, contextWith(parent, span), () => spans.send());
    },
  };
}

const NONE: AttemptTrace = { headers: {}, end() {} };
const notRecorded = (attempt: AttemptTrace): RequestTrace => ({
  isRecorded: false,
  part() {},
  attempt: () => attempt,
  end: () => Promise.resolve(),
});
const UNSEEN = notRecorded(NONE);
const UNTRACED: Traces = {
  begin(header) {
    const headers = passedTrace(header);
    return 'traceparent' in headers ? notRecorded({ headers, end() {} }) : UNSEEN;
  },
};

/** By OpenTelemetry's HTTP conventions, a 4xx answer is an error for a client span. */
const isFailed = (outcome: string, status: number | null): boolean =>
  outcome !== 'cancelled' && (status === null || status >= 400);

function recorded(
  tracer: ReturnType<typeof createTracer>['tracer'],
  span: Span,
  context: Context,
  send: () => Promise<void>,
): RequestTrace {
  // An unsampled trace is propagated, too.
  if (!span.isRecording()) return notRecorded({ headers: traceHeaders(context), end() {} });
  return {
    isRecorded: true,
    part(name, from_ms, to_ms, attributes = {}) {
      tracer.startSpan(name, { startTime: from_ms, attributes }, context).end(to_ms);
    },
    attempt({ id, url }, nth) {
      const { hostname, port, protocol } = new URL(url);
      const attributes: Attributes = {
        'http.request.method': 'POST',
        'server.address': hostname,
        'server.port': Number(port) || (protocol === 'https:' ? 443 : 80),
        'maskroute.backend': id,
        ...(nth > 1 ? { 'http.request.resend_count': nth - 1 } : {}),
      };
      const options = { kind: SpanKind.CLIENT, startTime: Date.now(), attributes };
      const asked = tracer.startSpan('backend', options, context);
      return {
        headers: traceHeaders(contextWith(context, asked)),
        end(outcome, status) {
          asked.setAttribute('maskroute.outcome', outcome);
          if (status !== null) asked.setAttribute('http.response.status_code', status);
          if (isFailed(outcome, status)) {
            asked.setAttribute('error.type', status === null ? outcome : String(status));
            asked.setStatus({ code: SpanStatusCode.ERROR });
          }
          asked.end(Date.now());
        },
      };
    },
    end({ name, status, code, attributes, at_ms }) {
      if (name !== undefined) span.updateName(name);
      span.setAttributes(attributes);
      setOutcome(span, status, code);
      span.end(at_ms);
      return send();
    },
  };
}

/** Sends spans to the collector, in batches. */
class SpanPost implements SpanProcessor {
  readonly #collector: Collector;
  #spans: ReadableSpan[] = [];
  /** When the request started that sends the batch; the runtime may have torn it down since. */
  #begun_ms = 0;
  readonly #posts = new UnderWay();
  /** Whether the collector is known to be unreachable; it is logged once. */
  #isAway = false;

  constructor(collector: Collector) {
    this.#collector = collector;
  }

  onStart(): void {}

  onEnd(span: ReadableSpan): void {
    if (this.#spans.length < TRACES.spansMax) this.#spans.push(span);
    else this.#lost(1, 'too many spans wait');
  }

  async send(): Promise<void> {
    const now_ms = steadyNow_ms();
    if (now_ms - this.#begun_ms < TRACES.lost_ms) return;
    this.#begun_ms = now_ms;
    await sleep(TRACES.wait_ms);
    if (this.#begun_ms === now_ms) this.#begun_ms = 0;
    const spans = this.#spans;
    this.#spans = [];
    if (spans.length === 0) return;
    if (this.#posts.count() >= TRACES.postsMax) return this.#lost(spans.length, 'the collector is slow');
    const ended = this.#posts.begin(2 * TRACES.post_ms);
    await this.#post(spans)
      .catch((error) => this.#lost(spans.length, reasonOf(error)))
      .finally(ended);
  }

  async #post(spans: readonly ReadableSpan[]): Promise<void> {
    const { url, headers } = this.#collector;
    const response = await fetch(url, {
      method: 'POST',
      headers: { ...headers, 'content-type': 'application/x-protobuf' },
      body: ProtobufTraceSerializer.serializeRequest([...spans]) as Uint8Array<ArrayBuffer>,
      // The headers contain an API key, which must not follow a redirect.
      redirect: 'manual',
      signal: AbortSignal.timeout(TRACES.post_ms),
    });
    await response.body?.cancel();
    if (!response.ok) throw new Error(`the collector answered ${response.status}`);
    if (this.#isAway) log('info', 'traces_exported_again');
    this.#isAway = false;
  }

  #lost(spans: number, reason: string): void {
    if (!this.#isAway) log('warn', 'traces_lost', { spans, reason });
    this.#isAway = true;
  }

  async forceFlush(): Promise<void> {}
  async shutdown(): Promise<void> {}
}
