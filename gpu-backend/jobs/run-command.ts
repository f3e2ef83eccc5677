/**
 * Runs one command of the command line in a child process of low priority, so that serving goes first. Progress is read
 * from JSON lines, output is kept in a bounded log, and the child ends when its parent ends, even if the parent is
 * killed.
 */
import { type ChildProcess, fork } from 'node:child_process';
import { once } from 'node:events';
import { type FileHandle, open } from 'node:fs/promises';
import { constants, setPriority } from 'node:os';
import { createInterface } from 'node:readline';
import type { Readable } from 'node:stream';
import { z } from 'zod';
import { DEFAULT_TENANT } from '../../shared/admin/admin-wire.ts';
import { type JobProgress, type JobRequest, jobSchema } from '../../shared/admin/job-wire.ts';
import { oneAtATime } from '../one-at-a-time.ts';

type CommandRun = {
  /** The entry that runs a command given as arguments, and ends when its parent is gone. */
  readonly entry: string;
  readonly args: readonly string[];
  readonly env: Record<string, string>;
  readonly logFile: string;
  /** Stops the command cleanly; started again, it resumes. */
  readonly signal: AbortSignal;
};

export type CommandEnd =
  /** `lastLine`: the last line of its standard output. */
  | { readonly kind: 'done'; readonly lastLine: string }
  | { readonly kind: 'stopped' }
  | { readonly kind: 'failed'; readonly reason: string };

const LOG_BYTES_MAX = 4 * 1024 * 1024;
const LINE_CHARS_MAX = 2000;
/** A training step takes about a second; a command that does not stop within this time is killed. */
const STOP_ms = 15_000;

const progressLineSchema = z.object({ progress: jobSchema.shape.progress.unwrap() });

/** Yields its progress; returns how it ended. */
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
  // The signal may have aborted while the log was being opened.
  if (run.signal.aborted) stop();
  try {
    const ended = Promise.all([once(child, 'exit') as Promise<Exit>, lastMessageOf(child.stderr!, log)]);
    // It is awaited below; until then a rejection would count as unhandled.
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
    // Also if it was to stop: it had done its work by then.
    if (exit[0] === 0) return { kind: 'done', lastLine };
    return run.signal.aborted ? { kind: 'stopped' } : { kind: 'failed', reason: reasonOf(exit, error) };
  } finally {
    clearTimeout(killer);
    run.signal.removeEventListener('abort', stop);
    await log.close();
  }
}

function startCommand({ entry, args, env }: CommandRun): ChildProcess {
  const child = fork(entry, args, {
    // A process group of its own: Ctrl-C in the terminal of `serve` reaches only the backend, which then stops its job.
    detached: true,
    stdio: ['ignore', 'pipe', 'pipe', 'ipc'],
    // The command must not see the backend's keys.
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
    // It has ended already, or the system forbids it: the command keeps its priority.
  }
  return child;
}

type Exit = [code: number | null, signal: string | null];

/** `error`: the last message on standard error. */
function reasonOf([code, signal]: Exit, error: string): string {
  const byWhom = signal === 'SIGKILL' ? ', which the system sends when memory runs out' : '';
  const how = signal === null ? `exit code ${code}` : `signal ${signal}${byWhom}`;
  return error === '' ? how : `${error.replace(/^error: /, '')} (${how})`;
}

async function* linesOf(stream: Readable): AsyncGenerator<string> {
  for await (const line of createInterface({ input: stream })) yield line.slice(0, LINE_CHARS_MAX);
}

/** A line behind the message of an uncaught error: its stack, its fields, Node's version. */
const BEHIND_MESSAGE = /^(?:$|[\s}-]|Node\.js v)/;

/** Writes all lines to the log and returns the last line that is a message. */
async function lastMessageOf(stream: Readable, log: Log): Promise<string> {
  let last = '';
  for await (const line of linesOf(stream)) {
    if (!BEHIND_MESSAGE.test(line)) last = line;
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

/** If the disk is full, the log is lost but the job goes on. */
async function openLog(path: string): Promise<Log> {
  const file: FileHandle | undefined = await open(path, 'a', 0o600).catch(() => undefined);
  let bytes = (await file?.stat().catch(() => undefined))?.size ?? 0;
  const inTurn = oneAtATime();
  return {
    write(line) {
      const text = `${line}\n`;
      bytes += text.length;
      if (file === undefined || bytes > LOG_BYTES_MAX) return;
      inTurn(() => file.write(text)).catch(() => {});
    },
    async close() {
      await inTurn(async () => file?.close()).catch(() => {});
    },
  };
}

/* A job's request as command-line arguments: a job does nothing that the command line cannot do. */

/** @param from the file of the mask set to begin with, if any. */
export function learnArguments(
  request: JobRequest,
  files: readonly string[],
  out: string,
  from?: string,
): string[] {
  const { model, clusters, masks, sparsity, cost, context, surrogate, encoder, name } = request;
  const { rows, quick, seed } = request;
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
    // An earlier set brings its own block weights.
    ...(context === undefined || from !== undefined ? [] : ['--context', String(context)]),
    ...(surrogate === undefined ? [] : [surrogate ? '--surrogate' : '--no-surrogate']),
    ...(from === undefined ? [] : ['--from', from]),
    ...(rows === undefined ? [] : ['--rows', String(rows)]),
    ...(quick ? ['--quick'] : []),
    ...(seed === undefined ? [] : ['--seed', String(seed)]),
  ];
}

/**
 * @param once the job's file for publishing once, however often it is started. @param isScheduled whether a schedule
 * created the job: nobody asked for this very publication, so it brings back nothing that was rolled back.
 */
export function publishArguments(
  { edge, tenant, activate, rollout, auto_rollback }: NonNullable<JobRequest['publish']>,
  file: string,
  once: string,
  isScheduled: boolean,
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
    ...(activate ? ['--activate', '--once', once] : []),
    ...(activate && isScheduled ? ['--unless-rolled-back'] : []),
    ...(steps.length === 0 ? [] : ['--rollout', steps.join(',')]),
    ...Object.entries(bounds).flatMap(([flag, bound]) => (bound === undefined ? [] : [flag, String(bound)])),
  ];
}
