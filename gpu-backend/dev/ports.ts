/** Ports as the environment names them, found free before anything slow starts. */
import { once } from 'node:events';
import { createServer } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { pullModel } from '../cli/models.ts';
import { createReporter } from '../cli/terminal.ts';

/** The children of a killed run need a moment to notice and go. */
const FREED_WITHIN_ms = 3000;
const POLL_ms = 100;

/** @throws MaskrouteError `invalid_argument` unless the variable is absent or a port; 0 means any free one. */
export function portFrom(env: NodeJS.ProcessEnv, name: string, preset: number): number {
  const text = env[name];
  if (text === undefined || text === '') return preset;
  const port = Number(text);
  if (/^\d+$/.test(text) && port <= 65_535) return port;
  throw new MaskrouteError('invalid_argument', `${name} must be a port from 0 to 65535, not "${text}".`);
}

/** @throws MaskrouteError `port_in_use` when another program keeps it. */
export async function expectFreePort(port: number, name: string): Promise<void> {
  const deadline_ms = performance.now() + FREED_WITHIN_ms;
  while (port !== 0 && !(await isFree(port))) {
    if (performance.now() > deadline_ms) {
      const message = `Port ${port} is in use by another program. Set ${name} to another port, or to 0 for any.`;
      throw new MaskrouteError('port_in_use', message);
    }
    await sleep(POLL_ms);
  }
}

async function isFree(port: number): Promise<boolean> {
  const server = createServer();
  try {
    server.listen(port, '127.0.0.1');
    await once(server, 'listening');
    return true;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'EADDRINUSE') return false;
    throw error;
  } finally {
    server.close();
  }
}

/* Installs a model with its progress on the terminal, unless it is there. */

export async function installModel(home: string, name: string, signal: AbortSignal): Promise<void> {
  const { stop, ...hooks } = createReporter();
  try {
    await pullModel(name, { home, weights: 'q8', signal, ...hooks });
  } finally {
    stop();
  }
}
