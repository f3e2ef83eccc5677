/**
 * The work of one job: it asks the edge whether it may publish, learns in a child process, and publishes what it learned.
 * A job that is started again goes on from what its folder has.
 */
import { copyFile, mkdir } from 'node:fs/promises';
import type { CreateJob, Job, JobProgress } from '../../shared/admin/job-wire.ts';
import { maskSetVersion } from '../../shared/mask/mask-set.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { sizeOf } from '../files.ts';
import { createAdminClient } from '../publication/admin-client.ts';
import { requireMayPublish } from '../publication/publish.ts';
import { setToBeginWith, takeOver } from './earlier-jobs.ts';
import type { JobData } from './job-data.ts';
import { type JobStore, type Note, readSecret } from './job-store.ts';
import { type CommandEnd, learnArguments, publishArguments, runCommand } from './run-command.ts';

/** How long an edge may take to say whether a job may publish there: shorter than an edge waits that asks for the job. */
const MAY_PUBLISH_TIMEOUT_ms = 8_000;

export type RunOptions = {
  readonly home: string;
  /** Secrets are sealed under the first, and opened by any: there are two during a rotation. */
  readonly backendKeys: readonly [string, ...string[]];
  /** See {@link runCommand}. */
  readonly entry: string;
  /** For the log: a job began, went on, failed. */
  readonly note: Note;
};

/** What a job's work has of the jobs around it. */
type Around = {
  readonly options: RunOptions;
  readonly store: JobStore;
  readonly data: JobData;
  /** All jobs of the home, the newest first. */
  list(): readonly Job[];
  onProgress(progress: JobProgress): void;
  /** Aborts when the job is cancelled or the backend stops. */
  readonly signal: AbortSignal;
};

/** How a job's work ended. `result`: of a job that did not succeed, null unless it had begun to publish. */
export type JobEnd =
  | { readonly kind: 'succeeded'; readonly result: NonNullable<Job['result']> }
  | (Exclude<CommandEnd, { kind: 'done' }> & { readonly result: Job['result'] });

/** @throws MaskrouteError what the edge, the job's data and its secret throw. */
export async function runJob(job: Job, around: Around): Promise<JobEnd> {
  const { store, signal } = around;
  const { id, request, schedule } = job;
  if (request.publish !== undefined && !(await store.hasSet(id)))
    await requireKey({ ...request.publish, admin_key: await adminKeyOf(id, around) }, signal);
  const learned = await learn(job, around);
  if (learned.kind !== 'done') return { ...learned, result: null };
  const version = maskSetVersion(await store.readSet(id));
  if (request.publish === undefined) return { kind: 'succeeded', result: { version, published: null } };
  // Cancelled, or the backend stops: nothing is published yet.
  if (signal.aborted) return { kind: 'stopped', result: null };
  if (schedule !== null) await continueTry(id, schedule, version, around);
  const firstTry = store.firstTryOf(id);
  const toPublish = publishArguments(request.publish, store.setOf(id), firstTry, schedule !== null);
  const env = { MASKROUTE_ADMIN_KEY: await adminKeyOf(id, around) };
  const published = await run(id, toPublish, env, around);
  if (published.kind !== 'done') return { ...published, result: { version, published: null } };
  return { kind: 'succeeded', result: { version, published: published.lastLine } };
}

/** A key that was revoked meanwhile is not worth learning for. An edge that does not answer may be back by then. */
async function requireKey(publish: Publish, signal: AbortSignal): Promise<void> {
  await requireEdgeAllows(publish, signal).catch((error: MaskrouteError) => {
    if (error.code !== 'edge_unreachable') throw error;
  });
}

/** @throws MaskrouteError `conflict` when it was sealed under another key. */
const adminKeyOf = (id: string, { store, options }: Around): Promise<string> =>
  readSecret(store.folderOf(id), options.backendKeys);

/** Unless an earlier start of the job has learned, or an equal job. */
async function learn(job: Job, around: Around): Promise<CommandEnd> {
  const { options, store, data, list, signal } = around;
  const done = { kind: 'done', lastLine: '' } as const;
  const { id, request } = job;
  if (await store.hasSet(id)) return done;
  const files = await data.files(request);
  const earlier = { jobs: list(), store, home: options.home };
  // A restart chooses the same one: no other job ends while this one runs.
  const from = await setToBeginWith(request, earlier);
  const out = store.outOf(id);
  if ((await sizeOf(out)) === undefined) {
    const taken = await takeOver({ job, files, from }, earlier, signal).catch((error: unknown) => {
      if (!signal.aborted) throw error;
    });
    if (taken) options.note('a job goes on from an equal one', { job: id, earlier: taken });
  }
  if (await store.hasSet(id)) return done;
  // The next start takes nothing over where it finds the folder.
  if (signal.aborted) return { kind: 'stopped' };
  await mkdir(out, { recursive: true, mode: 0o700 });
  return await run(id, learnArguments(request, files, out, from), {}, around);
}

/**
 * Where the schedule's job before learned the same version, this one publishes it only if that one did not: a set that
 * somebody has made live in its place since stays live.
 */
async function continueTry(
  id: string,
  schedule: string,
  version: string,
  { store, list }: Around,
): Promise<void> {
  const before = list().find((job) => job.schedule === schedule && job.result !== null);
  if (before?.result?.version !== version) return;
  const { firstTryOf } = store;
  await copyFile(firstTryOf(before.id), firstTryOf(id)).catch((error: NodeJS.ErrnoException) => {
    // It could not even ask the edge what was live.
    if (error.code !== 'ENOENT') throw error;
  });
}

async function run(
  id: string,
  args: string[],
  env: Record<string, string>,
  { options, store, onProgress, signal }: Around,
): Promise<CommandEnd> {
  const command = runCommand({
    entry: options.entry,
    args,
    env: { ...env, MASKROUTE_HOME: options.home, MASKROUTE_JOB_FOLDER: store.folderOf(id) },
    logFile: store.logOf(id),
    signal,
  });
  for (;;) {
    const step = await command.next();
    if (step.done) return step.value;
    onProgress(step.value);
  }
}

type Publish = NonNullable<CreateJob['publish']>;

/**
 * Checks what a job would find out only at its end. `signal`: ends the question.
 * @throws MaskrouteError `invalid_request` where the edge refuses to publish, `edge_unreachable` where it cannot say.
 */
export async function requireEdgeAllows(
  { edge, tenant, admin_key }: Publish,
  signal?: AbortSignal,
): Promise<void> {
  const client = createAdminClient(edge, admin_key, MAY_PUBLISH_TIMEOUT_ms);
  await requireMayPublish(client, tenant, signal).catch((cause: MaskrouteError) => {
    // The edge's own status, such as 401 or 429, would seem to be about the caller.
    const isPassing = cause.status >= 500 || cause.status === 429;
    const refused = `publish: the edge at ${client.edge} ${isPassing ? 'does not say whether it allows it' : 'refuses it'}`;
    const code = isPassing ? 'edge_unreachable' : 'invalid_request';
    throw new MaskrouteError(code, `${refused}: ${cause.message}`, { param: 'publish', cause });
  });
}
