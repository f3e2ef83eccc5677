/** Starts a Valkey server on loopback for benches and tests of queues. It writes nothing to disk. */
import { type ChildProcess, spawn } from 'node:child_process';
import { existsSync, readdirSync } from 'node:fs';
import path from 'node:path';
import { createInterface } from 'node:readline';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { maskrouteHome } from '../files.ts';
import { freePort } from '../ports.ts';
import { endChild } from '../processes.ts';

/** Where `scripts/test-tools.ts` unpacks Debian's packages. */
export const VALKEY_FOLDER = path.join(maskrouteHome(), 'tools', 'valkey');

const CANDIDATES = [
  '/usr/bin/valkey-server',
  '/usr/local/bin/valkey-server',
  '/opt/homebrew/bin/valkey-server',
  path.join(VALKEY_FOLDER, 'usr', 'bin', 'valkey-server'),
];

export const NO_VALKEY =
  'There is no valkey-server. Install one (npm run valkey, or Debian: apt-get install valkey-server), or name one in the environment variable VALKEY_SERVER.';

/**
 * The server's path; undefined when there is none. `VALKEY_SERVER` in the environment names another one.
 * @throws MaskrouteError `invalid_argument` when that one does not exist.
 */
export const findValkey = (): string | undefined => findTool('VALKEY_SERVER', CANDIDATES);

/** The program that the environment variable `name` names, or else the first of `candidates` that exists. */
export function findTool(name: string, candidates: readonly string[]): string | undefined {
  const named = process.env[name];
  if (named === undefined || named === '') return candidates.find((file) => existsSync(file));
  if (existsSync(named)) return named;
  throw new MaskrouteError('invalid_argument', `${name} names ${named}, and there is no such file.`);
}

/** `LD_LIBRARY_PATH` with the libraries that were unpacked beside the server. */
function libraryPath(): string {
  const folder = path.join(VALKEY_FOLDER, 'usr', 'lib');
  const own = existsSync(folder) ? readdirSync(folder).map((name) => path.join(folder, name)) : [];
  return [...own, process.env.LD_LIBRARY_PATH ?? ''].filter((name) => name !== '').join(':');
}

export type Valkey = AsyncDisposable & {
  readonly url: string;
  /** Kills the server; its data is lost. */
  stop(): Promise<void>;
  /** Starts an empty server at the same address. */
  start(): Promise<void>;
};

/** @throws MaskrouteError `start_failed`. */
export async function startValkey(): Promise<Valkey> {
  const server = findValkey();
  if (server === undefined) throw new MaskrouteError('start_failed', NO_VALKEY);
  const port = await freePort();
  let child = await launch(server, port);
  const stop = () => endChild(child, 'SIGKILL');
  return {
    url: `redis://127.0.0.1:${port}`,
    stop,
    async start() {
      child = await launch(server, port);
    },
    [Symbol.asyncDispose]: stop,
  };
}

async function launch(server: string, port: number): Promise<ChildProcess> {
  const child = spawn(
    server,
    ['--bind', '127.0.0.1', '--port', String(port), '--save', '', '--appendonly', 'no', '--daemonize', 'no'],
    { stdio: ['ignore', 'pipe', 'inherit'], env: { ...process.env, LD_LIBRARY_PATH: libraryPath() } },
  );
  const said: string[] = [];
  const ready = Promise.withResolvers<void>();
  createInterface({ input: child.stdout }).on('line', (line) => {
    said.push(line);
    if (line.includes('Ready to accept connections')) ready.resolve();
  });
  const failed = (reason: string) =>
    ready.reject(new MaskrouteError('start_failed', `${server} does not start: ${reason}`));
  child.once('error', ({ message }) => failed(message));
  child.once('exit', () => failed(said.at(-1) ?? 'it ended without a word'));
  await ready.promise;
  return child;
}
