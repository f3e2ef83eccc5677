/** `/metrics` over HTTP, from the real server over a scripted engine. */
import { connect } from 'node:net';
import { text as textOf } from 'node:stream/consumers';
import { expect, it } from 'vitest';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { BACKEND_KEY, eventually, serveModel, type TestServer } from './harness.ts';
import { type Script, says, scriptedEngine, scriptedModel } from './scripted-engine.ts';

const open = (script: Script, limits = {}) => serveModel(scriptedModel(scriptedEngine(script)), limits);

const chat = (server: TestServer, fields: object = {}) =>
  server.post('/v1/chat/completions', {
    model: 'scripted',
    messages: [{ role: 'user', content: 'Hi' }],
    ...fields,
  });

type Sample = { readonly name: string; readonly labels: Record<string, string>; readonly value: number };

async function scrape(server: TestServer): Promise<{ types: Map<string, string>; samples: Sample[] }> {
  const headers = { authorization: `Bearer ${BACKEND_KEY}` };
  const text = await (await fetch(`${server.url}/metrics`, { headers })).text();
  const types = new Map([...text.matchAll(/^# TYPE (\S+) (\S+)$/gm)].map(([, name, type]) => [name!, type!]));
  const samples = [...text.matchAll(/^(\w+)(?:\{(.*)\})? (\S+)$/gm)].map(([, name, labels, value]) => ({
    name: name!,
    labels: Object.fromEntries(
      [...(labels ?? '').matchAll(/(\w+)="([^"]*)"/g)].map(([, label, of]) => [label!, of!]),
    ),
    value: Number(value),
  }));
  return { types, samples };
}

const sum = (samples: readonly Sample[], name: string, labels: Record<string, string> = {}): number =>
  samples
    .filter((sample) => sample.name === name)
    .filter((sample) => Object.entries(labels).every(([label, value]) => sample.labels[label] === value))
    .reduce((total, { value }) => total + value, 0);

it('the engine tells its batch, its pages, its prefix cache and its preemptions', async () => {
  const counted = { prefixQueriesTotal: 40, prefixHitsTotal: 30, preemptionsTotal: 2 };
  const stats = { batchSize: 5, pagesUsed: 3, pagesTotal: 12, ...counted };
  await using server = await open({ ...says('a'), stats });
  const { types, samples } = await scrape(server);
  const expected = {
    maskroute_batch_size: ['gauge', 5],
    maskroute_kv_cache_pages_used: ['gauge', 3],
    maskroute_kv_cache_pages: ['gauge', 12],
    maskroute_kv_cache_page_bytes: ['gauge', 64],
    prefix_cache_queries_total: ['counter', 40],
    prefix_cache_hits_total: ['counter', 30],
    num_preemptions_total: ['counter', 2],
  } as const;
  for (const [name, [type, value]] of Object.entries(expected)) {
    expect([name, types.get(name), sum(samples, name)]).toEqual([name, type, value]);
  }
  // A counter that the engine keeps is read again at every scrape, and not added up.
  expect(sum((await scrape(server)).samples, 'num_preemptions_total')).toBe(2);
});

it('times are told by model and mask, and so are the gaps between tokens', async () => {
  await using server = await open({ ...says('abcd'), step_ms: 2 });
  expect((await chat(server, { n: 2 })).status).toBe(200);
  const mask = { skipAttention: [1], skipFfn: [] };
  const masked = await (await chat(server, { mask })).json();
  const { samples } = await scrape(server);
  const dense = { model_name: 'scripted', endpoint: 'chat', mask: 'dense' };
  expect(sum(samples, 'inter_token_latency_seconds_count', dense)).toBe(2 * 3);
  expect(sum(samples, 'inter_token_latency_seconds_sum', dense)).toBeGreaterThan(0.006);
  expect(sum(samples, 'request_queue_time_seconds_count', dense)).toBe(2);
  expect(sum(samples, 'gen_ai_server_time_to_first_token_seconds_count', dense)).toBe(1);
  const other = { ...dense, mask: masked.maskroute.mask };
  expect(sum(samples, 'inter_token_latency_seconds_count', other)).toBe(3);
  expect(sum(samples, 'gen_ai_server_time_to_first_token_seconds_count', other)).toBe(1);
  expect(sum(samples, 'request_success_total', { finished_reason: 'stop' })).toBe(3);
});

it('the first 32 masks have a name, and all others share one', async () => {
  await using server = await open(says('a'));
  for (let bits = 1; bits <= 40; bits++) {
    const layers = (from: number) => [0, 1, 2, 3].filter((layer) => (bits >> (from + layer)) & 1);
    const mask = { skipAttention: layers(0), skipFfn: layers(4) };
    expect((await chat(server, { mask, max_tokens: 1 })).status).toBe(200);
  }
  const { samples } = await scrape(server);
  const name = 'gen_ai_server_request_duration_seconds_count';
  const masks = samples.filter((sample) => sample.name === name).map(({ labels }) => labels.mask);
  expect(new Set(masks).size).toBe(33);
  expect(sum(samples, name, { mask: 'other' })).toBe(8);
  expect(sum(samples, name)).toBe(40);
});

it('what the HTTP thread computed in one piece is told, once', async () => {
  await using server = await open(says('a'));
  const longest_s = async () =>
    sum((await scrape(server)).samples, 'maskroute_http_thread_longest_work_seconds');
  // It begins with the first scrape.
  expect(await longest_s()).toBe(0);
  const begun = process.threadCpuUsage();
  const used_ms = () => {
    const { user, system } = process.threadCpuUsage(begun);
    return (user + system) / 1000;
  };
  while (used_ms() < 60);
  await new Promise((resolve) => setTimeout(resolve, 30));
  const told_s = await longest_s();
  expect(told_s).toBeGreaterThanOrEqual(0.05);
  expect(await longest_s()).toBeLessThan(told_s);
});

it('a stream that fails after its status has the code of its error', async () => {
  const error = new MaskrouteError('engine_failed', 'The runtime failed.');
  await using server = await open({ ...says('abc'), failure: { afterTokens: 2, error } });
  await (await chat(server, { stream: true })).text();
  const { samples } = await scrape(server);
  const labels = { endpoint: 'chat', status: '200', code: 'engine_failed' };
  expect(sum(samples, 'maskroute_requests_total', labels)).toBe(1);
});

it('a request whose body breaks off is counted once', async () => {
  await using server = await open(says('a'));
  const socket = connect({ port: Number(new URL(server.url).port), host: '127.0.0.1', allowHalfOpen: true });
  socket.end(
    `POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer ${BACKEND_KEY}\r\n` +
      'content-type: application/json\r\ncontent-length: 100\r\n\r\n{',
  );
  expect(await textOf(socket)).toContain('it ended early');
  socket.destroy();
  const counted = async () =>
    (await scrape(server)).samples.filter(({ name }) => name === 'maskroute_requests_total');
  await eventually(async () => (await counted()).some(({ labels }) => labels.endpoint === 'chat'));
  expect(await counted()).toMatchObject([{ labels: { endpoint: 'chat', code: 'cancelled' }, value: 1 }]);
});

it('what is refused for the state of the backend is a rejection, what is wrong is not', async () => {
  await using server = await open({ ...says('a'), slots: 0, queueCapacity: 0 });
  expect((await chat(server)).status).toBe(429);
  expect((await chat(server, { temperature: 9 })).status).toBe(400);
  const { samples } = await scrape(server);
  expect(sum(samples, 'request_rejections_total', { reason: 'queue_full' })).toBe(1);
  expect(sum(samples, 'request_rejections_total')).toBe(1);
  expect(sum(samples, 'request_success_total')).toBe(0);
});
