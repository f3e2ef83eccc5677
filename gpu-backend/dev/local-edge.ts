/**
 * Runs the edge on this machine: the worker as it is deployed, in real workerd with a local D1. This file also does what
 * Cloudflare does around a worker: the cron trigger, noticing clients that hang up, and finishing background work at a stop
 * (`drainable.ts`).
 */
import { once } from 'node:events';
import { readFile } from 'node:fs/promises';
import { connect, createServer, type Server, type Socket } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { convertV4MiniflareOptions, Log, LogLevel, Miniflare } from 'miniflare';
import { portInUse } from '../ports.ts';
import { DRAIN_CRON } from './drainable.ts';
import { bundleEdge, DOOR, type EdgeConfig, readEdgeConfig } from './edge-bundle.ts';
import { applyMigrations } from './local-database.ts';

export type EdgeOptions = {
  readonly projectFolder: string;
  /** Of the local D1 and caches; undefined: a temporary one, which Miniflare removes at its end. */
  readonly stateFolder: string | undefined;
  /** 0 picks a free one. */
  readonly port: number;
  /** Beside what wrangler.toml declares: `BACKEND_URL` and the secrets. */
  readonly bindings: Record<string, string>;
  /** A module whose default export wraps the worker, to inject faults. */
  readonly around?: string;
};

export type Edge = {
  readonly url: string;
  /** workerd's own socket, without the proxy in front; there a client's hang-up is not noticed. */
  readonly workerUrl: string;
  /** Resolves with the reason once workerd is gone for good; a workerd that dies is first started again, within seconds. */
  readonly gone: Promise<string>;
  /** Finishes running requests and counts their usage. */
  readonly close: () => Promise<void>;
};

/**
 * V8's young generation starts at 16 MB instead of 1, so that it is collected every few thousand requests instead of every
 * few hundred. This halves the latency at p99, which is that of requests that wait for a collection.
 */
const V8_FLAGS = '--min-semi-space-size=16 --max-semi-space-size=32';

/** Listens on the loopback interface only. @throws MaskrouteError `port_in_use`, `start_failed`. */
export async function startEdge(options: EdgeOptions): Promise<Edge> {
  const config = await readEdgeConfig(options.projectFolder);
  const script = await bundleEdge(config, options);
  const network = await backendNetwork();
  process.env.MINIFLARE_WORKERD_V8_FLAGS ??= V8_FLAGS;
  const front = await openFront(options.port).catch((error: NodeJS.ErrnoException) => {
    if (error.code !== 'EADDRINUSE') throw error;
    throw portInUse(options.port, 'PORT', error);
  });
  // 127.0.0.1 and not `localhost`: that may resolve to ::1, where another program may listen.
  const bindings = { EDGE_URL: `http://127.0.0.1:${front.port}`, ...options.bindings };
  const miniflare = new Miniflare(miniflareOptions(config, script, network, { ...options, bindings }));
  try {
    await miniflare.ready;
    const port = Number((await miniflare.unsafeGetDirectURL(config.worker.name, DOOR)).port);
    const database = await miniflare.getD1Database(config.database.binding);
    await applyMigrations(database, config.database.migrationsFolder);
    front.leadTo(port);
    const waking = config.wakesEveryMinute ? setInterval(() => wake(miniflare), 60_000) : undefined;
    const { gone, unwatch } = watchRuntime(miniflare);
    return {
      url: `http://localhost:${front.port}`,
      workerUrl: `http://127.0.0.1:${port}`,
      gone,
      async close() {
        clearInterval(waking);
        unwatch();
        await closeEdge(front, miniflare);
      },
    };
  } catch (error) {
    await front.close(0);
    await miniflare.dispose().catch(() => undefined);
    throw error;
  }
}

/** Cloudflare's cron trigger; the worker logs its own failures. */
async function wake(miniflare: Miniflare): Promise<void> {
  try {
    const worker = await miniflare.getWorker();
    await worker.scheduled({ cron: '* * * * *' });
  } catch (error) {
    console.error(`the edge's scheduled work failed: ${error}`);
  }
}

const RUNTIME_LOOK_ms = 500;

/** Miniflare starts a workerd that died again, on its old ports. If that fails, only its `ready` says so. */
function watchRuntime(miniflare: Miniflare): Pick<Edge, 'gone'> & { readonly unwatch: () => void } {
  const { promise: gone, resolve } = Promise.withResolvers<string>();
  let isWatched = true;
  const look = () =>
    miniflare.ready.catch(({ message }: Error) => {
      // A stop ends Miniflare, too.
      if (isWatched) resolve(message);
    });
  const timer = setInterval(look, RUNTIME_LOOK_ms);
  const unwatch = () => {
    isWatched = false;
    clearInterval(timer);
  };
  void gone.then(unwatch);
  return { gone, unwatch };
}

/** How long running answers may continue after a stop if the backend was not drained before. */
const ANSWERS_END_ms = 5_000;
/** Longer than a failed queue delivery takes to be repeated. */
const DRAIN_ms = 45_000;

async function closeEdge(front: Front, miniflare: Miniflare): Promise<void> {
  await front.close(ANSWERS_END_ms);
  const work = miniflare.getWorker().then((worker) => worker.scheduled({ cron: DRAIN_CRON }));
  const late = sleep(DRAIN_ms, 'late' as const, { ref: false });
  const found = await Promise.race([work.catch((error: unknown) => `${error}`), late]);
  if (typeof found === 'string')
    console.error(`the edge stopped before all of its usage was counted: ${found}`);
  await miniflare.dispose();
}

const miniflareOptions = (
  { worker }: EdgeConfig,
  script: string,
  network: Awaited<ReturnType<typeof backendNetwork>>,
  { stateFolder, bindings }: EdgeOptions,
) =>
  convertV4MiniflareOptions({
    host: '127.0.0.1',
    port: 0,
    log: new Log(LogLevel.ERROR),
    logRequests: false,
    // The worker's logs go to standard error, since a program may read standard output.
    handleStructuredLogs: ({ message }) => console.error(message),
    unsafeHandleRuntimeRestart: () => console.error('workerd ended and was started again'),
    // No default location: otherwise all local requests would seem to come from one city.
    cf: {},
    ...(stateFolder === undefined ? {} : { resourcePersistencePath: stateFolder }),
    workers: [
      {
        ...worker,
        bindings: { ...worker.bindings, ...bindings },
        modules: [{ type: 'ESModule', path: 'main.js', contents: script }],
        unsafeDirectSockets: [{ host: '127.0.0.1', port: 0, entrypoint: DOOR }],
        serviceBindings: { [BACKEND_NETWORK]: network },
      },
    ],
  });

/*
 * How the local edge reaches backends: through the binding that a deployed edge uses for a private network. For the global
 * `fetch` Miniflare inserts a worker of its own (image resizing, a header with the zone's name), which costs as much as
 * ours and which no backend needs.
 */

/** The binding's name in the worker, see `workers/env.ts`. */
const BACKEND_NETWORK = 'BACKEND_NETWORK';

/** Allows all addresses, over http and https. Trusted certificates: the browsers', and those of `NODE_EXTRA_CA_CERTS`. */
async function backendNetwork() {
  return {
    network: {
      allow: ['public', 'private'],
      deny: [],
      tlsOptions: { trustBrowserCas: true, trustedCertificates: await extraCertificates() },
    },
  };
}

const CERTIFICATE = /-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----/g;

/** None if the file cannot be read; Node itself warns about that. */
async function extraCertificates(): Promise<string[]> {
  const file = process.env.NODE_EXTRA_CA_CERTS;
  if (file === undefined) return [];
  const text = await readFile(file, 'utf8').catch(() => '');
  return text.match(CERTIFICATE) ?? [];
}

/*
 * A TCP proxy in front of local workerd, so that workerd notices when a client hangs up.
 *
 * A client that closes its connection while it waits sends a FIN. workerd cannot distinguish that from a client that has
 * only finished sending, so it, and the engine, would go on until the next write. workerd does notice a reset. So this proxy
 * turns a client's FIN into a reset, as nginx does; on Cloudflare the platform does this. It does not look at the bytes.
 */

type Front = {
  readonly port: number;
  /** Sets the target; connections before that are closed at once. */
  leadTo(port: number): void;
  /** Accepts no new connections; open ones may finish, and are closed after `limit_ms`. */
  close(limit_ms: number): Promise<void>;
};

/**
 * Listens on the loopback interface at `port` (0 picks a free one). It opens before the worker, which needs its address.
 * Rejects with the system's error when the port is taken.
 */
async function openFront(port: number): Promise<Front> {
  let target: number | undefined;
  /** The connection to the worker for each client. */
  const workers = new Map<Socket, Socket>();
  const server: Server = createServer({ allowHalfOpen: true, noDelay: true }, (client) => {
    if (target === undefined) {
      client.destroy();
      return;
    }
    const worker = connect({ host: '127.0.0.1', port: target, noDelay: true });
    workers.set(client, worker);
    client.on('close', () => workers.delete(client));
    join(client, worker);
  });
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject).listen(port, '127.0.0.1', resolve);
  });
  return {
    port: (server.address() as { port: number }).port,
    leadTo(found) {
      target = found;
    },
    close: async (limit_ms) => {
      const closed = once(server, 'close');
      server.close();
      // Tells workerd that no more requests come: it finishes its responses and closes.
      for (const worker of workers.values()) worker.end();
      const late = setTimeout(() => {
        for (const client of workers.keys()) client.destroy();
      }, limit_ms);
      await closed;
      clearTimeout(late);
    },
  };
}

function join(client: Socket, worker: Socket): void {
  const hangUp = () => worker.resetAndDestroy();
  client.on('end', hangUp).on('error', hangUp).on('close', hangUp);
  worker.on('error', () => client.destroy()).on('close', () => client.destroySoon());
  client.pipe(worker, { end: false });
  worker.pipe(client);
}
