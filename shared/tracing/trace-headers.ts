/** How a request's trace comes in and goes on, from the client to the edge and from there to a backend: W3C's headers. */
import { type Context, ROOT_CONTEXT, trace } from '@opentelemetry/api';
import { parseTraceParent, W3CTraceContextPropagator } from '@opentelemetry/core';

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
