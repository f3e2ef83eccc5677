/** The edge's part in traces: what goes on to the backend, and that no answer waits for a collector. */
import { afterEach, describe, expect, it, vi } from 'vitest';
import { HEADERS } from '../../../shared/wire/protocol.ts';
import { TRACES } from '../../../workers/limits.ts';
import { CHAT, call, errorCode, freshIsolate, newTenant, recorded, soon } from '../support/edge.ts';

const COLLECTOR = 'http://collector.test:4318';
const TRACE = '0af7651916cd43dd8448eb211c80319c';
const TRACEPARENT = `00-${TRACE}-b7ad6b7169203331-01`;

type Fetch = ReturnType<typeof freshIsolate>;
const send = (key: string, headers: Record<string, string>, fetch?: Fetch) =>
  call('POST', '/v1/chat/completions', { key, body: CHAT, headers }, fetch);

/** The headers that its backend got. */
async function forwarded(response: Response): Promise<Record<string, string | undefined>> {
  expect(response.status).toBe(200);
  return (await recorded(response.headers.get(HEADERS.requestId)!))!.headers;
}

const posts: Request[] = [];
function collectorThat(answers: () => Promise<Response>): void {
  const real = globalThis.fetch;
  vi.spyOn(globalThis, 'fetch').mockImplementation((input, init) => {
    const request = new Request(input, init);
    if (!request.url.startsWith(COLLECTOR)) return real(input, init);
    posts.push(request);
    return answers();
  });
}

afterEach(() => {
  vi.restoreAllMocks();
  vi.useRealTimers();
  posts.length = 0;
});

describe('without a collector', () => {
  it('a trace goes on as it came', async () => {
    const { key } = await newTenant();
    const trace = { traceparent: TRACEPARENT, tracestate: 'vendor=1' };
    expect(await forwarded(await send(key, trace))).toMatchObject(trace);
  });

  it('what is no trace ends here', async () => {
    const { key } = await newTenant();
    for (const headers of [{}, { traceparent: 'abc', tracestate: 'vendor=1' }]) {
      const got = await forwarded(await send(key, headers));
      expect([got.traceparent, got.tracestate]).toEqual([undefined, undefined]);
    }
  });

  it('nothing is sent to anybody', async () => {
    collectorThat(async () => new Response());
    const { key } = await newTenant();
    const held: Promise<unknown>[] = [];
    const variables = { OTEL_EXPORTER_OTLP_ENDPOINT: '', OTEL_EXPORTER_OTLP_HEADERS: 'a=b' };
    const isolate = freshIsolate(variables, (work) => held.push(work));
    await forwarded(await send(key, { traceparent: TRACEPARENT }, isolate));
    await Promise.all(held);
    expect(posts).toEqual([]);
  });
});

describe('with a collector', () => {
  const variables = { OTEL_EXPORTER_OTLP_ENDPOINT: COLLECTOR };

  it('the backend hears of a span of the edge in the client’s trace, sampled or not', async () => {
    collectorThat(async () => new Response());
    const { key } = await newTenant();
    const isolate = freshIsolate(variables);
    for (const flags of ['01', '00']) {
      const traceparent = TRACEPARENT.replace(/01$/, flags);
      const got = await forwarded(await send(key, { traceparent, tracestate: 'vendor=1' }, isolate));
      expect(got.traceparent).toMatch(new RegExp(`^00-${TRACE}-[0-9a-f]{16}-${flags}$`));
      expect(got.traceparent).not.toBe(traceparent);
      expect(got.tracestate).toBe('vendor=1');
    }
  });

  it('spans of requests that end together are sent together', async () => {
    collectorThat(async () => new Response());
    const { key } = await newTenant();
    const held: Promise<unknown>[] = [];
    const isolate = freshIsolate(variables, (work) => held.push(work));
    const traceparent = TRACEPARENT;
    // The first request of an isolate loads what the others need.
    await forwarded(await send(key, { traceparent: TRACEPARENT.replace(/01$/, '00') }, isolate));
    await Promise.all([1, 2, 3].map(() => send(key, { traceparent }, isolate).then(forwarded)));
    await Promise.all(held);
    expect(posts.length).toBeGreaterThanOrEqual(1);
    expect(posts.length).toBeLessThan(3);
  });

  it('an answer does not wait for one that hangs, which gets no more than a few posts at a time', async () => {
    collectorThat(() => new Promise(() => {}));
    const { key } = await newTenant();
    const isolate = freshIsolate(variables);
    const warnings = vi.spyOn(console, 'warn');
    const lost = () => warnings.mock.calls.filter(([line]) => String(line).includes('traces_lost')).length;
    await soon(async () => {
      await forwarded(await send(key, { traceparent: TRACEPARENT }, isolate));
      expect(lost()).toBe(1);
    });
    expect(posts).toHaveLength(TRACES.postsMax);
    // Posts whose requests the platform ended never end themselves: they take nobody's place for good.
    vi.useFakeTimers({ toFake: ['Date'], now: Date.now() + 3 * TRACES.post_ms });
    await forwarded(await send(key, { traceparent: TRACEPARENT }, isolate));
    await soon(() => expect(posts.length).toBeGreaterThan(TRACES.postsMax));
  });

  it('that is no address the edge is not configured', async () => {
    const { key } = await newTenant();
    const isolate = freshIsolate({ OTEL_EXPORTER_OTLP_ENDPOINT: 'collector:4317' });
    const response = await send(key, {}, isolate);
    expect(await errorCode(response)).toBe('503 configuration_unavailable');
  });
});
