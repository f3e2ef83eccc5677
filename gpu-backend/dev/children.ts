/**
 * The child processes of `npm start`: the backend may crash without the edge, and the edge takes workerd with it when it
 * ends. A child that dies is started again on its old port, later each time that it dies soon, and so is a child that lives and
 * does not answer any more. Both ends of the channel between parent and child are here.
 */
import { fork } from 'node:child_process';
import { once } from 'node:events';
import { open } from 'node:fs/promises';
import { enableCompileCache } from 'node:module';
import { setTimeout as sleep } from 'node:timers/promises';
import { type ErrorCode, MaskrouteError, toMaskrouteError } from '../../shared/wire/errors.ts';
import { COMPILED_FOLDER } from '../files.ts';
import type { BackendOptions } from '../main.ts';
import type { EdgeOptions } from './local-edge.ts';

type ChildOptions<Config> = {
  /** For people, and the entry's only argument: `backend`, `edge`. */
  readonly name: string;
  /** A part of the product unless it is named. */
  readonly entry?: URL;
  readonly config: Config;
  /** The child's output goes to the end of this file. */
  readonly logFile: string;
  /** Tests wait for less. */
  readonly probe?: typeof PROBE;
  readonly start_ms?: number;
};

/** A large model on a slow disk takes a minute; what takes longer than this hangs. */
const START_ms = 10 * 60_000;

/**
 * Every child says at `/healthz` whether it can still do its work. A child that fails `failuresMax` times in a row is killed: its engine
 * has stopped, its workerd did not come back, or it hangs.
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
/** A child that ran this long starts again with the first delay. */
const STEADY_ms = 60_000;

/**
 * The first start must succeed, and `signal` calls it off; later ones are tried until the child drains or stops.
 * `say` gets one line whenever the child died or came back.
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
  /** It is not started again. */
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

/** How a child ended: by itself, or killed here because it did not answer any more. A child that is being stopped is left alone. */
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
  return 'it did not answer any more';
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

/** `workerUrl`: the edge's worker itself, past the door in front of it. */
type Addresses = { readonly url: string; readonly workerUrl?: string | undefined };

type Child = Addresses & {
  readonly pid: number;
  /** Resolves with the reason once the process has ended. */
  readonly ended: Promise<string>;
  /** Takes no new work; resolves when none runs, when the process has ended, or after `limit_ms`. */
  drain(limit_ms: number): Promise<void>;
  /** Closes in good order; killed when that takes longer than `limit_ms`. */
  stop(limit_ms: number): Promise<void>;
};

/** How long a child may take to end whose start is called off, or takes too long. */
const CALLED_OFF_ms = 3000;

/**
 * @throws MaskrouteError the child's own reason, or `start_failed` when it ends without one or does not start in time; the
 * reason of `signal`. Nothing is left of the child then.
 */
export async function startChild<Config>(
  options: ChildOptions<Config>,
  signal?: AbortSignal,
): Promise<Child> {
  signal?.throwIfAborted();
  const { start_ms = START_ms } = options;
  const log = await open(options.logFile, 'a', 0o600);
  // A group of its own: a Ctrl-C in the terminal reaches the parent alone, and the group can be ended whole.
  const child = fork(options.entry ?? new URL(import.meta.url), [options.name], {
    detached: true,
    stdio: ['ignore', log.fd, log.fd, 'ipc'],
  });
  await log.close();
  const ended = once(child, 'exit').then(([code, signal]) => {
    killGroup(child.pid);
    return signal === null ? `exit code ${code}` : `signal ${signal}`;
  });
  // To a child that has just died nothing can be sent; `ended` says so.
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
      .catch(() => undefined),
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

/** Ends what the child started too: workerd outlives a killed parent and would keep the port. */
function killGroup(pid: number | undefined): void {
  if (pid === undefined) return;
  try {
    process.kill(-pid, 'SIGKILL');
  } catch {
    // Nothing is left of the group.
  }
}

/* The child's end. */

type ToChild<Config> =
  | { readonly type: 'start'; readonly config: Config }
  | { readonly type: 'drain' }
  | { readonly type: 'stop' };
type FromChild =
  | ({ readonly type: 'ready' } & Addresses)
  | { readonly type: 'drained' }
  | { readonly type: 'failed'; readonly code: ErrorCode; readonly message: string };

type Service = Addresses & {
  /** Takes no new work and ends what runs; it still answers questions about that. */
  drain?(): Promise<void>;
  close(): Promise<void>;
};

/** How long a child may take to end once its parent is gone. */
const ORPHAN_CLOSE_ms = 2000;

/**
 * The child's whole life: it starts when its parent says so, closes when its parent says so, and goes when its parent is
 * gone (killed, perhaps). Signals are the parent's business: it decides in which order things stop.
 */
export function serveParent<Config>(start: (config: Config) => Promise<Service>): void {
  let service: Service | undefined;
  const tell = (message: FromChild) => process.send?.(message);
  const begin = async (config: Config) => {
    try {
      service = await start(config);
      tell({ type: 'ready', url: service.url, workerUrl: service.workerUrl });
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
    // The child leads a group of its own, so this ends what it has started too.
    setTimeout(() => process.kill(-process.pid, 'SIGKILL'), ORPHAN_CLOSE_ms);
    void end(1);
  });
  process.on('SIGINT', () => undefined);
  process.on('SIGTERM', () => undefined);
  outliveOutput();
}

/** A full disk costs this process lines of its output, and nothing else; by default the second lost line ends it. */
export function outliveOutput(): void {
  for (const output of [process.stdout, process.stderr]) output.on('error', () => undefined);
}

function failure(error: unknown): FromChild {
  if (error instanceof MaskrouteError) return { type: 'failed', code: error.code, message: error.message };
  const { message } = error instanceof Error ? error : toMaskrouteError(error);
  return { type: 'failed', code: 'start_failed', message };
}

/* This file is also what a child of `npm start` runs: its argument says which part of the product it is. */

/** What can cross a process boundary of the backend's options. */
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
