/**
 * What wrangler.toml says about the edge, as far as one machine can give it. A binding that is not known here
 * stops the start, so that the local edge never runs with less than the deployed one in silence.
 */
import { readFile } from 'node:fs/promises';
import path from 'node:path';
import { parse } from 'smol-toml';
import { z } from 'zod';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { check } from '../../shared/wire/parse-body.ts';

const wranglerSchema = z.strictObject({
  name: z.string(),
  main: z.string(),
  compatibility_date: z.string(),
  compatibility_flags: z.array(z.string()).default([]),
  build: z.strictObject({ command: z.string() }),
  assets: z.strictObject({ directory: z.string(), binding: z.string(), run_worker_first: z.literal(true) }),
  d1_databases: z
    .array(
      z.strictObject({
        binding: z.string(),
        database_name: z.string(),
        database_id: z.string(),
        migrations_dir: z.string(),
      }),
    )
    .length(1),
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
            max_batch_size: z.int().positive().optional(),
            max_batch_timeout: z.int().min(0).optional(),
            max_retries: z.int().min(0).optional(),
            retry_delay: z.int().min(0).optional(),
            dead_letter_queue: z.string().optional(),
          }),
        )
        .default([]),
    })
    .default({ producers: [], consumers: [] }),
  analytics_engine_datasets: z
    .array(z.strictObject({ binding: z.string(), dataset: z.string() }))
    .default([]),
  /** One machine wakes the worker every minute, and promises nothing else. */
  triggers: z.strictObject({ crons: z.array(z.literal('* * * * *')) }).default({ crons: [] }),
  vars: z.record(z.string(), z.string()).default({}),
  observability: z.unknown(),
  env: z.unknown(),
});

export type EdgeConfig = {
  readonly name: string;
  /** Absolute, as are the folders. */
  readonly entry: string;
  readonly compatibilityDate: string;
  readonly compatibilityFlags: string[];
  /** What makes the assets. */
  readonly buildCommand: string;
  readonly assets: { readonly folder: string; readonly binding: string };
  readonly database: { readonly binding: string; readonly name: string; readonly migrationsFolder: string };
  /** By binding. All are SQLite-backed. */
  readonly durableObjects: Record<string, { readonly className: string }>;
  readonly rateLimits: Record<
    string,
    { readonly namespaceId: string; readonly limit: number; readonly period_s: 10 | 60 }
  >;
  readonly queueProducers: Record<string, { readonly queueName: string }>;
  readonly queueConsumers: Record<string, QueueConsumer>;
  readonly analyticsDatasets: Record<string, { readonly dataset: string }>;
  readonly crons: readonly string[];
  readonly vars: Record<string, string>;
};

export type QueueConsumer = {
  readonly maxBatchSize?: number;
  readonly maxBatchTimeout_s?: number;
  readonly maxRetries?: number;
  readonly retryDelay_s?: number;
  readonly deadLetterQueue?: string;
};

/** @throws MaskrouteError `start_failed` naming the entry that is wrong or not known here. */
export async function readEdgeConfig(projectFolder: string): Promise<EdgeConfig> {
  const file = path.join(projectFolder, 'wrangler.toml');
  const checked = check(wranglerSchema, parse(await readFile(file, 'utf8')), 'the file');
  if (checked.kind === 'bad') {
    throw new MaskrouteError('start_failed', `wrangler.toml: ${checked.message}.`);
  }
  const { value: data } = checked;
  const [database] = data.d1_databases;
  const inProject = (relative: string) => path.resolve(projectFolder, relative);
  return {
    name: data.name,
    entry: inProject(data.main),
    compatibilityDate: data.compatibility_date,
    compatibilityFlags: data.compatibility_flags,
    buildCommand: data.build.command,
    assets: { folder: inProject(data.assets.directory), binding: data.assets.binding },
    database: {
      binding: database!.binding,
      name: database!.database_name,
      migrationsFolder: inProject(database!.migrations_dir),
    },
    durableObjects: durableObjects(data),
    rateLimits: Object.fromEntries(
      data.ratelimits.map(({ name, namespace_id, simple }) => [
        name,
        { namespaceId: namespace_id, limit: simple.limit, period_s: simple.period },
      ]),
    ),
    queueProducers: Object.fromEntries(
      data.queues.producers.map(({ binding, queue }) => [binding, { queueName: queue }]),
    ),
    queueConsumers: Object.fromEntries(data.queues.consumers.map((entry) => [entry.queue, consumer(entry)])),
    analyticsDatasets: Object.fromEntries(
      data.analytics_engine_datasets.map(({ binding, dataset }) => [binding, { dataset }]),
    ),
    crons: data.triggers.crons,
    vars: data.vars,
  };
}

type Wrangler = z.output<typeof wranglerSchema>;

/** A class that no migration makes would be refused when it is deployed, so it is refused here. */
function durableObjects({ durable_objects, migrations }: Wrangler): EdgeConfig['durableObjects'] {
  const made = new Set(migrations.flatMap((migration) => migration.new_sqlite_classes));
  return Object.fromEntries(
    durable_objects.bindings.map(({ name, class_name }) => {
      if (made.has(class_name)) return [name, { className: class_name }];
      throw new MaskrouteError('start_failed', `wrangler.toml: no migration makes the class ${class_name}.`);
    }),
  );
}

const consumer = (entry: Wrangler['queues']['consumers'][number]): QueueConsumer => ({
  ...(entry.max_batch_size === undefined ? {} : { maxBatchSize: entry.max_batch_size }),
  ...(entry.max_batch_timeout === undefined ? {} : { maxBatchTimeout_s: entry.max_batch_timeout }),
  ...(entry.max_retries === undefined ? {} : { maxRetries: entry.max_retries }),
  ...(entry.retry_delay === undefined ? {} : { retryDelay_s: entry.retry_delay }),
  ...(entry.dead_letter_queue === undefined ? {} : { deadLetterQueue: entry.dead_letter_queue }),
});
