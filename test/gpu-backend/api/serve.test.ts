/** `maskroute serve` as a process: what it refuses to start with, and what a signal does to running answers. */
import { once } from 'node:events';
import { createServer, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import { pino } from 'pino';
import { afterEach, describe, expect, it } from 'vitest';
import { openTracing } from '../../../gpu-backend/api/trace-export.ts';
import { DEFAULT_MODEL } from '../../../gpu-backend/model/sources/resolve.ts';
import { openReceiver, type Receiver } from '../../support/otlp-receiver.ts';
import { type Served, serve } from '../../support/serve.ts';
import { tinyHome } from '../learning/evaluation/tiny.ts';
import { BACKEND_KEY, eventually, parseSse } from './harness.ts';

const all: Served[] = [];
afterEach(async () => {
  await Promise.all(all.splice(0).map((served) => served.kill()));
});

function start(env: Record<string, string>, model = DEFAULT_MODEL): Served {
  const served = serve(model, env);
  all.push(served);
  return served;
}

/** Where OpenTelemetry's packages send what nobody said where to send. Another run may have the port for a moment. */
async function defaultCollector(): Promise<Receiver> {
  let receiver: Receiver | undefined;
  await eventually(async () => {
    receiver = await openReceiver(4318).catch(() => undefined);
    return receiver !== undefined;
  });
  return receiver!;
}

const story = (url: string) =>
  fetch(`${url}/v1/chat/completions`, {
    method: 'POST',
    headers: {
      authorization: `Bearer ${BACKEND_KEY}`,
      'content-type': 'application/json',
      traceparent: '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01',
    },
    body: JSON.stringify({
      model: 'tiny',
      messages: [{ role: 'user', content: 'Tell me a story.' }],
      stream: true,
      ignore_eos: true,
      max_tokens: 400,
    }),
  });

describe('a collector of traces', () => {
  it.each([
    ['takes the connection and never answers', () => {}],
    ['answers 500', (response: ServerResponse) => response.writeHead(500).end()],
    [
      'asks to come again later',
      (response: ServerResponse) => response.writeHead(503, { 'retry-after': '60' }).end(),
    ],
  ])('that %s holds up no exit', async (_, answer) => {
    const collector = createServer((_request, response) => answer(response)).listen(0, '127.0.0.1');
    await once(collector, 'listening');
    const url = `http://127.0.0.1:${(collector.address() as AddressInfo).port}/v1/traces`;
    const tracing = openTracing({ url, headers: {}, share: 1 }, pino({ level: 'silent' }));
    tracing.tracer.startSpan('a request').end();
    const start_ms = performance.now();
    await tracing.close();
    expect(performance.now() - start_ms).toBeLessThan(2000);
    collector.closeAllConnections();
    collector.close();
  });
});

describe('serve', () => {
  it.each([
    ['a key', { MASKROUTE_BACKEND_KEY: '' }, DEFAULT_MODEL, 'MASKROUTE_BACKEND_KEY', 2],
    ['an installed model', {}, 'no-such-model', 'no-such-model', 1],
    ['a number of threads', { MASKROUTE_THREADS: 'many' }, DEFAULT_MODEL, 'MASKROUTE_THREADS must be', 2],
  ])('does not start without %s, and says so in one line', async (_, env, model, expected, code) => {
    const served = start({ MASKROUTE_BACKEND_KEY: BACKEND_KEY, ...env }, model);
    expect(await served.exit).toBe(code);
    expect(served.output().trim().split('\n')).toHaveLength(1);
    expect(served.output()).toContain(expected);
  });

  it('finishes running answers on SIGTERM and exits with 0', async () => {
    using tiny = await tinyHome();
    const collector = await defaultCollector();
    const served = start({ MASKROUTE_BACKEND_KEY: BACKEND_KEY, MASKROUTE_HOME: tiny.home }, 'tiny');
    const response = await story(await served.url);
    served.child.kill('SIGTERM');
    const { events } = parseSse(await response.text());
    expect(events.at(-1)!.data).toBe('[DONE]');
    const tokens = events.filter(({ data }) => /"content":"[^"]/.test(data)).length;
    expect(tokens).toBeGreaterThan(20);
    expect(await served.exit).toBe(0);
    // The log's last lines are not lost with the process.
    await eventually(() => served.output().includes('"msg":"stopped"'));
    expect(served.output()).not.toContain(BACKEND_KEY);
    await collector.close();
    // Nobody named a collector.
    expect(collector.requests).toEqual([]);
  });

  it('keeps K and V in half precision where that is wanted, and computes with as many threads as it is told', async () => {
    using tiny = await tinyHome();
    const env = { MASKROUTE_BACKEND_KEY: BACKEND_KEY, MASKROUTE_HOME: tiny.home };
    const served = start({ ...env, MASKROUTE_KV_TYPE: 'f16', MASKROUTE_THREADS: '3' }, 'tiny');
    const url = await served.url;
    expect(served.output()).toContain('"threads":3');
    const headers = { authorization: `Bearer ${BACKEND_KEY}` };
    const metrics = await (await fetch(`${url}/metrics`, { headers })).text();
    // 16 tokens, 4 layers, 2 heads of K and of V, 16 halves each.
    expect(metrics).toMatch(/^maskroute_kv_cache_page_bytes\{kv_type="f16".*\} 8192$/m);
    served.child.kill('SIGTERM');
    expect(await served.exit).toBe(0);
  });

  it('says which port it cannot have, and how to choose another', async () => {
    const other = await openReceiver();
    using tiny = await tinyHome();
    const { port } = new URL(other.url);
    const env = { MASKROUTE_BACKEND_KEY: BACKEND_KEY, MASKROUTE_HOME: tiny.home, BACKEND_PORT: port };
    const served = start(env, 'tiny');
    expect(await served.exit).toBe(1);
    expect(served.output()).toContain(`error: Port ${port} is in use by another program. Set BACKEND_PORT`);
    await other.close();
  });
});
