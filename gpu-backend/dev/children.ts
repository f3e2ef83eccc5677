/**
 * The child processes of `npm start`: the backend and the edge, which includes workerd, so that one can crash without the
 * other. A child that dies or no longer answers is restarted on its old port, with a growing delay if it dies soon. Both
 * ends of the channel between parent and child are in this file.
 */
import { fork } from 'node:child_process';
import { once } from 'node:events';
import { open } from 'node:fs/promises';
import { enableCompileCache } from 'node:module';
import { setTimeout as sleep } from 'node:timers/promises';
import { type ErrorCode, MaskrouteError, toMaskrouteError } from '../../shared/wire/errors.ts';
import { COMPILED_FOLDER } from '../compiled-folder.js';
import type { BackendOptions } from '../main.ts';
import type { EdgeOptions } from './local-edge.ts';

type ChildOptions<Config> = {
  /** `backend` or `edge`: for messages, and the entry's only argument. */
  readonly name: string;
  /** The script to run; this file unless given. */
  readonly entry?: URL;
  readonly config: Config;
  /** The child's environment; this process's unless given. */
  readonly env?: NodeJS.ProcessEnv;
  /** The child's output goes to the end of this file. */
  readonly logFile: string;
  /** Shorter in tests. */
  readonly probe?: typeof PROBE;
  readonly start_ms?: number;
};

/** Longest start: a large model on a slow disk takes a minute, so after this long the child hangs. */
const START_ms = 10 * 60_000;

/**
 * The liveness probe of each child, `/healthz`. After `failuresMax` failures in a row the child is killed: its engine has
 * stopped, or it hangs.
 */
const PROBE = { every_ms: 5000, timeout_ms: 10_000, failuresMax: 3 };

export type Supervised = {
  readonly url: string;
  /** Undefined while it is down. */
  readonly pid: () => number | undefined;
  /** See {@link Child}. A child that is down has nothing to drain. */
  drain(limit_ms: number): Promise<void>;
  stop(limit_ms: number): Promise<void>;
};

const RESTART_DELAY_ms = { first: 250, max: 10_000 };
/** After running this long a child is restarted with the first delay again. */
const STEADY_ms = 60_000;

/**
 * Starts a child and restarts it until it is drained or stopped. The first start must succeed; `signal` cancels it. `say`
 * gets a line whenever the child died or runs again.
 * @throws as {@link startChild}.
 */
export async function supervise<Config extends { readonly port: number }>(
  options: ChildOptions<Config>,
  say: (line: string) => void,
  signal?: AbortSignal,
): Promise<Supervised> {
  let child: Child | undefined = await startChild(options, signal);
  const { url } = child;
  const again = { ...options, config: { ...options.config, port: Number(new URL(url).port) } };
  const stopping = new AbortController();
  /** Aborts when the child is drained or stopped: it is not restarted any more. */
  const leaving = new AbortController();

  const keepRunning = async () => {
    let delay_ms = RESTART_DELAY_ms.first;
    while (child !== undefined) {
      const started_ms = performance.now();
      const reason = await endOf(child, options.probe ?? PROBE, stopping.signal);
      if (stopping.signal.aborted) return;
      child = undefined;
      const log = `Its log: ${options.logFile}`;
      if (leaving.signal.aborted)
        return say(`The ${options.name} ended (${reason}) before its answers did. ${log}`);
      if (performance.now() - started_ms > STEADY_ms) delay_ms = RESTART_DELAY_ms.first;
      say(`The ${options.name} ended (${reason}); starting it again. ${log}`);
      while (child === undefined) {
        await sleep(delay_ms, undefined, { signal: leaving.signal }).catch(() => undefined);
        if (leaving.signal.aborted) return;
        delay_ms = Math.min(delay_ms * 2, RESTART_DELAY_ms.max);
        child = await startChild(again, leaving.signal).catch((error: Error) => {
          if (!leaving.signal.aborted) say(`The ${options.name} does not start: ${error.message}`);
          return undefined;
        });
        if (leaving.signal.aborted) return child?.stop(0);
      }
      say(`The ${options.name} runs again.`);
    }
  };
  const kept = keepRunning();
  return {
    url,
    pid: () => child?.pid,
    async drain(limit_ms) {
      leaving.abort();
      await child?.drain(limit_ms);
    },
    async stop(limit_ms) {
      leaving.abort();
      stopping.abort();
      await child?.stop(limit_ms);
      await kept;
    },
  };
}

/** Why a child ended: by itself, or killed here because it no longer answered. Does not kill a child that is being stopped. */
async function endOf(child: Child, probe: typeof PROBE, stopping: AbortSignal): Promise<string> {
  const over = new AbortController();
  const ended = child.ended.finally(() => over.abort());
  const signal = AbortSignal.any([over.signal, stopping]);
  for (let failures = 0; failures < probe.failuresMax; ) {
    await sleep(probe.every_ms, undefined, { signal }).catch(() => undefined);
    const isWell = await answersWell(
      child.url,
      AbortSignal.any([signal, AbortSignal.timeout(probe.timeout_ms)]),
    );
    if (signal.aborted) return await ended;
    failures = isWell ? 0 : failures + 1;
  }
  await child.stop(0);
  return 'it no longer answered';
}

async function answersWell(url: string, signal: AbortSignal): Promise<boolean> {
  try {
    const answer = await fetch(`${url}/healthz`, { signal });
    await answer.body?.cancel();
    return answer.ok;
  } catch {
    return false;
  }
}

/** `workerUrl`: the edge's worker without the proxy in front of it (`local-edge.ts`). */
type Addresses = { readonly url: string; readonly workerUrl?: string | undefined };

type Child = Addresses & {
  readonly pid: number;
  /** Resolves with the reason once the process has ended. */
  readonly ended: Promise<string>;
  /** Refuses new work; resolves when none runs, when the process has ended, or after `limit_ms`. */
  drain(limit_ms: number): Promise<void>;
  /** Shuts down gracefully; kills the child after `limit_ms`. */
  stop(limit_ms: number): Promise<void>;
};

/** How long a child may take to end after its start was cancelled or timed out. */
const CALLED_OFF_ms = 3000;

/**
 * @throws MaskrouteError the child's own error, or `start_failed` when it ends without one or does not start in time; the
 * reason of `signal`. The child has ended by then.
 */
export async function startChild<Config>(
  options: ChildOptions<Config>,
  signal?: AbortSignal,
): Promise<Child> {
  signal?.throwIfAborted();
  const { start_ms = START_ms } = options;
  const log = await open(options.logFile, 'a', 0o600);
  // A process group of its own: a Ctrl-C in the terminal reaches only the parent, and the group can be killed as a whole.
  const child = fork(options.entry ?? new URL(import.meta.url), [options.name], {
    detached: true,
    stdio: ['ignore', log.fd, log.fd, 'ipc'],
    env: options.env,
  });
  await log.close();
  const ended = once(child, 'exit').then(([code, signal]) => {
    killGroup(child.pid);
    return signal === null ? `exit code ${code}` : `signal ${signal}`;
  });
  // Sending to a dead child fails, which is ignored: `ended` reports it.
  const tell = (message: ToChild<Config>) => child.connected && child.send(message, () => undefined);
  const stop = async (limit_ms: number) => {
    tell({ type: 'stop' });
    const inTime = await Promise.race([ended.then(() => true), sleep(limit_ms, false, { ref: false })]);
    if (!inTime) killGroup(child.pid);
    await ended;
  };
  tell({ type: 'start', config: options.config });

  const late = AbortSignal.timeout(start_ms);
  const calledOff = AbortSignal.any([late, ...(signal === undefined ? [] : [signal])]);
  const answer = await Promise.race([
    once(child, 'message', { signal: calledOff })
      .then(([message]) => message as FromChild)
      .catch((error: Error) => {
        if (!calledOff.aborted) throw error;
      }),
    ended,
  ]);
  if (answer === undefined) {
    await stop(CALLED_OFF_ms);
    signal?.throwIfAborted();
    const message = `The ${options.name} did not start within ${start_ms / 1000} s; see ${options.logFile}.`;
    throw new MaskrouteError('start_failed', message);
  }
  if (typeof answer === 'string') {
    const message = `The ${options.name} ended while it started (${answer}); see ${options.logFile}.`;
    throw new MaskrouteError('start_failed', message);
  }
  if (answer.type === 'failed') {
    await ended;
    throw new MaskrouteError(answer.code, answer.message);
  }
  if (answer.type !== 'ready') throw new Error(`the ${options.name} began with ${answer.type}`);
  return {
    url: answer.url,
    workerUrl: answer.workerUrl,
    pid: child.pid!,
    ended,
    async drain(limit_ms) {
      const drained = once(child, 'message');
      tell({ type: 'drain' });
      await Promise.race([drained, ended, sleep(limit_ms, undefined, { ref: false })]);
    },
    stop,
  };
}

/** Kills the child and what it started: workerd survives a killed parent and would keep the port. */
function killGroup(pid: number | undefined): void {
  if (pid === undefined) return;
  try {
    process.kill(-pid, 'SIGKILL');
  } catch {
    // The group has ended.
  }
}

/* The child's end of the channel. */

type ToChild<Config> =
  | { readonly type: 'start'; readonly config: Config }
  | { readonly type: 'drain' }
  | { readonly type: 'stop' };
type FromChild =
  | ({ readonly type: 'ready' } & Addresses)
  | { readonly type: 'drained' }
  | { readonly type: 'failed'; readonly code: ErrorCode; readonly message: string };

type Service = Addresses & {
  /** Refuses new work and finishes running answers; `GET /v1/answers/{id}` still works. */
  drain?(): Promise<void>;
  close(): Promise<void>;
  /** Resolves with the reason once it can no longer work: then the child ends, so that its parent starts it again at once. */
  readonly gone?: Promise<string>;
};

/** How long a child may take to end once its parent is gone. */
const ORPHAN_CLOSE_ms = 2000;

/**
 * Runs a child: it starts and closes on its parent's messages, and ends when its parent is gone. It ignores SIGINT and
 * SIGTERM, as the parent decides in which order children stop.
 */
export function serveParent<Config>(start: (config: Config) => Promise<Service>): void {
  let service: Service | undefined;
  const tell = (message: FromChild) => process.send?.(message);
  const begin = async (config: Config) => {
    try {
      service = await start(config);
      tell({ type: 'ready', url: service.url, workerUrl: service.workerUrl });
      void service.gone?.then((reason) => {
        console.error(reason);
        process.exit(1);
      });
    } catch (error) {
      console.error(error);
      process.send?.(failure(error), () => process.exit(1));
    }
  };
  const drain = async () => {
    await service?.drain?.();
    tell({ type: 'drained' });
  };
  const end = async (code: number) => {
    await service?.close();
    process.exit(code);
  };
  process.on('message', (message: ToChild<Config>) => {
    switch (message.type) {
      case 'start':
        return void begin(message.config);
      case 'drain':
        return void drain();
      case 'stop':
        return void end(0);
    }
  });
  process.on('disconnect', () => {
    // The child leads its process group, so this also kills what it started.
    setTimeout(() => process.kill(-process.pid, 'SIGKILL'), ORPHAN_CLOSE_ms);
    void end(1);
  });
  process.on('SIGINT', () => undefined);
  process.on('SIGTERM', () => undefined);
  outliveOutput();
}

/** Ignores write errors of the output, such as a full disk; by default the second one ends the process. */
export function outliveOutput(): void {
  for (const output of [process.stdout, process.stderr]) output.on('error', () => undefined);
}

function failure(error: unknown): FromChild {
  if (error instanceof MaskrouteError) return { type: 'failed', code: error.code, message: error.message };
  const { message } = error instanceof Error ? error : toMaskrouteError(error);
  return { type: 'failed', code: 'start_failed', message };
}

/* The entry of the children of `npm start`; the argument says which part of the product to run. */

/** The backend's options that can be sent to another process. */
export type BackendConfig = Pick<
  BackendOptions,
  'home' | 'model' | 'port' | 'backendKey' | 'jobEntry' | 'collector' | 'threads'
>;

if (import.meta.main) {
  enableCompileCache(COMPILED_FOLDER);
  if (process.argv[2] === 'edge') {
    serveParent(async (options: EdgeOptions) => {
      const { startEdge } = await import('./local-edge.ts');
      return await startEdge(options);
    });
  } else {
    serveParent(async (config: BackendConfig) => {
      const main = await import('../main.ts');
      return await main.startBackend({ ...config, audience: main.OWN_ADDRESS });
    });
  }
}
