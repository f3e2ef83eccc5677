/** Finds a free port, and waits until a given one is free; the error says how to choose another. */
import { once } from 'node:events';
import { type AddressInfo, createServer } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { MaskrouteError } from '../shared/wire/errors.ts';

/** `variable`: the environment variable that chooses the port. */
export function portInUse(port: number, variable: string, cause?: unknown): MaskrouteError {
  const message = `Port ${port} is in use by another program. Set ${variable} to another port, or to 0 for any.`;
  return new MaskrouteError('port_in_use', message, { cause });
}

/** The children of a killed run need a moment to end. */
const FREED_WITHIN_ms = 3000;
const PORT_POLL_ms = 100;

/** @throws MaskrouteError `port_in_use` when another program keeps it. */
export async function expectFreePort(port: number, variable: string): Promise<void> {
  const deadline_ms = performance.now() + FREED_WITHIN_ms;
  while (port !== 0 && !(await isFree(port))) {
    if (performance.now() > deadline_ms) throw portInUse(port, variable);
    await sleep(PORT_POLL_ms);
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

/** A port that was free a moment ago, for servers that cannot pick one themselves. */
export async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address() as AddressInfo;
  await new Promise((resolve) => server.close(resolve));
  return port;
}
