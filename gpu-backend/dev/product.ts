/**
 * Runs the whole product on one machine: the default model, a backend, the edge in workerd with a local D1, a key, a live
 * mask set. All persistent data is under `home`; a killed run does not prevent the next start.
 */
import { rename } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import yoctoSpinner from 'yocto-spinner';
import { type Collector, variablesOf } from '../../shared/tracing/traces.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { pullModel } from '../cli/models.ts';
import { createReporter } from '../cli/reporter.ts';
import { makeFolder } from '../files.ts';
import { withLargePages } from '../large-pages.js';
import { DEFAULT_MODEL } from '../model/sources/resolve.ts';
import { expectFreePort } from '../ports.ts';
import { type BackendConfig, type Supervised, supervise } from './children.ts';
import {
  type DevFile,
  type DevKeys,
  loadOrCreateKeys,
  lockHome,
  removeDevFile,
  saveKeys,
  writeDevFile,
} from './dev-home.ts';
import { type Backups, openBackups, watchFile } from './local-database.ts';
import type { EdgeOptions } from './local-edge.ts';
import { seed } from './seed.ts';

const PROJECT_FOLDER = fileURLToPath(new URL('../..', import.meta.url));
const CLI = fileURLToPath(new URL('../cli/cli.ts', import.meta.url));
const READY_WITHIN_ms = 60_000;
/** Longer than a backend takes to finish or abort its running answers. */
const BACKEND_STOP_ms = 60_000;
/** Longer than the edge takes to count all usage. */
const EDGE_STOP_ms = 60_000;

type ProductOptions = {
  readonly home: string;
  /** 0 picks a free one. */
  readonly port: number;
  readonly backendPort: number;
  /** Threads of the engine. */
  readonly threads: number;
  /** CORS: origins that may call the edge; undefined: as in `wrangler.toml`. */
  readonly allowedOrigins?: string | undefined;
  /** The collector of both parts' spans; undefined: tracing is off. */
  readonly collector?: Collector | undefined;
  /** A copy of the database that replaces the present one. */
  readonly restore?: string | undefined;
  /** Gets single lines for users. */
  readonly say: (line: string) => void;
  /** Shows the steps of the start. */
  readonly step: Step;
  /** Aborting cancels a running start. */
  readonly signal: AbortSignal;
};

type Product = { readonly dev: DevFile; stop(): Promise<void> };

type Parts = { backend?: Supervised; edge?: Supervised; unwatch?: () => void };

/** @throws MaskrouteError `already_running`, `port_in_use`, `start_failed`, and what a model pull throws. */
export async function startProduct(options: ProductOptions): Promise<Product> {
  const { home } = options;
  await makeFolder(logFolder(home), 0o700);
  const unlock = lockHome(home);
  const parts: Parts = {};
  const backups = openBackups(home);
  const stop = async () => {
    try {
      await stopParts(options, parts, backups);
    } finally {
      unlock();
    }
  };
  try {
    return { dev: await startParts(options, parts, backups), stop };
  } catch (error) {
    await stop();
    throw error;
  }
}

/** Adds each child to `parts` as soon as it runs, so that a start that fails half-way can be stopped. */
async function startParts(options: ProductOptions, parts: Parts, backups: Backups): Promise<DevFile> {
  const { home, say, step, signal } = options;
  await removeDevFile(home);
  if (options.port !== 0 && options.port === options.backendPort) {
    const message = `PORT and BACKEND_PORT are both ${options.port}. Set one of them to another port.`;
    throw new MaskrouteError('invalid_argument', message);
  }
  // Before anything slow starts.
  await expectFreePort(options.port, 'PORT');
  await expectFreePort(options.backendPort, 'BACKEND_PORT');
  for (const name of ['backend', 'edge']) await keepPrevious(logFile(home, name));
  const keys = await loadOrCreateKeys(home);
  if (options.restore !== undefined) await backups.restore(options.restore);
  await expectReadable(home, backups);
  await backUp(backups, say);
  await sayIfLost(options, keys, backups);
  await step(`The model ${DEFAULT_MODEL} is installed`, () => installModel(home, signal));
  signal.throwIfAborted();

  const { adminKey, backendKey } = keys;
  parts.backend = await step('The backend has the model in memory', () =>
    supervise(backendChild(options, keys), say, signal),
  );
  const backend = parts.backend.url;
  signal.throwIfAborted();
  parts.edge = await step('The edge runs in workerd, with its database', () =>
    supervise(edgeChild(options, keys, backend), say, signal),
  );
  const edge = parts.edge.url;
  for (const url of [backend, edge]) await waitReady(url, signal);
  const database = await backups.database();
  if (database !== undefined) parts.unwatch = watchFile(database, () => sayGone(options, database, backups));

  const apiKey = await step('A tenant, its key and the mask sets are in place', () =>
    seed({ edge, backend }, keys, say),
  );
  if (apiKey !== keys.apiKey) await saveKeys(home, { ...keys, apiKey });
  signal.throwIfAborted();
  const dev = { edge, backend, apiKey, adminKey, backendKey, model: DEFAULT_MODEL };
  await writeDevFile(home, dev);
  return dev;
}

/**
 * Drains the backend first, while the edge still forwards its answers. The backend stops last, since the edge asks it for
 * the cost of answers whose clients left.
 */
async function stopParts({ home, say }: ProductOptions, parts: Parts, backups: Backups): Promise<void> {
  parts.unwatch?.();
  await removeDevFile(home).catch((error: Error) => say(`dev.json could not be removed: ${error.message}`));
  await parts.backend?.drain(BACKEND_STOP_ms);
  await parts.edge?.stop(EDGE_STOP_ms);
  await parts.backend?.stop(BACKEND_STOP_ms);
  if (parts.edge !== undefined) await backUp(backups, say);
}

const backendChild = (
  { home, backendPort: port, threads, collector }: ProductOptions,
  { backendKey }: DevKeys,
) => ({
  name: 'backend',
  config: {
    home,
    model: DEFAULT_MODEL,
    port,
    backendKey,
    jobEntry: CLI,
    threads,
    collector,
  } satisfies BackendConfig,
  env: withLargePages(process.env),
  logFile: logFile(home, 'backend'),
});

const edgeChild = (
  { home, port, allowedOrigins, collector }: ProductOptions,
  { adminKey, backendKey }: DevKeys,
  backendUrl: string,
) => ({
  name: 'edge',
  config: {
    projectFolder: PROJECT_FOLDER,
    stateFolder: path.join(home, 'edge'),
    port,
    bindings: {
      BACKEND_URL: backendUrl,
      BACKEND_KEY: backendKey,
      ADMIN_KEY: adminKey,
      ...(allowedOrigins === undefined ? {} : { ALLOWED_ORIGINS: allowedOrigins }),
      ...(collector && variablesOf(collector)),
    },
  } satisfies EdgeOptions,
  logFile: logFile(home, 'edge'),
});

export const logFolder = (home: string): string => path.join(home, 'logs');
const logFile = (home: string, name: string): string => path.join(logFolder(home), `${name}.log`);

/** Keeps the log of the last run as `.previous`. */
async function keepPrevious(file: string): Promise<void> {
  await rename(file, `${file}.previous`).catch((error: NodeJS.ErrnoException) => {
    if (error.code !== 'ENOENT') throw error;
  });
}

/** Installs the default model, with its progress on the terminal, unless it is there. */
async function installModel(home: string, signal: AbortSignal): Promise<void> {
  const { stop, ...hooks } = createReporter();
  try {
    await pullModel(DEFAULT_MODEL, { home, weights: 'q8', signal, ...hooks });
  } finally {
    stop();
  }
}

/* The local database: copies of it, and messages about it. */

/** A failed copy is reported but stops neither a start nor a stop. */
async function backUp(backups: Backups, say: ProductOptions['say']): Promise<void> {
  await backups
    .backUp()
    .catch((error: Error) => say(`The local database could not be copied to backup/: ${error.message}`));
}

/** @throws MaskrouteError `start_failed` with the reason; workerd would only report an internal error. */
async function expectReadable(home: string, backups: Backups): Promise<void> {
  const found = await backups.unreadable();
  if (found === undefined) return;
  const { file, cause, reason } = found;
  const waysOut = {
    locked: 'Another program has it open. End that program, and start again: nothing is lost.',
    disk: 'If the disk is full, make room, and start again: nothing is lost.',
    closed:
      'Let it be a file, and let this user write to it and to its folder; then start again: nothing is lost.',
    damaged: `${howToRestore(await backups.newest())}
To begin with an empty one, move ${path.join(home, 'edge')} away.`,
  };
  const message = `The local database cannot be read (${file}: ${reason}).\n${waysOut[cause]}`;
  throw new MaskrouteError('start_failed', message);
}

/** Reports a lost database: there is a key or a copy from an earlier run, but no database. */
async function sayIfLost({ home, say }: ProductOptions, keys: DevKeys, backups: Backups): Promise<void> {
  const copy = await backups.newest();
  if ((keys.apiKey === undefined && copy === undefined) || (await backups.database()) !== undefined) return;
  say(`The local database is gone from ${path.join(home, 'edge')}, and with it tenants, keys, mask sets, experiments and usage.
This start begins with an empty one. ${howToRestore(copy, 'stop it and start with')}`);
}

async function sayGone({ say }: ProductOptions, file: string, backups: Backups): Promise<void> {
  const copy = await backups.newest();
  say(`The local database was deleted or replaced while Maskroute runs (${file}).
What is written from now on is lost when it stops. ${howToRestore(copy, 'stop it and start with')}`);
}

const howToRestore = (copy: string | undefined, how = 'start with'): string =>
  copy === undefined
    ? 'There is no copy to go back to.'
    : `To go back to the newest copy, ${how}: npm start -- --restore=${copy}`;

/* Checks that servers are ready. */

const READY_POLL_ms = 50;
const ANSWER_TIMEOUT_ms = 5000;
const REASON_CHARS_MAX = 500;

/** Polls `/readyz` until it succeeds. @throws MaskrouteError `start_failed` with the last answer; the reason of `signal`. */
async function waitReady(url: string, signal: AbortSignal): Promise<void> {
  const deadline_ms = performance.now() + READY_WITHIN_ms;
  for (;;) {
    const answer = await ask(`${url}/readyz`);
    if (answer === 'ready') return;
    if (performance.now() > deadline_ms) {
      const message = `${url} is not ready after ${READY_WITHIN_ms / 1000} s: ${answer}`;
      throw new MaskrouteError('start_failed', message);
    }
    await sleep(READY_POLL_ms, undefined, { signal });
  }
}

async function ask(url: string): Promise<string> {
  try {
    const response = await fetch(url, { signal: AbortSignal.timeout(ANSWER_TIMEOUT_ms) });
    const text = await response.text();
    return response.ok ? 'ready' : text.slice(0, REASON_CHARS_MAX);
  } catch (error) {
    return String((error as Error).cause ?? error);
  }
}

/* The progress of a start: a spinner and a tick on a terminal, elsewhere a line for each finished step. */

/** Shows `title` while `work` runs, then a tick and its time. @throws as `work`. */
type Step = <T>(title: string, work: () => Promise<T>) => Promise<T>;

export function createStep(out: NodeJS.WriteStream = process.stdout): Step {
  return async (title, work) => {
    const start_ms = performance.now();
    // The caller handles signals: running answers finish first.
    const spinner = yoctoSpinner({ text: title, stream: out, handleSignals: false });
    if (out.isTTY) spinner.start();
    try {
      const result = await work();
      const took_s = ((performance.now() - start_ms) / 1000).toFixed(1);
      if (out.isTTY) spinner.success(`${title} (${took_s} s)`);
      else out.write(`✔ ${title} (${took_s} s)\n`);
      return result;
    } catch (error) {
      if (out.isTTY) spinner.error();
      else out.write(`✖ ${title}\n`);
      throw error;
    }
  };
}
