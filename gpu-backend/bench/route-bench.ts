/**
 * `bench route` and `bench encode`: the time of routing. `route` times `POST /v1/route` at the edge in workerd, with a prompt
 * of 60 tokens and a live mask set. As with `npm start`, requests pass the proxy of `dev/local-edge.ts`, which deployed
 * edges do not have. The limit is an empty answer: `/healthz` is timed in turn with it, and the difference is the time of
 * authentication, embedding and routing. `encode` times the static encoder alone, or a full encoder's texts a second.
 */
import { readFile } from 'node:fs/promises';
import { Agent } from 'node:http';
import { availableParallelism } from 'node:os';
import type { Encoder } from '../../shared/embedding/encoder.ts';
import { loadStaticEncoder, parseStaticTable } from '../../shared/embedding/static-encoder.ts';
import { loadWordPiece } from '../../shared/embedding/wordpiece.ts';
import type { MaskSet } from '../../shared/mask/mask-set.ts';
import { dryRunSchema } from '../../shared/wire/openai.ts';
import { openFullEncoder } from '../encoder/full-encoder.ts';
import { STATIC_TABLE_PATH } from '../learning/data/encoders.ts';
import { type BenchHooks, inTurns, median, quantile, round, time_ms, times_ms } from '../measure.ts';
import { publishMaskSet } from '../publication/publish.ts';
import { type BenchEdge, call, openEdge, promptOf, startUpstream } from './edge-peers.ts';

const WARM_UP = 300;

type RouteBench = {
  readonly bench: 'route';
  readonly requests: number;
  readonly promptTokens: number;
  readonly clusters: number;
  readonly median_ms: number;
  readonly p99_ms: number;
  readonly healthz_median_ms: number;
  readonly healthz_p99_ms: number;
};

export async function benchRoute(
  set: MaskSet,
  requests: number,
  { say, signal }: BenchHooks,
): Promise<RouteBench> {
  const { vocabulary } = parseStaticTable(await readFile(STATIC_TABLE_PATH));
  const promptTokens = loadWordPiece(vocabulary).tokenIds(promptOf(0)).length;
  await using started = new AsyncDisposableStack();
  const backend = await startUpstream(set);
  started.defer(backend.stop);
  const edge = await openEdge(backend.url, signal);
  started.defer(edge.stop);
  await publishMaskSet(edge.client, set, { tenant: '', activate: true });
  const times = await measure(edge, set.model.name, requests, signal);
  const at = (name: string, share: number) => round(quantile(times.get(name)!, share));
  const result: RouteBench = {
    bench: 'route',
    requests,
    promptTokens,
    clusters: set.clusters.length,
    median_ms: at('route', 0.5),
    p99_ms: at('route', 0.99),
    healthz_median_ms: at('healthz', 0.5),
    healthz_p99_ms: at('healthz', 0.99),
  };
  say(`/v1/route, ${promptTokens} tokens: median ${result.median_ms} ms, p99 ${result.p99_ms} ms`);
  say(`/healthz in turn with it: median ${result.healthz_median_ms} ms, p99 ${result.healthz_p99_ms} ms`);
  return result;
}

/** ms of `route` and `healthz`, one request at a time over one keep-alive connection. */
async function measure(
  edge: BenchEdge,
  model: string,
  requests: number,
  signal?: AbortSignal,
): Promise<Map<string, number[]>> {
  const agent = new Agent({ keepAlive: true, maxSockets: 1 });
  const headers = { authorization: `Bearer ${edge.apiKey}`, 'content-type': 'application/json' };
  let count = 0;
  const subjects = [
    {
      name: 'route',
      async measure() {
        const body = JSON.stringify({ model, messages: [{ role: 'user', content: promptOf(count++) }] });
        const routed = await call(agent, `${edge.url}/v1/route`, { method: 'POST', headers, body });
        const { cluster, fallback } = dryRunSchema.parse(JSON.parse(routed.text)).maskroute;
        if (typeof cluster !== 'number') throw new Error(`the request was not routed: ${fallback}`);
        return routed.to_ms - routed.from_ms;
      },
    },
    {
      name: 'healthz',
      async measure() {
        const live = await call(agent, `${edge.url}/healthz`, { method: 'GET', headers: {}, body: '' });
        return live.to_ms - live.from_ms;
      },
    },
  ];
  await inTurns(subjects, WARM_UP, (subject) => subject.measure(), signal);
  const times = await inTurns(subjects, requests, (subject) => subject.measure(), signal);
  agent.destroy();
  return times;
}

const WARM_UP_RUNS = 200;
const RUNS = 2000;
const WORDS =
  'Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips did she sell altogether? ';

type Row = { readonly tokens: number; readonly p50_ms: number; readonly p99_ms: number };

/**
 * Times the shipped static encoder on prompts of several lengths, tokenization included, in this process. Every routed
 * request takes that time at the edge.
 */
export async function benchEncode({ say, signal }: BenchHooks) {
  const bytes = await readFile(STATIC_TABLE_PATH);
  const start_ms = performance.now();
  const encoder = loadStaticEncoder(bytes);
  const load_ms = performance.now() - start_ms;
  const wordPiece = loadWordPiece(parseStaticTable(bytes).vocabulary);
  const rows: Row[] = [];
  for (const chars of [60, 265, 1000, 4000]) {
    signal?.throwIfAborted();
    const texts = Array.from({ length: RUNS }, (_, i) => `${i} ${WORDS.repeat(40)}`.slice(0, chars));
    const row = { tokens: wordPiece.tokenIds(texts[0]!).length, ...(await timeEach(encoder, texts)) };
    say(`${row.tokens} tokens: median ${row.p50_ms} ms, p99 ${row.p99_ms} ms`);
    rows.push(row);
  }
  return { bench: 'encode', encoder: encoder.spec, bytes: bytes.length, load_ms, rows };
}

const SHORT_TEXTS = 512;
const SHORT_ROUNDS = 5;

/** Short texts a second of a full encoder (which backends embed with) on all cores, tokenization included. */
export async function benchFullEncoder(name: string, home: string, { say, signal }: BenchHooks) {
  const hooks = { onProgress: () => {}, log: say, signal };
  const encoder = await openFullEncoder(name, { home, threads: availableParallelism(), hooks });
  const texts = Array.from({ length: SHORT_TEXTS }, (_, i) => `How do I cook rice for ${i} people?`);
  await encoder.embed(texts);
  const rates: number[] = [];
  for (let turn = 0; turn < SHORT_ROUNDS; turn++) {
    signal?.throwIfAborted();
    rates.push((1000 * texts.length) / (await time_ms(() => encoder.embed(texts))));
  }
  const textsPerSecond = round(median(rates), 0);
  say(`${textsPerSecond} texts of ${texts[0]!.length} characters a second`);
  await encoder.close();
  return { bench: 'encode', encoder: encoder.spec, texts: SHORT_TEXTS, textsPerSecond };
}

async function timeEach(encoder: Encoder, texts: readonly string[]): Promise<Omit<Row, 'tokens'>> {
  for (const text of texts.slice(0, WARM_UP_RUNS)) await encoder.embed([text]);
  const times = await times_ms(texts.length, (index) => encoder.embed([texts[index]!]));
  return { p50_ms: round(quantile(times, 0.5), 4), p99_ms: round(quantile(times, 0.99), 4) };
}
