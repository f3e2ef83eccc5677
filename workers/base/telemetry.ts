/**
 * What the edge says of itself: lines of a log, and spans of traces.
 *
 * A line is one JSON object, which Workers Logs and `wrangler tail` read. Never a key, never a prompt.
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
import { sleep, UnderWay } from './waiting.ts';

export function log(
  level: 'info' | 'warn' | 'error',
  event: string,
  fields: Record<string, string | number | boolean | null | undefined> = {},
): void {
  console[level](JSON.stringify({ level, event, ...fields }));
}

/** The innermost cause: database layers wrap it in the statement and its parameters, which are not for logs. */
export function reasonOf(error: unknown): string {
  let cause = error;
  while (cause instanceof Error && cause.cause !== undefined) cause = cause.cause;
  return String(cause);
}

/*
 * Spans of the edge: one a request, with parts for what was decided and one for each backend that was asked. They are
 * sent behind the answers, those of a fraction of a second together, and are lost where the collector is away.
 *
 * Without a collector nothing is made; a trace that the client brought goes on to the backend as it came.
 */

export interface Traces {
  /** A request has come. */
  begin(header: ReadHeader, route: string, requestId: string): RequestTrace;
}

/** The trace of one request. Times are since the epoch. */
export interface RequestTrace {
  /** Whether anybody will see it. */
  readonly isRecorded: boolean;
  /** A part of the work that is over. */
  part(name: string, from_ms: number, to_ms: number, attributes?: Attributes): void;
  /** A backend is asked. */
  attempt(backend: { readonly id: string; readonly url: string }, nth: number): AttemptTrace;
  /** Once. Settles when this request has nothing more to do for its spans, for `waitUntil`; never rejects. */
  end(ended: Ended): Promise<void>;
}

interface AttemptTrace {
  /** They make the backend's spans a part of the trace. */
  readonly headers: Record<string, string>;
  /** `status` null: it gave no answer. */
  end(outcome: string, status: number | null): void;
}

export type Ended = {
  /** Undefined: nobody knows yet what is asked. */
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

/** As HTTP's conventions have it, a refusal is an error to whoever asked. */
const isFailed = (outcome: string, status: number | null): boolean =>
  outcome !== 'cancelled' && (status === null || status >= 400);

function recorded(
  tracer: ReturnType<typeof createTracer>['tracer'],
  span: Span,
  context: Context,
  send: () => Promise<void>,
): RequestTrace {
  // A caller that does not sample wants its trace to go on all the same.
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

/** Spans on their way to the collector. */
class SpanPost implements SpanProcessor {
  readonly #collector: Collector;
  #spans: ReadableSpan[] = [];
  /** When the request came that sends them; the runtime may have torn it down since. */
  #begun_ms = 0;
  readonly #posts = new UnderWay();
  /** A collector that is away is told of once. */
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
    const now_ms = Date.now();
    if (now_ms - this.#begun_ms < TRACES.lost_ms) return;
    this.#begun_ms = now_ms;
    await sleep(TRACES.wait_ms);
    if (this.#begun_ms === now_ms) this.#begun_ms = 0;
    const spans = this.#spans;
    this.#spans = [];
    if (spans.length === 0) return;
    if (this.#posts.count(Date.now()) >= TRACES.postsMax)
      return this.#lost(spans.length, 'the collector is slow');
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
      // The headers hold a key.
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
