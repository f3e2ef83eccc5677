/** A child process of `npm start`: started, watched, started again when it dies, stopped with its whole group. */
import { fork } from 'node:child_process';
import { once } from 'node:events';
import { open } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import { MaskrouteError } from '../../shared/errors.ts';
import type { Addresses, FromChild, ToChild } from './child-protocol.ts';

export type ChildOptions<Config> = {
  /** For people: `backend`, `edge`. */
  readonly name: string;
  readonly entry: URL;
  readonly config: Config;
  /** The child's output goes to the end of this file. */
  readonly logFile: string;
};

export type Child = Addresses & {
  readonly pid: number;
  /** Resolves with the reason once the process has ended. */
  readonly ended: Promise<string>;
  /** Takes no new work; resolves when none runs, when the process has ended, or after `limit_ms`. */
  drain(limit_ms: number): Promise<void>;
  /** Closes in good order; killed when that takes longer than `limit_ms`. */
  stop(limit_ms: number): Promise<void>;
};

/** @throws MaskrouteError the child's own reason, or `start_failed` when it ends without one. */
export async function startChild<Config>(options: ChildOptions<Config>): Promise<Child> {
  const log = await open(options.logFile, 'a', 0o600);
  // A group of its own: a Ctrl-C in the terminal reaches the parent alone, and the group can be ended whole.
  const child = fork(options.entry, { detached: true, stdio: ['ignore', log.fd, log.fd, 'ipc'] });
  await log.close();
  const ended = once(child, 'exit').then(([code, signal]) => {
    killGroup(child.pid);
    return signal === null ? `exit code ${code}` : `signal ${signal}`;
  });
  const tell = (message: ToChild<Config>) => child.connected && child.send(message);
  tell({ type: 'start', config: options.config });

  const answer = await Promise.race([
    once(child, 'message').then(([message]) => message as FromChild),
    ended.then((reason) => reason),
  ]);
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
    async stop(limit_ms) {
      tell({ type: 'stop' });
      const inTime = await Promise.race([ended.then(() => true), sleep(limit_ms, false, { ref: false })]);
      if (!inTime) killGroup(child.pid);
      await ended;
    },
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
