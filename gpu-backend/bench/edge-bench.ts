/**
 * `bench edge`: the latency that the edge adds to calling its upstream directly, against the latency that Portkey's
 * gateway adds, with the same upstream and prompts, in interleaved rounds of one run. The edge runs in workerd and
 * authenticates, embeds, routes and counts every request. It is measured twice: at workerd's own socket, like on
 * Cloudflare, and through the proxy of `npm start` (`dev/local-edge.ts`). Portkey's gateway only forwards a request. The
 * limit is the floor: a bare worker that only forwards, too.
 */
import { mkdtemp, rm } from 'node:fs/promises';
import { Agent } from 'node:http';
import { tmpdir } from 'node:os';
import path from 'node:path';
import type { MaskSet } from '../../shared/mask/mask-set.ts';
import { HEADERS } from '../../shared/wire/protocol.ts';
import { type BenchHooks, inTurns, quantile, round, sumOf } from '../measure.ts';
import { cpuTime_ms, processTree } from '../processes.ts';
import { publishMaskSet } from '../publication/publish.ts';
import {
  call,
  openEdge,
  promptOf,
  type Started,
  startFloor,
  startPortkey,
  startUpstream,
  type Target,
} from './edge-peers.ts';

const WARM_UP = 500;
/** Requests to one target, one after the other, before it is the next target's turn. */
const TURN = 25;
const CLIENTS = 16;
const THROUGHPUT_TURNS = 5;
const THROUGHPUT_TURN_ms = 2_000;

type EdgeBench = {
  readonly bench: 'edge';
  readonly stream: boolean;
  readonly requests: number;
  /** Portkey's package and version; null when it is not installed, and with streams: 1.15.2 answers them with 500. */
  readonly peer: string | null;
  readonly direct: Latency;
  readonly floor: Latency & Added;
  readonly edge: Latency & Added;
  /** The same edge, through the proxy of `npm start`, which reports clients' hang-ups. */
  readonly edgeBehindDoor: Latency & Added;
  readonly portkey: (Latency & Added) | null;
};
type Latency = {
  readonly median_ms: number;
  readonly p99_ms: number;
  readonly requestsPerSecond: number;
  /** CPU time a request of the target's processes, with {@link CLIENTS} at a time; null where unknown. */
  readonly cpu_ms: number | null;
};
/** A target's percentile minus the same percentile of direct calls. */
type Added = { readonly addedMedian_ms: number; readonly addedP99_ms: number };

type EdgeBenchOptions = BenchHooks & {
  readonly set: MaskSet;
  /** Requests to each target, one at a time; rounded up to whole turns. */
  readonly requests: number;
  readonly stream: boolean;
};

export async function benchEdge(options: EdgeBenchOptions): Promise<EdgeBench> {
  const { set, stream, say } = options;
  // Whole turns.
  const requests = TURN * Math.ceil(options.requests / TURN);
  const running: Started[] = [];
  const started = async <S extends Started>(starting: Promise<S>): Promise<S> => {
    const one = await starting;
    running.push(one);
    return one;
  };
  const folder = await mkdtemp(path.join(tmpdir(), 'bench-edge-'));
  try {
    const upstream = await started(startUpstream(set));
    await started(startFloor(upstream.url, folder));
    const edge = await started(startMaskroute(set, upstream.url, options.signal));
    const peer = stream ? null : await startPortkey(upstream.url, folder);
    if (peer !== null) running.push(peer);
    else if (!stream) say("Portkey's gateway is left out: it is not installed");
    const found = await measure([...running.map(({ target }) => target), edge.behindDoor], {
      ...options,
      requests,
    });
    const { direct } = found;
    const added = (name: string) => ({
      ...found[name]!,
      addedMedian_ms: round(found[name]!.median_ms - direct!.median_ms),
      addedP99_ms: round(found[name]!.p99_ms - direct!.p99_ms),
    });
    return {
      bench: 'edge',
      stream,
      requests,
      peer: peer?.version ?? null,
      direct: direct!,
      floor: added('floor'),
      edge: added('edge'),
      edgeBehindDoor: added('edge behind its door'),
      portkey: peer === null ? null : added('portkey'),
    };
  } finally {
    for (const { stop } of running.toReversed()) await stop();
    await rm(folder, { recursive: true, force: true, maxRetries: 5 });
  }
}

async function startMaskroute(
  set: MaskSet,
  upstream: string,
  signal: AbortSignal | undefined,
): Promise<Started & { readonly behindDoor: Target }> {
  const edge = await openEdge(upstream, signal);
  const { stop } = edge;
  try {
    await publishMaskSet(edge.client, set, { tenant: '', activate: true });
    const target = (name: string, origin: string): Target => ({
      name,
      url: `${origin}/v1/chat/completions`,
      headers: { authorization: `Bearer ${edge.apiKey}` },
      pids: processTree(edge.pid),
    });
    return {
      target: target('edge', edge.workerUrl),
      behindDoor: target('edge behind its door', edge.url.replace('localhost', '127.0.0.1')),
      stop,
    };
  } catch (error) {
    await stop();
    throw error;
  }
}

type Ask = (target: Target) => Promise<number>;

async function measure(
  targets: readonly Target[],
  { set, requests, stream, say, signal }: EdgeBenchOptions,
): Promise<Record<string, Latency>> {
  const agents = new Map(
    targets.map(({ name }) => [name, new Agent({ keepAlive: true, maxSockets: CLIENTS })]),
  );
  let count = 0;
  const ask: Ask = (target) =>
    timed(agents.get(target.name)!, target, bodyOf(set.model.name, count++, stream));
  await inTurns(targets, WARM_UP / TURN, (target) => oneByOne(target, ask), signal);
  const times = await inTurns(targets, requests / TURN, (target) => oneByOne(target, ask), signal);
  const loads = await inTurns(targets, THROUGHPUT_TURNS, (target) => throughput(target, ask), signal);
  for (const agent of agents.values()) agent.destroy();
  return Object.fromEntries(
    targets.map(({ name }) => {
      const latency = latencyOf(times.get(name)!.flat(), loads.get(name)!);
      const { median_ms, p99_ms, requestsPerSecond, cpu_ms } = latency;
      const work = cpu_ms === null ? '' : `, ${cpu_ms} ms of CPU each`;
      say(`${name}: median ${median_ms} ms, p99 ${p99_ms} ms, ${requestsPerSecond} requests/s${work}`);
      return [name, latency];
    }),
  );
}

/** The throughput is the best turn's; the CPU time is the mean over all turns. */
function latencyOf(times: readonly number[], loads: readonly Load[]): Latency {
  const cpu_ms = loads.some((load) => load.cpu_ms === null)
    ? null
    : round(sumOf(loads.map((load) => load.cpu_ms!)) / sumOf(loads.map(({ done }) => done)));
  return {
    median_ms: round(quantile(times, 0.5)),
    p99_ms: round(quantile(times, 0.99)),
    requestsPerSecond: Math.round(Math.max(...loads.map(({ perSecond }) => perSecond))),
    cpu_ms,
  };
}

/** Milliseconds of {@link TURN} requests, one after the other. */
async function oneByOne(target: Target, ask: Ask): Promise<number[]> {
  const times: number[] = [];
  while (times.length < TURN) times.push(await ask(target));
  return times;
}

type Load = { readonly perSecond: number; readonly done: number; readonly cpu_ms: number | null };

/** Requests of {@link CLIENTS} clients for one turn. */
async function throughput(target: Target, ask: Ask): Promise<Load> {
  const start_ms = performance.now();
  const before_ms = cpuTime_ms(target.pids);
  let done = 0;
  const client = async () => {
    while (performance.now() - start_ms < THROUGHPUT_TURN_ms) {
      await ask(target);
      done++;
    }
  };
  await Promise.all(Array.from({ length: CLIENTS }, client));
  const after_ms = cpuTime_ms(target.pids);
  return {
    perSecond: (1000 * done) / (performance.now() - start_ms),
    done,
    cpu_ms: before_ms === null || after_ms === null ? null : after_ms - before_ms,
  };
}

const bodyOf = (model: string, index: number, stream: boolean): string =>
  JSON.stringify({ model, stream, max_tokens: 32, messages: [{ role: 'user', content: promptOf(index) }] });

/** Milliseconds from sending to the last byte. @throws Error when refused, or when the edge did not route the request. */
async function timed(agent: Agent, { name, url, headers: own }: Target, body: string): Promise<number> {
  const headers = { 'content-type': 'application/json', ...own };
  const answer = await call(agent, url, { method: 'POST', headers, body, again: true });
  if (answer.status !== 200 || !answer.text.includes('chatcmpl-')) {
    throw new Error(`${name} answered ${answer.status}: ${answer.text.slice(0, 300)}`);
  }
  if (name.startsWith('edge') && !/^\d+$/.test(String(answer.headers[HEADERS.cluster]))) {
    throw new Error(`the edge did not route: ${answer.headers[HEADERS.fallback]}`);
  }
  return answer.to_ms - answer.from_ms;
}
