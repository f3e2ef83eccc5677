import { SpanStatusCode } from '@opentelemetry/api';
import * as conventions from '@opentelemetry/semantic-conventions/incubating';
import { expect, it } from 'vitest';
import {
  answerAttributes,
  collectorFrom,
  passedTrace,
  requestAttributes,
  setOutcome,
  traceHeaders,
  traceOf,
  variablesOf,
} from '../../../shared/tracing/traces.ts';

const ID = '0af7651916cd43dd8448eb211c80319c';
const VALID = `00-${ID}-b7ad6b7169203331-01`;

const headers =
  (given: Record<string, string>) =>
  (name: string): string | undefined =>
    given[name];

it.each([
  '',
  'abc',
  `00-${ID}-b7ad6b7169203331`,
  `00-${'0'.repeat(32)}-b7ad6b7169203331-01`,
  `00-${ID}-${'0'.repeat(16)}-01`,
  `00-${ID.toUpperCase()}-b7ad6b7169203331-01`,
  `00-${ID}-b7ad6b7169203331-01-more`,
  `ff-${ID}-b7ad6b7169203331-01`,
])('the header %j names no trace', (traceparent) => {
  const read = headers({ traceparent, tracestate: 'a=b' });
  expect(traceHeaders(traceOf(read))).toEqual({});
  expect(passedTrace(read)).toEqual({});
});

it('a trace goes on with its state and its sampling', () => {
  for (const traceparent of [VALID, VALID.replace(/01$/, '00')]) {
    const read = headers({ traceparent, tracestate: 'vendor=1' });
    expect(traceHeaders(traceOf(read))).toEqual({ traceparent, tracestate: 'vendor=1' });
    expect(passedTrace(read)).toEqual({ traceparent, tracestate: 'vendor=1' });
  }
  const long = headers({ traceparent: VALID, tracestate: `a=${'x'.repeat(600)}` });
  expect(passedTrace(long)).toEqual({ traceparent: VALID });
});

it('a code that is none of ours is the fault of whoever said it, whatever it is called', () => {
  for (const code of ['made_up', 'constructor', 'toString']) {
    const statuses: unknown[] = [];
    const span = { setAttribute: () => span, setStatus: (status: unknown) => statuses.push(status) };
    setOutcome(span as never, 200, code);
    expect(statuses).toEqual([{ code: SpanStatusCode.ERROR, message: code }]);
  }
});

it('a collector is named by OpenTelemetry’s own variables, and nothing else turns traces on', () => {
  expect(collectorFrom({})).toBeUndefined();
  expect(
    collectorFrom({ OTEL_EXPORTER_OTLP_ENDPOINT: '', OTEL_EXPORTER_OTLP_HEADERS: 'a=b' }),
  ).toBeUndefined();
  const collector = collectorFrom({
    OTEL_EXPORTER_OTLP_ENDPOINT: 'https://collector.example/base/',
    OTEL_EXPORTER_OTLP_HEADERS: 'authorization=Bearer%20x%2C%3D,x-team=one',
    OTEL_TRACES_SAMPLER_ARG: '0.25',
  });
  expect(collector).toEqual({
    url: 'https://collector.example/base/v1/traces',
    headers: { authorization: 'Bearer x,=', 'x-team': 'one' },
    share: 0.25,
  });
  expect(collectorFrom(variablesOf(collector!))).toEqual(collector);
});

it.each([
  ['OTEL_EXPORTER_OTLP_ENDPOINT', 'collector:4317'],
  ['OTEL_EXPORTER_OTLP_ENDPOINT', 'ftp://collector'],
  ['OTEL_TRACES_SAMPLER_ARG', '2'],
])('a start with %s=%s is refused, and the reason names it', (name, value) => {
  expect(() => collectorFrom({ [name]: value })).toThrow(name);
});

it('names of attributes are those of the conventions', () => {
  const names = new Set<unknown>(Object.values(conventions));
  const body = {
    model: 'm',
    messages: [],
    max_tokens: 1,
    temperature: 1,
    top_p: 1,
    top_k: 1,
    n: 2,
    seed: 1,
    frequency_penalty: 1,
    presence_penalty: 1,
    stream: true,
    stop: ['secret'],
  };
  const facts = { id: 'a', input_tokens: 1, output_tokens: 1, cached_tokens: 1, first_ms: 1 };
  const attributes = {
    ...requestAttributes('chat', body),
    ...answerAttributes({ ...facts, finishReasons: ['stop'] }),
  };
  expect(Object.keys(attributes)).toHaveLength(19);
  expect(Object.keys(attributes).filter((name) => !names.has(name))).toEqual([]);
  expect(JSON.stringify(attributes)).not.toContain('secret');
});

it('a seed that is no integer of an attribute is left out', () => {
  const seedOf = (seed: number) =>
    requestAttributes('chat', { model: 'm', messages: [], seed })['gen_ai.request.seed'];
  expect(seedOf(-7)).toBe(-7);
  expect(seedOf(2 ** 64)).toBeUndefined();
});
