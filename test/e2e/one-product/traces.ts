/** A request's trace, from the client over the edge in workerd and the backend to a collector that reads OTLP. */
import { randomBytes } from 'node:crypto';
import { readFileSync } from 'node:fs';
import path from 'node:path';
import { afterAll, describe, expect, test, vi } from 'vitest';
import { openReceiver, type ReceivedSpan, type Receiver } from '../../support/otlp-receiver.ts';
import { stop } from '../product.ts';
import { home, product } from './running.ts';

const PROMPT = 'Describe the zephyrs of Xanadu and their history.';

let receiver: Receiver;
afterAll(() => receiver?.close());

/** What a product needs to send its spans here. */
export async function openCollector() {
  receiver = await openReceiver();
  return {
    OTEL_EXPORTER_OTLP_ENDPOINT: `${receiver.url}/`,
    OTEL_EXPORTER_OTLP_HEADERS: 'authorization=Bearer%20collector-key',
  };
}

type Trace = { readonly id: string; readonly parent: string };
const newTrace = (): Trace => ({
  id: randomBytes(16).toString('hex'),
  parent: randomBytes(8).toString('hex'),
});
const traceparent = ({ id, parent }: Trace, flags = '01') => ({ traceparent: `00-${id}-${parent}-${flags}` });

function send(fields: object, headers: Record<string, string> = {}, init: RequestInit = {}) {
  return fetch(`${product.dev.edge}/v1/chat/completions`, {
    method: 'POST',
    headers: {
      authorization: `Bearer ${product.dev.apiKey}`,
      'content-type': 'application/json',
      ...headers,
    },
    body: JSON.stringify({
      model: product.dev.model,
      messages: [{ role: 'user', content: PROMPT }],
      max_tokens: 6,
      temperature: 0,
      ...fields,
    }),
    ...init,
  });
}

const inTrace = (id: string) => receiver.spans.filter(({ traceId }) => traceId === id);
const named = (spans: readonly ReceivedSpan[], service: string, name: string): ReceivedSpan => {
  const found = spans.filter((span) => span.service === service && span.name === name);
  expect(found.map((span) => span.name)).toEqual([name]);
  return found[0]!;
};

/** Waits for the spans of a trace: both parts of the product send theirs on their own. */
async function traced(id: string, count: number): Promise<ReceivedSpan[]> {
  await vi.waitFor(() => expect(inTrace(id).length).toBeGreaterThanOrEqual(count), { timeout: 20_000 });
  return inTrace(id);
}

/** Every span but the client's, with its parent's name. */
const shape = (spans: readonly ReceivedSpan[]) => {
  const nameOf = new Map(spans.map(({ spanId, service, name }) => [spanId, `${service} ${name}`]));
  return spans
    .map(({ service, name, kind, parentId }) => [`${service} ${name}`, kind, nameOf.get(parentId)])
    .sort((a, b) => (a[0]! < b[0]! ? -1 : 1));
};

const edge = (name: string) => `maskroute-edge ${name}`;
const backend = (name: string) => `maskroute-backend ${name}`;

const expectWholeTrace = (spans: readonly ReceivedSpan[]): void => {
  const chat = `chat ${product.dev.model}`;
  expect(shape(spans)).toEqual([
    [backend(chat), 'server', edge('backend')],
    [backend('decode'), 'internal', backend(chat)],
    [backend('prefill'), 'internal', backend(chat)],
    [backend('queue'), 'internal', backend(chat)],
    [edge('backend'), 'client', edge(chat)],
    [edge(chat), 'server', undefined],
    [edge('embed'), 'internal', edge(chat)],
    [edge('route'), 'internal', edge(chat)],
  ]);
};

test('a whole answer is one trace: the decision at the edge, queue, prefill and decode at the backend', async () => {
  const trace = newTrace();
  const response = await send({ seed: 7 }, traceparent(trace));
  const body = await response.json();
  const spans = await traced(trace.id, 8);
  expectWholeTrace(spans);

  const chat = `chat ${product.dev.model}`;
  const root = named(spans, 'maskroute-edge', chat);
  expect(root.parentId).toBe(trace.parent);
  const asked = {
    'gen_ai.operation.name': 'chat',
    'gen_ai.provider.name': 'maskroute',
    'gen_ai.request.model': product.dev.model,
    'gen_ai.request.max_tokens': 6,
    'gen_ai.request.temperature': 0,
    'gen_ai.request.seed': 7,
    'gen_ai.request.stream': false,
    'gen_ai.usage.input_tokens': body.usage.prompt_tokens,
    'gen_ai.usage.output_tokens': body.usage.completion_tokens,
    'gen_ai.response.finish_reasons': [body.choices[0].finish_reason],
    'http.response.status_code': 200,
    'maskroute.request_id': response.headers.get('x-request-id'),
    'maskroute.mask_set': body.maskroute.mask_set,
    'maskroute.version': body.maskroute.version,
    'maskroute.cluster': body.maskroute.cluster,
    'maskroute.mask': body.maskroute.mask,
    'maskroute.sparsity': body.maskroute.sparsity,
    'maskroute.experiment': body.maskroute.experiment,
    'maskroute.variant': body.maskroute.variant,
    'maskroute.region': body.maskroute.region,
  };
  expect(root.attributes).toMatchObject({ ...asked, 'maskroute.backend': 'default' });
  expect(named(spans, 'maskroute-backend', chat).attributes).toMatchObject({
    ...asked,
    'gen_ai.response.id': body.id,
  });
  expect(named(spans, 'maskroute-edge', 'backend').attributes).toMatchObject({
    'maskroute.outcome': 'answer',
    'server.port': Number(new URL(product.dev.backend).port),
    'http.response.status_code': 200,
  });
  expect(spans.some(({ isError }) => isError)).toBe(false);

  // The parts of the backend lie in its span, one after the other.
  const [queue, prefill, decode] = ['queue', 'prefill', 'decode'].map((name) =>
    named(spans, 'maskroute-backend', name),
  );
  expect(queue!.end_ms).toBeCloseTo(prefill!.start_ms, 1);
  expect(prefill!.end_ms).toBeCloseTo(decode!.start_ms, 1);
  expect(prefill!.end_ms - prefill!.start_ms).toBeGreaterThan(0);
  expect(decode!.end_ms).toBeLessThanOrEqual(named(spans, 'maskroute-backend', chat).end_ms);
});

test('a stream is one, too, and a request without a trace begins one', async () => {
  const response = await send({ stream: true });
  const requestId = response.headers.get('x-request-id');
  await response.text();
  const isIts = ({ attributes }: ReceivedSpan) => attributes['maskroute.request_id'] === requestId;
  await vi.waitFor(() => expect(receiver.spans.filter(isIts)).toHaveLength(2), { timeout: 20_000 });
  const spans = await traced(receiver.spans.find(isIts)!.traceId, 8);
  expectWholeTrace(spans);
  const root = named(spans, 'maskroute-edge', `chat ${product.dev.model}`);
  expect(root.parentId).toBe('');
  expect(root.attributes['gen_ai.request.stream']).toBe(true);
  expect(root.attributes['gen_ai.response.time_to_first_chunk']).toBeGreaterThan(0);
  expect(root.attributes['gen_ai.response.finish_reasons']).toEqual(['length']);
  expect(named(spans, 'maskroute-backend', root.name).events).toEqual(['first_token']);
});

test('a header that is not in W3C’s words is ignored', async () => {
  const id = 'f'.repeat(32);
  const response = await send({}, { traceparent: `00-${id}-0000000000000000-01` });
  expect(response.status).toBe(200);
  const requestId = response.headers.get('x-request-id');
  const isIts = ({ attributes }: ReceivedSpan) => attributes['maskroute.request_id'] === requestId;
  await vi.waitFor(() => expect(receiver.spans.filter(isIts)).toHaveLength(2), { timeout: 20_000 });
  expect(inTrace(id)).toEqual([]);
});

test('what its caller does not sample is not recorded', async () => {
  const [unsampled, sampled] = [newTrace(), newTrace()];
  expect((await send({}, traceparent(unsampled, '00'))).status).toBe(200);
  expect((await send({}, traceparent(sampled))).status).toBe(200);
  await traced(sampled.id, 8);
  expect(inTrace(unsampled.id)).toEqual([]);
});

describe('an error', () => {
  test('of the client at the edge is one span that is not marked as failed', async () => {
    const trace = newTrace();
    expect((await send({ temperature: 9 }, traceparent(trace))).status).toBe(400);
    const [root, ...others] = await traced(trace.id, 1);
    expect(others).toEqual([]);
    expect(root).toMatchObject({ name: 'POST /v1/chat/completions', parentId: trace.parent, isError: false });
    expect(root!.attributes).toMatchObject({
      'error.type': 'invalid_request',
      'http.response.status_code': 400,
    });
  });

  test('of a wrong key says so', async () => {
    const trace = newTrace();
    const response = await send({}, { ...traceparent(trace), authorization: 'Bearer mrk_wrong' });
    expect(response.status).toBe(401);
    const [root] = await traced(trace.id, 1);
    expect(root!.attributes).toMatchObject({ 'error.type': 'invalid_api_key' });
  });

  test('of a backend is in the spans of both', async () => {
    const trace = newTrace();
    const messages = [{ role: 'user', content: 'Xanadu '.repeat(9000) }];
    expect((await send({ messages }, traceparent(trace))).status).toBe(400);
    const spans = await traced(trace.id, 5);
    const chat = `chat ${product.dev.model}`;
    for (const span of [named(spans, 'maskroute-edge', chat), named(spans, 'maskroute-backend', 'chat')]) {
      expect(span.attributes).toMatchObject({
        'error.type': 'context_length_exceeded',
        'http.response.status_code': 400,
      });
    }
    // It is an error to whoever asked.
    expect(named(spans, 'maskroute-edge', 'backend').isError).toBe(true);
  });
});

test('a client that hangs up leaves spans of what was done for it', async () => {
  const trace = newTrace();
  const leave = new AbortController();
  const fields = { stream: true, max_tokens: 2000, ignore_eos: true };
  const response = await send(fields, traceparent(trace), { signal: leave.signal });
  const reader = response.body!.getReader();
  for (let pieces = 0; pieces < 5; pieces++) await reader.read();
  leave.abort();
  const spans = await traced(trace.id, 6);
  const chat = `chat ${product.dev.model}`;
  const [root, answer] = [named(spans, 'maskroute-edge', chat), named(spans, 'maskroute-backend', chat)];
  for (const span of [root, answer]) {
    expect(span.attributes).toMatchObject({
      'error.type': 'cancelled',
      'http.response.status_code': 499,
    });
    expect(span.isError).toBe(false);
    expect(span.attributes['gen_ai.usage.output_tokens']).toBeGreaterThanOrEqual(3);
  }
  expect(named(spans, 'maskroute-backend', 'decode').parentId).toBe(answer.spanId);
});

test('no span has a word of a prompt or an answer', () => {
  const sent = Buffer.concat(receiver.bodies).toString('latin1');
  expect(sent).toContain('gen_ai.request.model');
  for (const word of ['zephyr', 'Xanadu', 'Describe']) expect(sent).not.toContain(word);
});

test('they come in protobuf, with the key that the collector wants', () => {
  for (const { method, url, headers } of receiver.requests) {
    expect([method, url]).toEqual(['POST', '/v1/traces']);
    expect(headers).toMatchObject({
      'content-type': 'application/x-protobuf',
      authorization: 'Bearer collector-key',
    });
  }
});

test('a collector that is away costs its spans and one line of each log, and nothing of an answer', async () => {
  const { url } = receiver;
  await receiver.close();
  for (let request = 0; request < 3; request++) {
    expect((await send({}, traceparent(newTrace()))).status).toBe(200);
    await new Promise((resolve) => setTimeout(resolve, 400));
  }
  const lines = (name: string, text: string) =>
    readFileSync(path.join(home, 'logs', `${name}.log`), 'utf8').split(text).length - 1;
  await vi.waitFor(
    () => {
      expect(lines('backend', 'traces are lost')).toBe(1);
      expect(lines('edge', 'traces_lost')).toBe(1);
    },
    { timeout: 20_000 },
  );
  receiver = await openReceiver(Number(new URL(url).port));
  const trace = newTrace();
  expect((await send({}, traceparent(trace))).status).toBe(200);
  await traced(trace.id, 8);
  expect([lines('backend', 'traces are lost'), lines('edge', 'traces_lost')]).toEqual([1, 1]);
});

test('a stop sends what waits', async () => {
  const trace = newTrace();
  expect((await send({}, traceparent(trace))).status).toBe(200);
  expect(await stop(product)).toBe(0);
  expectWholeTrace(inTrace(trace.id));
});
