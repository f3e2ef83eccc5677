/**
 * `bench edge`: what the edge adds to calling its upstream directly, against what Portkey's gateway adds, in the same
 * run, in interleaved rounds, with the same upstream and prompts. The edge authenticates, embeds, routes and counts
 * every request, in workerd; it is asked at its own socket, as Cloudflare would, and once more through the development
 * runner's door, as `npm start` has it. Portkey's gateway passes a request on, and so does the floor, a bare worker.
 */
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { Agent, request } from 'node:http';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import type { MaskSet } from '../../shared/mask/mask-set.ts';
import { HEADERS } from '../../shared/wire/protocol.ts';
import { startChild } from '../dev/children.ts';
import type { EdgeOptions } from '../dev/local-edge.ts';
import { ensureApiKey } from '../dev/seed.ts';
import { round } from '../measure.ts';
import { createAdminClient } from '../publication/admin-client.ts';
import { publishMaskSet } from '../publication/publish.ts';
import { type Started, startFloor, startPortkey, startUpstream, type Target } from './edge-peers.ts';
import { cpuTime_ms, processTree } from './process-cpu.ts';

const PROJECT_FOLDER = fileURLToPath(new URL('../..', import.meta.url));
const KEY = 'key-of-this-bench-0123456789abcdef';
const WARM_UP = 500;
/** One after the other in a turn, then it is the next one's turn. */
const TURN = 25;
const CLIENTS = 16;
const THROUGHPUT_TURNS = 5;
const THROUGHPUT_TURN_ms = 2_000;
const STOP_ms = 5_000;

export type EdgeBench = {
  readonly bench: 'edge';
  readonly stream: boolean;
  readonly requests: number;
  /** The peer's package and version; null with streams, which 1.15.2 answers with 500 under Node 20 and 24. */
  readonly peer: string | null;
  readonly direct: Latency;
  readonly floor: Latency & Added;
  readonly edge: Latency & Added;
  /** The same edge, through the door that tells it of clients that hang up. */
  readonly edgeBehindDoor: Latency & Added;
  readonly portkey: (Latency & Added) | null;
};
type Latency = {
  readonly median_ms: number;
  readonly p99_ms: number;
  readonly requestsPerSecond: number;
  /** Of all processes that answer, a request, with {@link CLIENTS} at a time; null where it is not known. */
  readonly cpu_ms: number | null;
};
/** Over calling the upstream directly, percentile by percentile. */
type Added = { readonly addedMedian_ms: number; readonly addedP99_ms: number };

export type EdgeBenchOptions = {
  readonly set: MaskSet;
  /** Of each target, one at a time. */
  readonly requests: number;
  readonly stream: boolean;
  readonly say: (line: string) => void;
};

export async function benchEdge(options: EdgeBenchOptions): Promise<EdgeBench> {
  const { set, requests, stream } = options;
  const running: Started[] = [];
  const started = async <S extends Started>(starting: Promise<S>): Promise<S> => {
    const one = await starting;
    running.push(one);
    return one;
  };
  try {
    const upstream = await started(startUpstream(set));
    await started(startFloor(upstream.url));
    const edge = await started(startMaskroute(set, upstream.url));
    const peer = stream ? null : await started(startPortkey(upstream.url, KEY));
    const found = await measure([...running.map(({ target }) => target), edge.behindDoor], options);
    const { direct } = found;
    const added = (name: string) => ({
      ...found[name]!,
      addedMedian_ms: round(found[name]!.median_ms - direct!.median_ms),
      addedP99_ms: round(found[name]!.p99_ms - direct!.p99_ms),
    });
    return {
      ...{ bench: 'edge', stream, requests, peer: peer?.version ?? null },
      direct: direct!,
      floor: added('floor'),
      edge: added('edge'),
      edgeBehindDoor: added('edge behind its door'),
      portkey: peer === null ? null : added('portkey'),
    };
  } finally {
    for (const { stop } of running.toReversed()) await stop();
  }
}

/** As `npm start` runs it: in a process of its own, so that it shares no event loop with the clients. */
async function startMaskroute(
  set: MaskSet,
  upstream: string,
): Promise<Started & { readonly behindDoor: Target }> {
  const folder = await mkdtemp(path.join(tmpdir(), 'bench-edge-'));
  const edge = await startChild<EdgeOptions>({
    name: 'edge',
    entry: new URL('../dev/part-process.ts', import.meta.url),
    config: {
      projectFolder: PROJECT_FOLDER,
      stateFolder: path.join(folder, 'state'),
      port: 0,
      // No request is run again in the background to be compared: the peer does not do that either.
      bindings: { BACKEND_URL: upstream, BACKEND_KEY: KEY, ADMIN_KEY: KEY, COMPARISON_SHARE: '0' },
    },
    logFile: path.join(folder, 'edge.log'),
  });
  const stop = async () => {
    await edge.stop(STOP_ms);
    await rm(folder, { recursive: true, force: true });
  };
  try {
    const client = createAdminClient(edge.url, KEY);
    const apiKey = await ensureApiKey(client, undefined);
    await publishMaskSet(client, set, { tenant: '', activate: true });
    const target = (name: string, origin: string): Target => ({
      ...{ name, url: `${origin}/v1/chat/completions` },
      headers: { authorization: `Bearer ${apiKey}` },
      pids: processTree(edge.pid),
    });
    return {
      target: target('edge', edge.workerUrl!),
      behindDoor: target('edge behind its door', edge.url.replace('localhost', '127.0.0.1')),
      stop,
    };
  } catch (error) {
    await stop();
    throw error;
  }
}

async function measure(
  targets: readonly Target[],
  { set, requests, stream, say }: EdgeBenchOptions,
): Promise<Record<string, Latency>> {
  const agents = new Map(
    targets.map(({ name }) => [name, new Agent({ keepAlive: true, maxSockets: CLIENTS })]),
  );
  let count = 0;
  const ask = (target: Target) =>
    timed(agents.get(target.name)!, target, bodyOf(set.model.name, count++, stream));

  for (const target of targets) for (let index = 0; index < WARM_UP; index++) await ask(target);
  const times = new Map<string, number[]>(targets.map(({ name }) => [name, []]));
  for (let turn = 0; turn * TURN < requests; turn++) {
    for (const target of turn % 2 === 0 ? targets : targets.toReversed()) {
      for (let index = 0; index < TURN; index++) times.get(target.name)!.push(await ask(target));
    }
  }
  const loads = new Map<string, Load[]>(targets.map(({ name }) => [name, []]));
  for (let turn = 0; turn < THROUGHPUT_TURNS; turn++) {
    for (const target of turn % 2 === 0 ? targets : targets.toReversed()) {
      loads.get(target.name)!.push(await throughput(target, () => ask(target)));
    }
  }
  for (const agent of agents.values()) agent.destroy();
  return Object.fromEntries(
    targets.map(({ name }) => {
      const sorted = times.get(name)!.sort((a, b) => a - b);
      const at = (share: number) => round(sorted[Math.floor(share * sorted.length)]!);
      const turns = loads.get(name)!;
      const best = Math.round(Math.max(...turns.map(({ perSecond }) => perSecond)));
      const cpu_ms = turns.some((load) => load.cpu_ms === null)
        ? null
        : round(sum(turns, (load) => load.cpu_ms!) / sum(turns, ({ done }) => done));
      const latency = { median_ms: at(0.5), p99_ms: at(0.99), requestsPerSecond: best, cpu_ms };
      const work = cpu_ms === null ? '' : `, ${cpu_ms} ms of CPU each`;
      say(
        `${name}: median ${latency.median_ms} ms, p99 ${latency.p99_ms} ms, ${best} requests a second${work}`,
      );
      return [name, latency];
    }),
  );
}

type Load = { readonly perSecond: number; readonly done: number; readonly cpu_ms: number | null };

const sum = <T>(list: readonly T[], figure: (one: T) => number): number =>
  list.reduce((total, one) => total + figure(one), 0);

/** With {@link CLIENTS} at a time. */
async function throughput({ pids }: Target, ask: () => Promise<unknown>): Promise<Load> {
  const start_ms = performance.now();
  const before_ms = cpuTime_ms(pids);
  let done = 0;
  const client = async () => {
    while (performance.now() - start_ms < THROUGHPUT_TURN_ms) {
      await ask();
      done++;
    }
  };
  await Promise.all(Array.from({ length: CLIENTS }, client));
  const after_ms = cpuTime_ms(pids);
  return {
    perSecond: (1000 * done) / (performance.now() - start_ms),
    done,
    cpu_ms: before_ms === null || after_ms === null ? null : after_ms - before_ms,
  };
}

/** About 60 tokens; the number changes from request to request, so that nothing can be looked up. */
const bodyOf = (model: string, index: number, stream: boolean): string =>
  JSON.stringify({
    model,
    stream,
    max_tokens: 32,
    messages: [
      {
        role: 'user',
        content:
          `A train leaves the station at nine in the morning and travels at ${100 + (index % 900)} kilometres an hour. ` +
          'A second train follows half an hour later on the same track and is twenty kilometres an hour faster. ' +
          'How long does it take until the second train has caught up with the first one? Please explain every step.',
      },
    ],
  });

/** From sending to the last byte. @throws Error for an answer that is none, or that the edge did not route. */
async function timed(agent: Agent, target: Target, body: string): Promise<number> {
  const { name, url, headers } = target;
  const start_ms = performance.now();
  const outgoing = request(url, {
    agent,
    method: 'POST',
    headers: { 'content-type': 'application/json', ...headers },
  });
  outgoing.end(body);
  const [response] = await once(outgoing, 'response').catch((error: NodeJS.ErrnoException) => {
    // The server closed a kept connection just then, as idle: the request never reached it.
    if (outgoing.reusedSocket && error.code === 'ECONNRESET') return [undefined];
    throw error;
  });
  if (response === undefined) return await timed(agent, target, body);
  let text = '';
  for await (const chunk of response) text += chunk;
  const took_ms = performance.now() - start_ms;
  if (response.statusCode !== 200 || !text.includes('chatcmpl-')) {
    throw new Error(`${name} answered ${response.statusCode}: ${text.slice(0, 300)}`);
  }
  if (name.startsWith('edge') && !/^\d+$/.test(response.headers[HEADERS.cluster] ?? '')) {
    throw new Error(`the edge did not route: ${response.headers[HEADERS.fallback]}`);
  }
  return took_ms;
}
