/**
 * The edge on this machine: the worker bundled as it is deployed, in real workerd with a D1 on disk. What the platform
 * does around a worker is done here: it wakes it every minute, tells it of clients that are gone, and lets
 * its counting end (`drainable.ts`).
 */
import { once } from 'node:events';
import { readFile } from 'node:fs/promises';
import { connect, createServer, type Server, type Socket } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { convertV4MiniflareOptions, Log, LogLevel, Miniflare } from 'miniflare';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { DRAIN_CRON } from './drainable.ts';
import { bundleEdge, DOOR, type EdgeConfig, readEdgeConfig } from './edge-bundle.ts';
import { applyMigrations } from './local-database.ts';

export type EdgeOptions = {
  readonly projectFolder: string;
  /** The local D1 and caches; undefined keeps them in memory. */
  readonly stateFolder: string | undefined;
  /** 0 picks a free one. */
  readonly port: number;
  /** Beside what wrangler.toml declares: `BACKEND_URL` and the secrets. */
  readonly bindings: Record<string, string>;
  /** A module whose default export takes the worker and gives another in its place, for trying out what a bad day brings. */
  readonly around?: string;
};

export type Edge = {
  readonly url: string;
  /** workerd's own socket, past the door: nobody there notices a client that hangs up. */
  readonly workerUrl: string;
  /** Lets what is under way end, and what was told of it be counted. */
  readonly close: () => Promise<void>;
};

/**
 * The young generation begins at 16 MB instead of 1: with what one request leaves it fills every few thousand requests
 * rather than every few hundred, and the slowest one in a hundred, which waits for a collection, takes half as long.
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
    throw new MaskrouteError('port_in_use', `Port ${options.port} is in use.`, { cause: error });
  });
  // By number: whoever listens at `localhost` in the other family of addresses is not the edge.
  const bindings = { EDGE_URL: `http://127.0.0.1:${front.port}`, ...options.bindings };
  const miniflare = new Miniflare(miniflareOptions(config, script, network, { ...options, bindings }));
  try {
    await miniflare.ready;
    const port = Number((await miniflare.unsafeGetDirectURL(config.worker.name, DOOR)).port);
    const database = await miniflare.getD1Database(config.database.binding);
    await applyMigrations(database, config.database.migrationsFolder);
    front.leadTo(port);
    const waking = config.wakesEveryMinute ? setInterval(() => wake(miniflare), 60_000) : undefined;
    return {
      url: `http://localhost:${front.port}`,
      workerUrl: `http://127.0.0.1:${port}`,
      async close() {
        clearInterval(waking);
        await closeEdge(front, miniflare);
      },
    };
  } catch (error) {
    await front.close(0);
    await miniflare.dispose().catch(() => undefined);
    throw error;
  }
}

/** What the platform's cron trigger does; the worker logs its own failures. */
async function wake(miniflare: Miniflare): Promise<void> {
  try {
    const worker = await miniflare.getWorker();
    await worker.scheduled({ cron: '* * * * *' });
  } catch (error) {
    console.error(`the edge's scheduled work failed: ${error}`);
  }
}

/** How long answers that are under way may go on after a stop, where nobody has ended them before. */
const ANSWERS_END_ms = 5_000;
/** Longer than counting that failed takes to be tried again. */
const DRAIN_ms = 45_000;

async function closeEdge(front: Front, miniflare: Miniflare): Promise<void> {
  await front.close(ANSWERS_END_ms);
  const work = miniflare.getWorker().then((worker) => worker.scheduled({ cron: DRAIN_CRON }));
  const late = sleep(DRAIN_ms, 'late' as const, { ref: false });
  const found = await Promise.race([work.catch((error: unknown) => `${error}`), late]);
  if (typeof found === 'string')
    console.error(`the edge ends, and some of its usage is not counted: ${found}`);
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
    // What the worker logs is for people who look into it; standard output may be for a program.
    handleStructuredLogs: ({ message }) => console.error(message),
    // No made-up place: without it every local request would seem to come from one city.
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
 * How the edge on this machine reaches backends: through the binding that a deployed one has for a private network, so
 * that nothing is in between. Behind `fetch` Miniflare puts a worker of its own (image resizing, a header with the zone's
 * name), which no backend needs, and which costs as much as all that ours does.
 */

/** The binding's name in the worker, see `workers/env.ts`. */
const BACKEND_NETWORK = 'BACKEND_NETWORK';

/** Every address, over http and https; trusted is whom browsers trust, and whom `NODE_EXTRA_CA_CERTS` names. */
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

/** None when the file can't be read, as with Node itself, which warns of it. */
async function extraCertificates(): Promise<string[]> {
  const file = process.env.NODE_EXTRA_CA_CERTS;
  if (file === undefined) return [];
  const text = await readFile(file, 'utf8').catch(() => '');
  return text.match(CERTIFICATE) ?? [];
}

/*
 * A door in front of local workerd that tells it when a client is gone.
 *
 * A client that closes its connection while it waits sends a FIN. workerd can't tell that from a client that
 * is merely done sending, so until it writes the next byte it goes on, and so does the engine behind it.
 * A reset it notices at once. Deployed, Cloudflare's own front does this; here it is a pipe that turns the
 * one into the other, as nginx does. Bytes pass through unread.
 */

type Front = {
  readonly port: number;
  /** From now on clients are connected to this port; before, they are turned away. */
  leadTo(port: number): void;
  /** Lets nobody in any more. What is under way goes on; who is not done after `limit_ms` is hung up on. */
  close(limit_ms: number): Promise<void>;
};

/**
 * Listens on the loopback interface at `port` (0 picks a free one). It opens before the worker starts, since the worker
 * is told its address. Rejects with the system's error when the port is taken.
 */
async function openFront(port: number): Promise<Front> {
  let target: number | undefined;
  /** Of every client that is there, its other end. */
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
      // Nothing more comes in, as far as workerd knows: it sends what it has to send, and closes.
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
