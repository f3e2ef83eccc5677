/**
 * One command of the command line in a child process: low in priority, so that serving goes first; its progress
 * read from JSON lines; its output kept in a bounded log; gone with its parent, however that ends.
 */
import { fork } from 'node:child_process';
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
  readonly onProgress: (progress: JobProgress) => void;
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

export async function runCommand(run: CommandRun): Promise<CommandEnd> {
  if (run.signal.aborted) return { kind: 'stopped' };
  const log = await openLog(run.logFile);
  const child = fork(run.entry, run.args, {
    stdio: ['ignore', 'pipe', 'pipe', 'ipc'],
    // The backend key is none of a command's business.
    env: {
      ...process.env,
      MASKROUTE_BACKEND_KEY: '',
      MASKROUTE_METRICS_KEY: '',
      ...run.env,
      MASKROUTE_PROGRESS: 'json',
    },
  });
  lowerPriority(child.pid);
  let killer: NodeJS.Timeout | undefined;
  const stop = () => {
    child.kill('SIGTERM');
    killer = setTimeout(() => child.kill('SIGKILL'), STOP_ms);
  };
  run.signal.addEventListener('abort', stop, { once: true });
  let lastLine = '';
  let reason = '';
  try {
    const exited = once(child, 'exit') as Promise<[code: number | null, signal: string | null]>;
    const [[code, signal]] = await Promise.all([
      exited,
      eachLine(child.stdout!, (line) => {
        const progress = progressOf(line);
        if (progress !== undefined) return run.onProgress(progress);
        lastLine = line;
        log.write(line);
      }),
      eachLine(child.stderr!, (line) => {
        if (line.trim() !== '') reason = line;
        log.write(line);
      }),
    ]);
    if (run.signal.aborted) return { kind: 'stopped' };
    if (code === 0) return { kind: 'done', lastLine };
    const how = signal === null ? `exit code ${code}` : `signal ${signal}`;
    return { kind: 'failed', reason: reason === '' ? how : `${reason.replace(/^error: /, '')} (${how})` };
  } finally {
    clearTimeout(killer);
    run.signal.removeEventListener('abort', stop);
    await log.close();
  }
}

function lowerPriority(pid: number | undefined): void {
  if (pid === undefined) return;
  try {
    setPriority(pid, constants.priority.PRIORITY_LOW);
  } catch {
    // It ended already, or the system does not let us: it runs as it is.
  }
}

async function eachLine(stream: Readable, take: (line: string) => void): Promise<void> {
  for await (const line of createInterface({ input: stream })) take(line.slice(0, LINE_CHARS_MAX));
}

function progressOf(line: string): JobProgress | undefined {
  if (!line.startsWith('{"progress":')) return undefined;
  try {
    return progressLineSchema.parse(JSON.parse(line)).progress;
  } catch {
    return undefined;
  }
}

/** A full disk costs the log, not the job. */
async function openLog(path: string): Promise<{ write(line: string): void; close(): Promise<void> }> {
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

export function learnArguments(request: JobRequest, files: readonly string[], out: string): string[] {
  const { model, clusters, sparsity, cost, surrogate, encoder, name, rows, seed } = request;
  return [
    'learn',
    ...['--model', model!],
    ...['--data', ...files],
    ...['--clusters', String(clusters)],
    ...['--sparsity', String(sparsity)],
    ...['--encoder', encoder],
    ...['--out', out],
    ...['--name', name ?? 'learned'],
    ...(cost === undefined ? [] : ['--cost', cost]),
    ...(surrogate === undefined ? [] : [surrogate ? '--surrogate' : '--no-surrogate']),
    ...(rows === undefined ? [] : ['--rows', String(rows)]),
    ...(seed === undefined ? [] : ['--seed', String(seed)]),
  ];
}

export const publishArguments = (
  { edge, tenant, activate }: NonNullable<JobRequest['publish']>,
  file: string,
): string[] => [
  'publish',
  file,
  ...['--edge', edge],
  ...(tenant === DEFAULT_TENANT ? [] : ['--tenant', tenant]),
  ...(activate ? ['--activate'] : []),
];
