/**
 * `bench edge`: what the edge adds to calling its upstream directly, against what Portkey's gateway adds, in the same
 * run, in interleaved rounds, with the same upstream and prompts. The edge authenticates, embeds, routes and counts
 * every request, in workerd, with the development runner's door in front of it; Portkey's gateway passes it on.
 */
import { type ChildProcess, fork, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { Agent, request } from 'node:http';
import { createRequire } from 'node:module';
import { type AddressInfo, createServer } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import type { MaskSet } from '../../shared/mask-set.ts';
import { HEADERS } from '../../shared/protocol.ts';
import { startChild } from '../dev/child.ts';
import type { EdgeOptions } from '../dev/edge.ts';
import { ensureApiKey } from '../dev/seed.ts';
import { round } from '../measure.ts';
import { createAdminClient } from '../publication/admin-client.ts';
import { publishMaskSet } from '../publication/publish.ts';

const PROJECT_FOLDER = fileURLToPath(new URL('../..', import.meta.url));
const KEY = 'key-of-this-bench-0123456789abcdef';
const WARM_UP = 200;
/** One after the other in a turn, then it is the next one's turn. */
const TURN = 25;
const CLIENTS = 16;
const THROUGHPUT_TURNS = 5;
const THROUGHPUT_TURN_ms = 2_000;
const PEER_READY_ms = 30_000;
const STOP_ms = 5_000;

type Target = { readonly name: string; readonly url: string; readonly headers: Record<string, string> };

export type EdgeBench = {
  readonly bench: 'edge';
  readonly stream: boolean;
  readonly requests: number;
  /** The peer's package and version; null with streams, which 1.15.2 answers with 500 under Node 24. */
  readonly peer: string | null;
  readonly direct: Latency;
  readonly edge: Latency & Added;
  readonly portkey: (Latency & Added) | null;
};
type Latency = { readonly median_ms: number; readonly p99_ms: number; readonly requestsPerSecond: number };
/** Over calling the upstream directly, percentile by percentile. */
type Added = { readonly addedMedian_ms: number; readonly addedP99_ms: number };

export type EdgeBenchOptions = {
  readonly set: MaskSet;
  /** Of each target, one at a time. */
  readonly requests: number;
  readonly stream: boolean;
  readonly say: (line: string) => void;
};

export async function benchEdge({ set, requests, stream, say }: EdgeBenchOptions): Promise<EdgeBench> {
  const children: ChildProcess[] = [];
  const upstream = await startUpstream(set, children);
  const folder = await mkdtemp(path.join(tmpdir(), 'bench-edge-'));
  // As `npm start` runs it: in a process of its own, so that it shares no event loop with the clients.
  const edge = await startChild<EdgeOptions>({
    name: 'edge',
    entry: new URL('../dev/edge-process.ts', import.meta.url),
    config: {
      projectFolder: PROJECT_FOLDER,
      stateFolder: path.join(folder, 'state'),
      port: 0,
      // No request is run again in the background to be compared: the peer does not do that either.
      bindings: { BACKEND_URL: upstream, BACKEND_KEY: KEY, ADMIN_KEY: KEY, COMPARISON_SHARE: '0' },
    },
    logFile: path.join(folder, 'edge.log'),
  });
  try {
    const client = createAdminClient(edge.url, KEY);
    const apiKey = await ensureApiKey(client, undefined);
    await publishMaskSet(client, set, { tenant: '', activate: true });
    const peer = stream ? null : await startPortkey(upstream, children);
    const targets: Target[] = [
      { name: 'direct', url: `${upstream}/v1/chat/completions`, headers: {} },
      {
        name: 'edge',
        url: `${edge.url.replace('localhost', '127.0.0.1')}/v1/chat/completions`,
        headers: { authorization: `Bearer ${apiKey}` },
      },
      ...(peer === null
        ? []
        : [{ name: 'portkey', url: `${peer.url}/v1/chat/completions`, headers: peer.headers }]),
    ];
    const found = await measure(targets, { set, requests, stream, say });
    const added = (name: string) => ({
      ...found[name]!,
      addedMedian_ms: round(found[name]!.median_ms - found.direct!.median_ms),
      addedP99_ms: round(found[name]!.p99_ms - found.direct!.p99_ms),
    });
    return {
      ...{ bench: 'edge', stream, requests, peer: peer?.name ?? null },
      direct: found.direct!,
      edge: added('edge'),
      portkey: peer === null ? null : added('portkey'),
    };
  } finally {
    await edge.stop(STOP_ms);
    await rm(folder, { recursive: true, force: true });
    for (const child of children) child.kill('SIGKILL');
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
  const rates = new Map<string, number[]>(targets.map(({ name }) => [name, []]));
  for (let turn = 0; turn < THROUGHPUT_TURNS; turn++) {
    for (const target of turn % 2 === 0 ? targets : targets.toReversed()) {
      rates.get(target.name)!.push(await throughput(() => ask(target)));
    }
  }
  for (const agent of agents.values()) agent.destroy();
  return Object.fromEntries(
    targets.map(({ name }) => {
      const sorted = times.get(name)!.sort((a, b) => a - b);
      const at = (share: number) => round(sorted[Math.floor(share * sorted.length)]!);
      const best = Math.round(Math.max(...rates.get(name)!));
      const latency = { median_ms: at(0.5), p99_ms: at(0.99), requestsPerSecond: best };
      say(`${name}: median ${latency.median_ms} ms, p99 ${latency.p99_ms} ms, ${best} requests a second`);
      return [name, latency];
    }),
  );
}

/** Requests a second, with {@link CLIENTS} at a time. */
async function throughput(ask: () => Promise<unknown>): Promise<number> {
  const start_ms = performance.now();
  let done = 0;
  const client = async () => {
    while (performance.now() - start_ms < THROUGHPUT_TURN_ms) {
      await ask();
      done++;
    }
  };
  await Promise.all(Array.from({ length: CLIENTS }, client));
  return (1000 * done) / (performance.now() - start_ms);
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
async function timed(agent: Agent, { name, url, headers }: Target, body: string): Promise<number> {
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
  if (response === undefined) return await timed(agent, { name, url, headers }, body);
  let text = '';
  for await (const chunk of response) text += chunk;
  const took_ms = performance.now() - start_ms;
  if (response.statusCode !== 200 || !text.includes('chatcmpl-')) {
    throw new Error(`${name} answered ${response.statusCode}: ${text.slice(0, 300)}`);
  }
  if (name === 'edge' && !/^\d+$/.test(response.headers[HEADERS.cluster] ?? '')) {
    throw new Error(`the edge did not route: ${response.headers[HEADERS.fallback]}`);
  }
  return took_ms;
}

async function startUpstream(set: MaskSet, children: ChildProcess[]): Promise<string> {
  const child = fork(new URL('./edge-upstream.ts', import.meta.url));
  children.push(child);
  const answered = once(child, 'message');
  child.send({ model: set.model, surrogates: set.surrogates });
  const [{ url }] = (await answered) as [{ url: string }];
  return url;
}

/** Portkey's own server, with the upstream as an OpenAI-compatible host. */
async function startPortkey(upstream: string, children: ChildProcess[]) {
  const require = createRequire(import.meta.url);
  const script = require.resolve('@portkey-ai/gateway/build/start-server.js');
  const { name, version } = require(path.join(path.dirname(script), '../package.json'));
  const port = await freePort();
  const child = spawn(process.execPath, [script, `--port=${port}`, '--headless'], { stdio: 'ignore' });
  children.push(child);
  const url = `http://127.0.0.1:${port}`;
  const deadline_ms = performance.now() + PEER_READY_ms;
  while (!(await answers(url))) {
    if (performance.now() > deadline_ms) throw new Error(`${name} does not start`);
    await sleep(100);
  }
  const headers = {
    'x-portkey-provider': 'openai',
    'x-portkey-custom-host': `${upstream}/v1`,
    authorization: `Bearer ${KEY}`,
  };
  return { name: `${name}@${version}`, url, headers };
}

/** Free a moment ago, which is as good as it gets for a program that only takes a number. */
async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address() as AddressInfo;
  await new Promise((resolve) => server.close(resolve));
  return port;
}

const answers = (url: string): Promise<boolean> =>
  fetch(url).then(
    () => true,
    () => false,
  );
