/**
 * Parts of the edge's benches: a prompt, a timed call, an edge, and the targets that `bench edge` compares it with: the
 * upstream itself, Portkey's gateway, and the floor. The floor is a worker in workerd that only forwards requests; no
 * gateway in workerd can be faster.
 */
import { fork } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { type Agent, type IncomingHttpHeaders, type IncomingMessage, request } from 'node:http';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import type { MaskSet } from '../../shared/mask/mask-set.ts';
import { startChild } from '../dev/children.ts';
import type { EdgeOptions } from '../dev/local-edge.ts';
import { ensureApiKey } from '../dev/seed.ts';
import { freePort } from '../ports.ts';
import { endChild, processTree } from '../processes.ts';
import { type AdminClient, createAdminClient } from '../publication/admin-client.ts';
import type { FloorConfig, PortkeyConfig } from './edge-peer.ts';

const PROJECT_FOLDER = fileURLToPath(new URL('../..', import.meta.url));
const KEY = 'key-of-this-bench-0123456789abcdef';

/** 60 WordPiece tokens; the number in it differs between requests, so that caches do not help. */
export const promptOf = (index: number): string =>
  `A train leaves the station at nine in the morning and travels at ${100 + (index % 900)} kilometres an hour. ` +
  'A second train follows half an hour later on the same track and is twenty kilometres an hour faster. ' +
  'How long does it take until the second train has caught up with the first one? Please explain every step.';

type Call = {
  readonly method: 'GET' | 'POST';
  readonly headers: Record<string, string>;
  readonly body: string;
  /** Retries when the server closed the idle keep-alive connection at that moment, before it read the request. */
  readonly again?: boolean;
};
type Called = {
  readonly status: number;
  readonly headers: IncomingHttpHeaders;
  readonly text: string;
  /** When it was sent, and when the last byte was there. */
  readonly from_ms: number;
  readonly to_ms: number;
};

export async function call(agent: Agent, url: string, sent: Call): Promise<Called> {
  const { method, headers, body, again = false } = sent;
  const from_ms = performance.now();
  const outgoing = request(url, { agent, method, headers });
  outgoing.end(body);
  const [response] = (await once(outgoing, 'response').catch((error: NodeJS.ErrnoException) => {
    if (again && outgoing.reusedSocket && error.code === 'ECONNRESET') return [undefined];
    throw error;
  })) as [IncomingMessage | undefined];
  if (response === undefined) return call(agent, url, sent);
  let text = '';
  for await (const chunk of response) text += chunk;
  const { statusCode: status = 0 } = response;
  return { status, headers: response.headers, text, from_ms, to_ms: performance.now() };
}

export type BenchEdge = {
  readonly url: string;
  /** workerd's own socket, without the proxy in front of it. */
  readonly workerUrl: string;
  readonly pid: number;
  readonly client: AdminClient;
  readonly apiKey: string;
  stop(): Promise<void>;
};

/**
 * An edge in a process of its own, as in `npm start`: it shares no event loop with the clients, and ends with the bench, also when
 * that is killed. `stop` kills it at once: a stop in good order waits for answers and for usage that nobody reads here.
 */
export async function openEdge(backendUrl: string, signal: AbortSignal | undefined): Promise<BenchEdge> {
  await using opening = new AsyncDisposableStack();
  const folder = await mkdtemp(path.join(tmpdir(), 'bench-edge-'));
  // The runtime may write until its kill arrives.
  opening.defer(() => rm(folder, { recursive: true, force: true, maxRetries: 5 }));
  const config: EdgeOptions = {
    projectFolder: PROJECT_FOLDER,
    stateFolder: path.join(folder, 'state'),
    port: 0,
    // No comparisons with the dense model in the background, as the peers have no such thing.
    bindings: { BACKEND_URL: backendUrl, BACKEND_KEY: KEY, ADMIN_KEY: KEY, COMPARISON_SHARE: '0' },
  };
  const entry = new URL('../dev/children.ts', import.meta.url);
  const logFile = path.join(folder, 'edge.log');
  const { url, workerUrl, pid, stop } = await startChild({ name: 'edge', entry, config, logFile }, signal);
  opening.defer(() => stop(0));
  const client = createAdminClient(url, KEY);
  const apiKey = await ensureApiKey(client, undefined);
  const opened = opening.move();
  return { url, workerUrl: workerUrl!, pid, client, apiKey, stop: () => opened.disposeAsync() };
}

const PEER_READY_ms = 30_000;

export type Target = {
  readonly name: string;
  readonly url: string;
  readonly headers: Record<string, string>;
  /** The target's processes, for their CPU time. */
  readonly pids: readonly number[];
};

/** A target that the bench started. */
export type Started = { readonly target: Target; stop(): Promise<void> };

const ENDPOINT = '/v1/chat/completions';

export async function startUpstream(set: MaskSet): Promise<Started & { readonly url: string }> {
  const child = fork(new URL('./edge-upstream.ts', import.meta.url));
  const answered = once(child, 'message');
  child.send({ model: set.model, surrogates: set.surrogates });
  const [{ url }] = (await answered) as [{ url: string }];
  const target = { name: 'direct', url: url + ENDPOINT, headers: {}, pids: [child.pid!] };
  return { url, target, stop: () => endChild(child, 'SIGKILL') };
}

/** Portkey's server with the upstream as its OpenAI-compatible host; null when not installed (`npm ci --omit=dev`). */
export async function startPortkey(
  upstream: string,
  folder: string,
): Promise<(Started & { readonly version: string }) | null> {
  const require = createRequire(import.meta.url);
  const script = resolved(require, '@portkey-ai/gateway/build/start-server.js');
  if (script === null) return null;
  const { name, version } = require(path.join(path.dirname(script), '../package.json'));
  const headers = {
    'x-portkey-provider': 'openai',
    'x-portkey-custom-host': `${upstream}/v1`,
    authorization: `Bearer ${KEY}`,
  };
  const config: PortkeyConfig = { script, port: await freePort() };
  return { version: `${name}@${version}`, ...(await startPeer('portkey', config, headers, folder)) };
}

function resolved(require: NodeJS.Require, name: string): string | null {
  try {
    return require.resolve(name);
  } catch {
    return null;
  }
}

export const startFloor = (upstream: string, folder: string): Promise<Started> =>
  startPeer<FloorConfig>('floor', { upstream: upstream + ENDPOINT, folder }, {}, folder);

async function startPeer<Config>(
  name: string,
  config: Config,
  headers: Record<string, string>,
  folder: string,
): Promise<Started> {
  const peer = await startChild<Config>({
    name,
    entry: new URL('./edge-peer.ts', import.meta.url),
    config,
    logFile: path.join(folder, `${name}.log`),
    start_ms: PEER_READY_ms,
  });
  const target = { name, url: peer.url + ENDPOINT, headers, pids: processTree(peer.pid) };
  return { target, stop: () => peer.stop(0) };
}
