/**
 * Prepares the edge for Miniflare: converts wrangler.toml to Miniflare's options and bundles the worker into one module. An
 * unknown binding fails the start, so that the local edge never silently lacks one that the deployed edge has.
 */
import { execFile } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdir, readFile, stat } from 'node:fs/promises';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { parse } from 'smol-toml';
import { z } from 'zod';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { check } from '../../shared/wire/parse-body.ts';
import { readOwnJson, writeWhole } from '../files.ts';

const wranglerSchema = z.strictObject({
  name: z.string(),
  main: z.string(),
  compatibility_date: z.string(),
  compatibility_flags: z.array(z.string()).default([]),
  build: z.strictObject({ command: z.string() }),
  assets: z.strictObject({ directory: z.string(), binding: z.string(), run_worker_first: z.literal(true) }),
  d1_databases: z.tuple([
    z.strictObject({
      binding: z.string(),
      database_name: z.string(),
      database_id: z.string(),
      migrations_dir: z.string(),
    }),
  ]),
  durable_objects: z
    .strictObject({ bindings: z.array(z.strictObject({ name: z.string(), class_name: z.string() })) })
    .default({ bindings: [] }),
  migrations: z
    .array(z.strictObject({ tag: z.string(), new_sqlite_classes: z.array(z.string()) }))
    .default([]),
  ratelimits: z
    .array(
      z.strictObject({
        name: z.string(),
        namespace_id: z.string(),
        simple: z.strictObject({
          limit: z.int().positive(),
          period: z.union([z.literal(10), z.literal(60)]),
        }),
      }),
    )
    .default([]),
  queues: z
    .strictObject({
      producers: z.array(z.strictObject({ binding: z.string(), queue: z.string() })).default([]),
      consumers: z
        .array(
          z.strictObject({
            queue: z.string(),
            // Cloudflare's defaults.
            max_batch_size: z.int().positive().default(10),
            max_batch_timeout: z.int().min(0).default(5),
            max_retries: z.int().min(0).default(3),
            retry_delay: z.int().min(0).default(0),
            dead_letter_queue: z.string().optional(),
          }),
        )
        .default([]),
    })
    .default({ producers: [], consumers: [] }),
  analytics_engine_datasets: z
    .array(z.strictObject({ binding: z.string(), dataset: z.string() }))
    .default([]),
  /** The local edge supports a trigger every minute and no other. */
  triggers: z.strictObject({ crons: z.array(z.literal('* * * * *')) }).default({ crons: [] }),
  vars: z.record(z.string(), z.string()).default({}),
  observability: z.unknown(),
  env: z.unknown(),
});
type Wrangler = z.output<typeof wranglerSchema>;

export type EdgeConfig = {
  /** The worker's source; an absolute path, like `migrationsFolder`. */
  readonly entry: string;
  /** Builds the assets. */
  readonly buildCommand: string;
  readonly database: { readonly binding: string; readonly migrationsFolder: string };
  readonly wakesEveryMinute: boolean;
  readonly worker: ReturnType<typeof workerOptions>;
};

/** @throws MaskrouteError `start_failed` naming the entry that is wrong or not supported. */
export async function readEdgeConfig(projectFolder: string): Promise<EdgeConfig> {
  const file = path.join(projectFolder, 'wrangler.toml');
  const checked = check(wranglerSchema, parse(await readFile(file, 'utf8')), 'the file');
  if (checked.kind === 'bad') throw refused(checked.message);
  const { value: data } = checked;
  const [{ binding, migrations_dir }] = data.d1_databases;
  return {
    entry: path.resolve(projectFolder, data.main),
    buildCommand: data.build.command,
    database: { binding, migrationsFolder: path.resolve(projectFolder, migrations_dir) },
    wakesEveryMinute: data.triggers.crons.length > 0,
    worker: workerOptions(data, projectFolder),
  };
}

/** The worker's options for Miniflare. */
const workerOptions = (data: Wrangler, projectFolder: string) => ({
  name: data.name,
  compatibilityDate: data.compatibility_date,
  compatibilityFlags: data.compatibility_flags,
  bindings: data.vars,
  d1Databases: named(data.d1_databases, ({ binding, database_name }) => [binding, database_name]),
  durableObjects: durableObjects(data),
  ratelimits: named(data.ratelimits, ({ name, namespace_id, simple }) => [name, { namespace_id, simple }]),
  queueProducers: named(data.queues.producers, ({ binding, queue }) => [binding, { queueName: queue }]),
  queueConsumers: named(data.queues.consumers, (entry) => [entry.queue, consumerOptions(entry)]),
  analyticsEngineDatasets: named(data.analytics_engine_datasets, ({ binding, dataset }) => [
    binding,
    { dataset },
  ]),
  assets: {
    directory: path.resolve(projectFolder, data.assets.directory),
    binding: data.assets.binding,
    run_worker_first: true,
    routerConfig: { has_user_worker: true, invoke_user_worker_ahead_of_assets: true },
  },
});

const named = <Entry, Value>(entries: readonly Entry[], of: (entry: Entry) => [string, Value]) =>
  Object.fromEntries(entries.map(of)) as Record<string, Value>;

/** Refuses a class that no migration creates, as Cloudflare does. */
function durableObjects({ durable_objects, migrations }: Wrangler) {
  const made = new Set(migrations.flatMap((migration) => migration.new_sqlite_classes));
  return named(durable_objects.bindings, ({ name, class_name }) => {
    if (!made.has(class_name)) throw refused(`no migration makes the class ${class_name}`);
    return [name, { className: class_name, useSQLite: true }];
  });
}

/**
 * Miniflare keeps queues in memory, so a kill loses their messages. Batches are therefore delivered sooner than on
 * Cloudflare, and a kill loses about the last second of usage. (A stop loses nothing, see `drainable.ts`.)
 */
const QUEUE_WAIT_MAX_s = 0.5;

const consumerOptions = (entry: Wrangler['queues']['consumers'][number]) => ({
  maxBatchSize: entry.max_batch_size,
  maxBatchTimeout: Math.min(entry.max_batch_timeout, QUEUE_WAIT_MAX_s),
  maxRetries: entry.max_retries,
  retryDelay: entry.retry_delay,
  ...(entry.dead_letter_queue !== undefined && { deadLetterQueue: entry.dead_letter_queue }),
});

const refused = (reason: string): MaskrouteError =>
  new MaskrouteError('start_failed', `wrangler.toml: ${reason}.`);

/*
 * Builds the edge as `wrangler deploy` does: the assets, and the worker bundled into one module. A bundle is cached until
 * one of its files changes.
 */

/**
 * The worker's entrypoint for requests. Miniflare puts three workers of its own (error pages, assets) in front of the
 * default entrypoint, which together cost as much as ours; the socket of a named entrypoint bypasses them.
 */
export const DOOR = 'door';

/** @returns the module's source. @throws MaskrouteError `start_failed` with the build command's output. */
export async function bundleEdge(
  config: EdgeConfig,
  { projectFolder, around }: { readonly projectFolder: string; readonly around?: string },
): Promise<string> {
  await runBuild(config.buildCommand, projectFolder);
  const main = mainModule(config, around);
  const keptFile = path.join(projectFolder, 'node_modules/.cache/edge', `${sha256([main])}.json`);
  // If the cache cannot be read or written, the worker is bundled at each start.
  const kept = await readOwnJson(keptFile, keptSchema).catch(() => undefined);
  if (kept !== undefined && (await hashOf(kept.inputs).catch(() => '')) === kept.inputsHash)
    return kept.script;
  const begun_ms = Date.now();
  const { script, inputs } = await bundle(main, projectFolder);
  const made: Kept = { inputs, inputsHash: await hashOf(inputs), script };
  // Not cached if a file changed during the build, since the bundle may have its old content.
  if ((await newestChange_ms(inputs)) < begun_ms)
    await mkdir(path.dirname(keptFile), { recursive: true })
      .then(() => writeWhole(keptFile, JSON.stringify(made)))
      .catch(() => undefined);
  return script;
}

const keptSchema = z.object({ inputs: z.array(z.string()), inputsHash: z.string(), script: z.string() });
type Kept = z.output<typeof keptSchema>;

async function bundle(main: string, projectFolder: string): Promise<Pick<Kept, 'script' | 'inputs'>> {
  // Imported here, since usually the cache has the bundle.
  const { build } = await import('esbuild');
  const { outputFiles, metafile } = await build({
    absWorkingDir: projectFolder,
    stdin: { contents: main, resolveDir: projectFolder, sourcefile: MAIN },
    bundle: true,
    write: false,
    metafile: true,
    format: 'esm',
    target: 'es2024',
    platform: 'neutral',
    mainFields: ['module', 'main'],
    conditions: ['workerd', 'worker', 'browser'],
    external: ['cloudflare:*', 'node:*'],
    logLevel: 'silent',
  });
  const files = Object.keys(metafile.inputs).filter((input) => input !== MAIN);
  const inputs = [...files.map((file) => path.resolve(projectFolder, file)), ...OWN_FILES];
  return { script: outputFiles[0]!.text, inputs };
}

const MAIN = 'edge-main.js';
/** Files that determine the bundling itself; a change of these also invalidates the cache. */
const OWN_FILES = [
  fileURLToPath(import.meta.url),
  fileURLToPath(import.meta.resolve('esbuild/package.json')),
];

const hashOf = async (files: readonly string[]): Promise<string> =>
  sha256(await Promise.all(files.map((file) => readFile(file))));

const newestChange_ms = async (files: readonly string[]): Promise<number> =>
  Math.max(...(await Promise.all(files.map((file) => stat(file)))).map(({ mtimeMs }) => mtimeMs));

/** Hash of all parts, each with its length. */
function sha256(parts: readonly (string | Uint8Array)[]): string {
  const hash = createHash('sha256');
  for (const part of parts) hash.update(`${part.length}:`).update(part);
  return hash.digest('hex');
}

const DRAINABLE = fileURLToPath(new URL('./drainable.ts', import.meta.url));

/** The main module: the worker made drainable, as default export and as `DOOR`. */
const mainModule = ({ entry, worker }: EdgeConfig, around: string | undefined): string => `
export * from ${JSON.stringify(entry)};
import worker from ${JSON.stringify(entry)};
${around === undefined ? 'const around = (worker) => worker;' : `import around from ${JSON.stringify(around)};`}
import { drainable } from ${JSON.stringify(DRAINABLE)};
const local = drainable(around(worker), ${JSON.stringify(Object.keys(worker.queueProducers))});
export { local as default, local as ${DOOR} };
`;

const OUTPUT_CHARS_MAX = 2000;
const BUILD_LIMIT_ms = 60_000;

/** Runs the build command of wrangler.toml, with this process's Node first on the path. */
async function runBuild(command: string, projectFolder: string): Promise<void> {
  const PATH = [path.dirname(process.execPath), process.env.PATH].join(path.delimiter);
  try {
    await promisify(execFile)('sh', ['-c', command], {
      cwd: projectFolder,
      env: { ...process.env, PATH },
      timeout: BUILD_LIMIT_ms,
    });
  } catch (error) {
    const { stderr, message } = error as Error & { stderr?: string };
    const reason = (stderr || message).slice(-OUTPUT_CHARS_MAX);
    throw new MaskrouteError('start_failed', `"${command}" failed: ${reason}`, { cause: error });
  }
}
