/** The edge on this machine: the worker bundled as it is deployed, in real workerd with a D1 on disk. */

import { execFile } from 'node:child_process';
import { readFile } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';
import { build } from 'esbuild';
import { convertV4MiniflareOptions, Log, LogLevel, Miniflare } from 'miniflare';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { type EdgeConfig, readEdgeConfig } from './edge-config.ts';
import { openFront } from './front.ts';
import { applyMigrations } from './migrations.ts';

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

/* Runs the build command of wrangler.toml, as `wrangler deploy` does before it bundles. */

const OUTPUT_CHARS_MAX = 2000;
const LIMIT_ms = 60_000;

/** The command finds this very Node first. @throws MaskrouteError `start_failed` with what the command said. */
async function runBuild(command: string, projectFolder: string): Promise<void> {
  const PATH = [path.dirname(process.execPath), process.env.PATH].join(path.delimiter);
  try {
    await promisify(execFile)('sh', ['-c', command], {
      cwd: projectFolder,
      env: { ...process.env, PATH },
      timeout: LIMIT_ms,
    });
  } catch (error) {
    const { stderr, message } = error as Error & { stderr?: string };
    const reason = (stderr || message).slice(-OUTPUT_CHARS_MAX);
    throw new MaskrouteError('start_failed', `"${command}" failed: ${reason}`, { cause: error });
  }
}

export type EdgeOptions = {
  readonly projectFolder: string;
  /** The local D1 and caches; undefined keeps them in memory. */
  readonly stateFolder: string | undefined;
  /** 0 picks a free one. */
  readonly port: number;
  /** Beside what wrangler.toml declares: `BACKEND_URL` and the secrets. */
  readonly bindings: Record<string, string>;
};

export type Edge = {
  readonly url: string;
  /** workerd's own socket, past the door: nobody there notices a client that hangs up. */
  readonly workerUrl: string;
  /** Lets what is under way end, and what was told of it be counted. */
  readonly close: () => Promise<void>;
};

/** Listens on the loopback interface only. @throws MaskrouteError `port_in_use`, `start_failed`. */
export async function startEdge(options: EdgeOptions): Promise<Edge> {
  const config = await readEdgeConfig(options.projectFolder);
  await runBuild(config.buildCommand, options.projectFolder);
  const worker = await bundleWorker(config);
  const network = await backendNetwork();
  process.env.MINIFLARE_WORKERD_V8_FLAGS ??= V8_FLAGS;
  const front = await openFront(options.port).catch((error: NodeJS.ErrnoException) => {
    if (error.code !== 'EADDRINUSE') throw error;
    throw new MaskrouteError('port_in_use', `Port ${options.port} is in use.`, { cause: error });
  });
  // By number: whoever listens at `localhost` in the other family of addresses is not the edge.
  const bindings = { EDGE_URL: `http://127.0.0.1:${front.port}`, ...options.bindings };
  const miniflare = new Miniflare(miniflareOptions(config, worker, network, { ...options, bindings }));
  try {
    await miniflare.ready;
    const port = Number((await miniflare.unsafeGetDirectURL(config.name, DOOR)).port);
    const database = await miniflare.getD1Database(config.database.binding);
    await applyMigrations(database, config.database.migrationsFolder);
    front.leadTo(port);
    const cron = config.crons.length === 0 ? undefined : setInterval(() => wake(miniflare), CRON_ms);
    return {
      url: `http://localhost:${front.port}`,
      workerUrl: `http://127.0.0.1:${port}`,
      close: async () => {
        clearInterval(cron);
        await front.close(ANSWERS_END_ms);
        await drain(miniflare);
        await miniflare.dispose();
      },
    };
  } catch (error) {
    await front.close(0);
    await miniflare.dispose().catch(() => undefined);
    throw error;
  }
}

const CRON_ms = 60_000;

/**
 * The young generation begins at 16 MB instead of 1: with what one request leaves it fills every few thousand requests
 * rather than every few hundred, and the slowest one in a hundred, which waits for a collection, takes half as long.
 */
const V8_FLAGS = '--min-semi-space-size=16 --max-semi-space-size=32';

/**
 * Miniflare puts three workers of its own before the default entrypoint (pages about errors, assets that come before the
 * worker), which no request here needs, and which cost as much as all that ours does: a socket of an entrypoint with a
 * name leads past them.
 */
const DOOR = 'door';

/** How long answers that are under way may go on after a stop, where nobody has ended them before. */
const ANSWERS_END_ms = 5_000;
/** Longer than counting that failed takes to be tried again. */
const DRAIN_ms = 45_000;
const DRAIN_CRON = 'drain';
const DRAIN_POLL_ms = 20;

/**
 * Miniflare keeps a queue in memory, so what waits in it is lost with the process, and what waits for it in the worker,
 * too. It is therefore counted sooner than on the platform, whose queues last: what a kill takes along is the last
 * second of usage ({@link drain} leaves nothing to a stop).
 */
const QUEUE_WAIT_MAX_s = 0.5;

/**
 * What the platform does by itself: work that is held goes on, and so does what is in a queue. Here that ends with the
 * process, so the worker that is told to drain says when none is left: what was held has ended, and then a mark that
 * goes through each queue has come out.
 */
const mainModule = (queues: readonly string[]): string => `
import worker from './worker.js';
export * from './worker.js';

let working = 0;
const marks = new Set();
const work_ = async (work) => {
  working++;
  try {
    return await work;
  } finally {
    working--;
  }
};
const held = (context) => ({ waitUntil: (work) => context.waitUntil(work_(work)) });
const until = async (isSo) => {
  while (!isSo()) await new Promise((resolve) => setTimeout(resolve, ${DRAIN_POLL_ms}));
};

const local = {
  fetch: (request, env, context) => worker.fetch(request, env, held(context)),
  async queue(batch, env, context) {
    let isRepeated = false;
    const retryAll = (options) => {
      isRepeated = true;
      batch.retryAll(options);
    };
    const messages = batch.messages.filter(({ body }) => !marks.has(body));
    await work_(worker.queue({ queue: batch.queue, messages, retryAll }, env, held(context)));
    // A delivery that failed comes again, and the mark with it.
    if (!isRepeated) for (const { body } of batch.messages) marks.delete(body);
  },
  async scheduled(event, env, context) {
    if (event.cron !== '${DRAIN_CRON}') return await worker.scheduled?.(event, env, held(context));
    await until(() => working === 0);
    for (const queue of ${JSON.stringify(queues)}) {
      const mark = crypto.randomUUID();
      marks.add(mark);
      await env[queue].send(mark);
    }
    await until(() => marks.size === 0 && working === 0);
  },
};
export { local as default, local as ${DOOR} };
`;

async function drain(miniflare: Miniflare): Promise<void> {
  const work = miniflare.getWorker().then((worker) => worker.scheduled({ cron: DRAIN_CRON }));
  const late = sleep(DRAIN_ms, 'late' as const, { ref: false });
  const found = await Promise.race([work.catch((error: unknown) => `${error}`), late]);
  if (typeof found === 'string')
    console.error(`the edge ends, and some of its usage is not counted: ${found}`);
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

/** One ES module, as `wrangler deploy` would send it. */
async function bundleWorker(config: EdgeConfig): Promise<string> {
  const { outputFiles } = await build({
    entryPoints: [config.entry],
    bundle: true,
    write: false,
    format: 'esm',
    target: 'es2024',
    platform: 'neutral',
    mainFields: ['module', 'main'],
    conditions: ['workerd', 'worker', 'browser'],
    external: ['cloudflare:*', 'node:*'],
    logLevel: 'silent',
  });
  return outputFiles[0]!.text;
}

const miniflareOptions = (
  config: EdgeConfig,
  worker: string,
  network: Awaited<ReturnType<typeof backendNetwork>>,
  options: EdgeOptions,
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
    ...(options.stateFolder === undefined ? {} : { resourcePersistencePath: options.stateFolder }),
    workers: [
      {
        name: config.name,
        modules: [
          { type: 'ESModule', path: 'main.js', contents: mainModule(Object.keys(config.queueProducers)) },
          { type: 'ESModule', path: 'worker.js', contents: worker },
        ],
        unsafeDirectSockets: [{ host: '127.0.0.1', port: 0, entrypoint: DOOR }],
        serviceBindings: { [BACKEND_NETWORK]: network },
        compatibilityDate: config.compatibilityDate,
        compatibilityFlags: config.compatibilityFlags,
        bindings: { ...config.vars, ...options.bindings },
        d1Databases: { [config.database.binding]: config.database.name },
        ...statefulBindings(config),
        assets: {
          directory: config.assets.folder,
          binding: config.assets.binding,
          run_worker_first: true,
          routerConfig: { has_user_worker: true, invoke_user_worker_ahead_of_assets: true },
        },
      },
    ],
  });

/** Bindings that hold state or count; Miniflare keeps what they hold beside D1. */
const statefulBindings = (config: EdgeConfig) => ({
  durableObjects: Object.fromEntries(
    Object.entries(config.durableObjects).map(([binding, { className }]) => [
      binding,
      { className, useSQLite: true },
    ]),
  ),
  ratelimits: Object.fromEntries(
    Object.entries(config.rateLimits).map(([binding, { namespaceId, limit, period_s }]) => [
      binding,
      { namespace_id: namespaceId, simple: { limit, period: period_s } },
    ]),
  ),
  queueProducers: { ...config.queueProducers },
  queueConsumers: Object.fromEntries(
    Object.entries(config.queueConsumers).map(([queue, entry]) => [
      queue,
      {
        ...(entry.maxBatchSize === undefined ? {} : { maxBatchSize: entry.maxBatchSize }),
        maxBatchTimeout: Math.min(entry.maxBatchTimeout_s ?? QUEUE_WAIT_MAX_s, QUEUE_WAIT_MAX_s),
        ...(entry.maxRetries === undefined ? {} : { maxRetries: entry.maxRetries }),
        ...(entry.retryDelay_s === undefined ? {} : { retryDelay: entry.retryDelay_s }),
        ...(entry.deadLetterQueue === undefined ? {} : { deadLetterQueue: entry.deadLetterQueue }),
      },
    ]),
  ),
  analyticsEngineDatasets: { ...config.analyticsDatasets },
});
