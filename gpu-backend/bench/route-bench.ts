/**
 * `bench route`: what a client waits for `POST /v1/route` at the edge in workerd, with a prompt of 60 tokens and a live
 * mask set. As with `npm start` the pipe of `dev/front.ts` stands in between, which deployed edges do not have; so
 * `/healthz` is asked in turn with it, through the same pipe: the difference is what authentication, embedding and
 * routing cost over an empty answer.
 */
import { once } from 'node:events';
import { readFile } from 'node:fs/promises';
import { Agent, request } from 'node:http';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import type { Encoder } from '../../shared/embedding/encoder.ts';
import { loadStaticEncoder, parseStaticTable } from '../../shared/embedding/static-encoder.ts';
import { loadWordPiece } from '../../shared/embedding/wordpiece.ts';
import type { MaskSet } from '../../shared/mask/mask-set.ts';
import { dryRunSchema } from '../../shared/wire/openai.ts';
import { startEdge } from '../dev/local-edge.ts';
import { ensureApiKey } from '../dev/seed.ts';
import { STATIC_TABLE_PATH } from '../learning/data/encoders.ts';
import { createAdminClient } from '../publication/admin-client.ts';
import { publishMaskSet } from '../publication/publish.ts';
import { startUpstream } from './edge-peers.ts';

const PROJECT_FOLDER = fileURLToPath(new URL('../..', import.meta.url));
const KEY = 'key-of-this-bench-0123456789abcdef';
const WARM_UP = 300;

/** 60 WordPiece tokens; the number changes from request to request. */
const promptOf = (index: number): string =>
  `A train leaves the station at nine in the morning and travels at ${100 + (index % 900)} kilometres an hour. ` +
  'A second train follows half an hour later on the same track and is twenty kilometres an hour faster. ' +
  'How long does it take until the second train has caught up with the first one? Please explain every step.';

export type RouteBench = {
  readonly bench: 'route';
  readonly requests: number;
  readonly promptTokens: number;
  readonly clusters: number;
  readonly median_ms: number;
  readonly p99_ms: number;
  readonly healthz_median_ms: number;
  readonly healthz_p99_ms: number;
};

/** `say` gets lines for people. The edge's state is in memory and goes with it. */
export async function benchRoute(
  set: MaskSet,
  requests: number,
  say: (line: string) => void,
): Promise<RouteBench> {
  const promptTokens = await countTokens(promptOf(0));
  const backend = await startUpstream(set);
  const edge = await startEdge({
    projectFolder: PROJECT_FOLDER,
    stateFolder: undefined,
    port: 0,
    bindings: { BACKEND_URL: backend.url, BACKEND_KEY: KEY, ADMIN_KEY: KEY },
  });
  try {
    const client = createAdminClient(edge.url, KEY);
    const apiKey = await ensureApiKey(client, undefined);
    await publishMaskSet(client, set, { tenant: '', activate: true });
    const { route, healthz } = await measure(edge.url, apiKey, set.model.name, requests);
    const at = (times: number[], share: number) =>
      Number(times[Math.floor(share * times.length)]!.toFixed(3));
    const result: RouteBench = {
      bench: 'route',
      requests,
      promptTokens,
      clusters: set.clusters.length,
      median_ms: at(route, 0.5),
      p99_ms: at(route, 0.99),
      healthz_median_ms: at(healthz, 0.5),
      healthz_p99_ms: at(healthz, 0.99),
    };
    say(`/v1/route, ${promptTokens} tokens: median ${result.median_ms} ms, p99 ${result.p99_ms} ms`);
    say(`/healthz in turn with it: median ${result.healthz_median_ms} ms, p99 ${result.healthz_p99_ms} ms`);
    return result;
  } finally {
    await edge.close();
    await backend.stop();
  }
}

/** Sorted times of both, one request at a time over one kept connection. */
async function measure(edge: string, apiKey: string, model: string, requests: number) {
  const agent = new Agent({ keepAlive: true, maxSockets: 1 });
  const route: number[] = [];
  const healthz: number[] = [];
  const headers = { authorization: `Bearer ${apiKey}`, 'content-type': 'application/json' };
  for (let index = 0; index < WARM_UP + requests; index++) {
    const body = JSON.stringify({ model, messages: [{ role: 'user', content: promptOf(index) }] });
    const routed = await timed(agent, `${edge}/v1/route`, { method: 'POST', headers, body });
    const live = await timed(agent, `${edge}/healthz`, { method: 'GET', headers: {}, body: '' });
    const { cluster, fallback } = dryRunSchema.parse(JSON.parse(routed.text)).maskroute;
    if (typeof cluster !== 'number') throw new Error(`the request was not routed: ${fallback}`);
    if (index < WARM_UP) continue;
    route.push(routed.took_ms);
    healthz.push(live.took_ms);
  }
  agent.destroy();
  const ascending = (a: number, b: number) => a - b;
  return { route: route.sort(ascending), healthz: healthz.sort(ascending) };
}

type Call = { readonly method: string; readonly headers: Record<string, string>; readonly body: string };

/** From sending to the last byte of the answer. */
async function timed(agent: Agent, url: string, { method, headers, body }: Call) {
  const start_ms = performance.now();
  const outgoing = request(url, { agent, method, headers });
  outgoing.end(body);
  const [response] = await once(outgoing, 'response');
  let text = '';
  for await (const chunk of response) text += chunk;
  return { took_ms: performance.now() - start_ms, text };
}

async function countTokens(text: string): Promise<number> {
  const table = await readFile(path.join(PROJECT_FOLDER, 'workers/assets/encoder/static.bin'));
  return loadWordPiece(parseStaticTable(table).vocabulary).tokenIds(text).length;
}

/*
 * Time of the static encoder for prompts of several lengths, tokenization included: what every routed request
 * pays at the edge.
 */

const WARM_UP_RUNS = 200;
const RUNS = 2000;
const WORDS =
  'Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips did she sell altogether? ';

type Row = { readonly tokens: number; readonly p50_ms: number; readonly p99_ms: number };

/** The table that ships, in this process; `say` gets lines for people. */
export async function benchEncode(say: (line: string) => void) {
  const bytes = await readFile(STATIC_TABLE_PATH);
  const start_ms = performance.now();
  const encoder = loadStaticEncoder(bytes);
  const load_ms = performance.now() - start_ms;
  const wordPiece = loadWordPiece(parseStaticTable(bytes).vocabulary);
  const rows: Row[] = [];
  for (const chars of [60, 265, 1000, 4000]) {
    const texts = Array.from({ length: RUNS }, (_, i) => `${i} ${WORDS.repeat(40)}`.slice(0, chars));
    const row = { tokens: wordPiece.tokenIds(texts[0]!).length, ...(await timeEach(encoder, texts)) };
    say(`${row.tokens} tokens: median ${row.p50_ms} ms, p99 ${row.p99_ms} ms`);
    rows.push(row);
  }
  return { bench: 'encode', encoder: encoder.spec, bytes: bytes.length, load_ms, rows };
}

async function timeEach(encoder: Encoder, texts: readonly string[]): Promise<Omit<Row, 'tokens'>> {
  for (const text of texts.slice(0, WARM_UP_RUNS)) await encoder.embed([text]);
  const times: number[] = [];
  for (const text of texts) {
    const start_ms = performance.now();
    await encoder.embed([text]);
    times.push(performance.now() - start_ms);
  }
  times.sort((a, b) => a - b);
  const at = (share: number) => Number(times[Math.floor(share * times.length)]!.toFixed(4));
  return { p50_ms: at(0.5), p99_ms: at(0.99) };
}
