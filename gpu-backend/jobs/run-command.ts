/**
 * One command of the command line in a child process: low in priority, so that serving goes first; its progress
 * read from JSON lines; its output kept in a bounded log; gone with its parent, however that ends.
 */
import { type ChildProcess, fork } from 'node:child_process';
import { once } from 'node:events';
import { type FileHandle, open } from 'node:fs/promises';
import { constants, setPriority } from 'node:os';
import { createInterface } from 'node:readline';
import type { Readable } from 'node:stream';
import { z } from 'zod';
import { DEFAULT_TENANT } from '../../shared/admin/admin-wire.ts';
import type { JobProgress, JobRequest } from '../../shared/admin/job-wire.ts';

type CommandRun = {
  /** The entry that runs a command given as arguments, and ends when its parent is gone. */
  readonly entry: string;
  readonly args: readonly string[];
  readonly env: Record<string, string>;
  readonly logFile: string;
  /** Ends it in good order; it can be started again and goes on. */
  readonly signal: AbortSignal;
};

export type CommandEnd =
  /** `lastLine`: of what it said on standard output. */
  | { readonly kind: 'done'; readonly lastLine: string }
  | { readonly kind: 'stopped' }
  | { readonly kind: 'failed'; readonly reason: string };

const LOG_BYTES_MAX = 4 * 1024 * 1024;
const LINE_CHARS_MAX = 2000;
/** A step of learning takes a second or so; what does not end in this time is ended. */
const STOP_ms = 15_000;

const progressLineSchema = z.object({
  progress: z.object({
    stage: z.string().max(100),
    done: z.number(),
    total: z.number(),
    left_s: z.number().nullable(),
    detail: z.string().max(200),
  }),
});

/** Yields how far it is; returns how it ended. */
export async function* runCommand(run: CommandRun): AsyncGenerator<JobProgress, CommandEnd> {
  if (run.signal.aborted) return { kind: 'stopped' };
  const log = await openLog(run.logFile);
  const child = startCommand(run);
  let killer: NodeJS.Timeout | undefined;
  const stop = () => {
    child.kill('SIGTERM');
    killer = setTimeout(() => child.kill('SIGKILL'), STOP_ms);
  };
  run.signal.addEventListener('abort', stop, { once: true });
  // While the log was being opened.
  if (run.signal.aborted) stop();
  try {
    const ended = Promise.all([once(child, 'exit') as Promise<Exit>, lastLineOf(child.stderr!, log)]);
    // It is waited for below; until then nobody hears of a failure.
    ended.catch(() => {});
    let lastLine = '';
    for await (const line of linesOf(child.stdout!)) {
      const progress = progressOf(line);
      if (progress !== undefined) {
        yield progress;
        continue;
      }
      lastLine = line;
      log.write(line);
    }
    const [exit, error] = await ended;
    if (run.signal.aborted) return { kind: 'stopped' };
    return exit[0] === 0 ? { kind: 'done', lastLine } : { kind: 'failed', reason: reasonOf(exit, error) };
  } finally {
    clearTimeout(killer);
    run.signal.removeEventListener('abort', stop);
    await log.close();
  }
}

function startCommand({ entry, args, env }: CommandRun): ChildProcess {
  const child = fork(entry, args, {
    // A group of its own: a Ctrl-C in the terminal of `serve` is for the backend, which decides what becomes of its job.
    detached: true,
    stdio: ['ignore', 'pipe', 'pipe', 'ipc'],
    // The backend's keys are none of a command's business.
    env: {
      ...process.env,
      MASKROUTE_BACKEND_KEY: '',
      MASKROUTE_BACKEND_KEY_2: '',
      MASKROUTE_METRICS_KEY: '',
      ...env,
      MASKROUTE_PROGRESS: 'json',
    },
  });
  try {
    if (child.pid !== undefined) setPriority(child.pid, constants.priority.PRIORITY_LOW);
  } catch {
    // It ended already, or the system does not let us: it runs as it is.
  }
  return child;
}

type Exit = [code: number | null, signal: string | null];

/** `error`: the last line on standard error, where commands say what went wrong. */
function reasonOf([code, signal]: Exit, error: string): string {
  const how = signal === null ? `exit code ${code}` : `signal ${signal}`;
  return error === '' ? how : `${error.replace(/^error: /, '')} (${how})`;
}

async function* linesOf(stream: Readable): AsyncGenerator<string> {
  for await (const line of createInterface({ input: stream })) yield line.slice(0, LINE_CHARS_MAX);
}

/** Takes all lines into the log, and gives the last line with text. */
async function lastLineOf(stream: Readable, log: Log): Promise<string> {
  let last = '';
  for await (const line of linesOf(stream)) {
    if (line.trim() !== '') last = line;
    log.write(line);
  }
  return last;
}

function progressOf(line: string): JobProgress | undefined {
  if (!line.startsWith('{"progress":')) return undefined;
  try {
    return progressLineSchema.parse(JSON.parse(line)).progress;
  } catch {
    return undefined;
  }
}

type Log = { write(line: string): void; close(): Promise<void> };

/** A full disk costs the log, not the job. */
async function openLog(path: string): Promise<Log> {
  const file: FileHandle | undefined = await open(path, 'a', 0o600).catch(() => undefined);
  let bytes = (await file?.stat().catch(() => undefined))?.size ?? 0;
  let writing = Promise.resolve();
  return {
    write(line) {
      const text = `${line}\n`;
      bytes += text.length;
      if (file === undefined || bytes > LOG_BYTES_MAX) return;
      writing = writing.then(async () => {
        await file.write(text).catch(() => {});
      });
    },
    async close() {
      await writing;
      await file?.close().catch(() => {});
    },
  };
}

/* A job's request as arguments of the command line: jobs do nothing that a person could not do there. */

/** @param from the file of the mask set that it begins with, if any. */
export function learnArguments(
  request: JobRequest,
  files: readonly string[],
  out: string,
  from?: string,
): string[] {
  const { model, clusters, masks, sparsity, cost, context, surrogate, encoder, name, rows, seed } = request;
  return [
    'learn',
    ...['--model', model!],
    ...['--data', ...files],
    ...['--clusters', String(clusters)],
    ...['--sparsity', String(sparsity)],
    ...['--encoder', encoder],
    ...['--out', out],
    ...['--name', name ?? 'learned'],
    ...(masks === undefined ? [] : ['--masks', String(masks)]),
    ...(cost === undefined ? [] : ['--cost', cost]),
    // An earlier set says itself what its blocks count.
    ...(context === undefined || from !== undefined ? [] : ['--context', String(context)]),
    ...(surrogate === undefined ? [] : [surrogate ? '--surrogate' : '--no-surrogate']),
    ...(from === undefined ? [] : ['--from', from]),
    ...(rows === undefined ? [] : ['--rows', String(rows)]),
    ...(seed === undefined ? [] : ['--seed', String(seed)]),
  ];
}

export function publishArguments(
  { edge, tenant, activate, rollout, auto_rollback }: NonNullable<JobRequest['publish']>,
  file: string,
): string[] {
  const steps = (rollout ?? []).map(
    ({ share, duration_s }) => `${Number((100 * share).toPrecision(12))}%:${duration_s}s`,
  );
  const { error_rate_max, tpot_ratio_max, tpot_ms_max, requests_min } = auto_rollback ?? {};
  const bounds = {
    '--max-error-rate': error_rate_max,
    '--max-slowdown': tpot_ratio_max,
    '--max-token-ms': tpot_ms_max,
    '--min-requests': requests_min,
  };
  return [
    'publish',
    file,
    ...['--edge', edge],
    ...(tenant === DEFAULT_TENANT ? [] : ['--tenant', tenant]),
    ...(activate ? ['--activate'] : []),
    ...(steps.length === 0 ? [] : ['--rollout', steps.join(',')]),
    ...Object.entries(bounds).flatMap(([flag, bound]) => (bound === undefined ? [] : [flag, String(bound)])),
  ];
}
