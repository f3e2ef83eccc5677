/**
 * The whole product on one machine: the default model, a backend, the edge in workerd with its own D1, a key,
 * a live mask set. Everything that lasts is under `home`; a killed start leaves nothing that stops the next.
 */
import { mkdir, rename } from 'node:fs/promises';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { DEFAULT_MODEL } from '../model/sources/default-model.ts';
import { createAdminClient } from '../publication/admin-client.ts';
import { readMaskSet } from '../publication/artefact-files.ts';
import type { BackendConfig } from './backend-process.ts';
import { type Backups, openBackups, watchFile } from './backups.ts';
import { type Supervised, supervise } from './children.ts';
import {
  type DevFile,
  type DevKeys,
  loadOrCreateKeys,
  lockHome,
  removeDevFile,
  saveKeys,
  writeDevFile,
} from './dev-home.ts';
import type { EdgeOptions } from './local-edge.ts';
import { expectFreePort } from './ports.ts';
import { ensureApiKey, ensurePreset, storePreset, waitReady } from './seed.ts';

const PROJECT_FOLDER = fileURLToPath(new URL('../..', import.meta.url));
const PRESETS_FOLDER = path.join(PROJECT_FOLDER, 'gpu-backend/presets', DEFAULT_MODEL);
/** What a fresh start makes live, and what it only stores, for the operator to activate. */
const LIVE_PRESET = 'mask-set.json';
const STORED_PRESETS = ['mask-set-25.json', 'mask-set-blocks.json', 'mask-set-blocks-25.json'];
const presetFile = (name: string): string => path.join(PRESETS_FOLDER, name);
const READY_WITHIN_ms = 60_000;
/** Longer than a backend takes to finish what runs, or to end it. */
const BACKEND_STOP_ms = 60_000;
/** Longer than the edge takes to have counted all that it knows. */
const EDGE_STOP_ms = 60_000;

export type ProductOptions = {
  readonly home: string;
  /** 0 picks a free one. */
  readonly port: number;
  readonly backendPort: number;
  /** Whose pages may call the edge; undefined: as `wrangler.toml` says. */
  readonly allowedOrigins?: string | undefined;
  /** A copy of the database to begin with, in place of what is there. */
  readonly restore?: string | undefined;
  /** Gets one line for people about what goes on. */
  readonly say: (line: string) => void;
  /** Installs the model in `home` unless it is there. */
  readonly ensureModel: (name: string) => Promise<void>;
  /** Aborting ends a start that is under way. */
  readonly signal: AbortSignal;
};

export type Product = { readonly dev: DevFile; stop(): Promise<void> };

type Parts = { backend?: Supervised; edge?: Supervised; unwatch?: () => void };

/** @throws MaskrouteError `already_running`, `port_in_use`, `start_failed`, and what a model pull throws. */
export async function startProduct(options: ProductOptions): Promise<Product> {
  const { home } = options;
  await mkdir(path.join(home, 'logs'), { recursive: true, mode: 0o700 });
  const unlock = lockHome(home);
  const parts: Parts = {};
  const backups = openBackups(home);
  const stop = async () => {
    parts.unwatch?.();
    await removeDevFile(home);
    // The backend finishes what runs while the edge still carries its answers, and stays until the edge has asked it
    // what those cost whose clients left.
    await parts.backend?.drain(BACKEND_STOP_ms);
    await parts.edge?.stop(EDGE_STOP_ms);
    await parts.backend?.stop(BACKEND_STOP_ms);
    if (parts.edge !== undefined) await backUp(backups, options.say);
    unlock();
  };
  try {
    return { dev: await startParts(options, parts, backups), stop };
  } catch (error) {
    await stop();
    throw error;
  }
}

async function startParts(options: ProductOptions, parts: Parts, backups: Backups): Promise<DevFile> {
  const { home, signal } = options;
  await removeDevFile(home);
  await expectFreePort(options.port, 'PORT');
  await expectFreePort(options.backendPort, 'BACKEND_PORT');
  for (const name of ['backend', 'edge']) await keepPrevious(logFile(home, name));
  const keys = await loadOrCreateKeys(home);
  if (options.restore !== undefined) await backups.restore(options.restore);
  await backUp(backups, options.say);
  await sayIfLost(options, keys, backups);
  await options.ensureModel(DEFAULT_MODEL);
  signal.throwIfAborted();

  parts.backend = await startBackendChild(options, keys);
  signal.throwIfAborted();
  parts.edge = await startEdgeChild(options, keys, parts.backend.url);
  await waitReady(parts.backend.url, READY_WITHIN_ms, signal);
  await waitReady(parts.edge.url, READY_WITHIN_ms, signal);
  const database = await backups.database();
  if (database !== undefined) parts.unwatch = watchFile(database, () => sayGone(options, database, backups));

  const apiKey = await seed(options, keys, parts.edge.url);
  signal.throwIfAborted();
  const { adminKey, backendKey } = keys;
  const dev = {
    edge: parts.edge.url,
    backend: parts.backend.url,
    apiKey,
    adminKey,
    backendKey,
    model: DEFAULT_MODEL,
  };
  await writeDevFile(home, dev);
  return dev;
}

/** A start or a stop goes on without a copy: it is there for a bad day, and this may be one. */
async function backUp(backups: Backups, say: ProductOptions['say']): Promise<void> {
  await backups
    .backUp()
    .catch((error: Error) => say(`The local database could not be copied to backup/: ${error.message}`));
}

/** Whoever kept a key had a database. */
async function sayIfLost({ home, say }: ProductOptions, keys: DevKeys, backups: Backups): Promise<void> {
  const copy = await backups.newest();
  if ((keys.apiKey === undefined && copy === undefined) || (await backups.database()) !== undefined) return;
  say(`The local database is gone from ${path.join(home, 'edge')}, and with it tenants, keys, mask sets, experiments and usage.
This start begins with an empty one. ${howToRestore(copy)}`);
}

async function sayGone({ say }: ProductOptions, file: string, backups: Backups): Promise<void> {
  const copy = await backups.newest();
  say(`The local database was deleted or replaced while Maskroute runs (${file}).
What is written from now on is lost when it stops. ${howToRestore(copy)}`);
}

const howToRestore = (copy: string | undefined): string =>
  copy === undefined
    ? 'There is no copy to go back to.'
    : `To go back to the newest copy, stop it and start with: npm start -- --restore=${copy}`;

const startBackendChild = ({ home, backendPort, say }: ProductOptions, keys: DevKeys): Promise<Supervised> =>
  supervise<BackendConfig>(
    {
      name: 'backend',
      entry: new URL('./backend-process.ts', import.meta.url),
      config: { home, model: DEFAULT_MODEL, port: backendPort, backendKey: keys.backendKey },
      logFile: logFile(home, 'backend'),
    },
    say,
  );

const startEdgeChild = (
  { home, port, allowedOrigins, say }: ProductOptions,
  { adminKey, backendKey }: DevKeys,
  backendUrl: string,
): Promise<Supervised> =>
  supervise<EdgeOptions>(
    {
      name: 'edge',
      entry: new URL('./edge-process.ts', import.meta.url),
      config: {
        projectFolder: PROJECT_FOLDER,
        stateFolder: path.join(home, 'edge'),
        port,
        bindings: {
          ...{ BACKEND_URL: backendUrl, BACKEND_KEY: backendKey, ADMIN_KEY: adminKey },
          ...(allowedOrigins === undefined ? {} : { ALLOWED_ORIGINS: allowedOrigins }),
        },
      },
      logFile: logFile(home, 'edge'),
    },
    say,
  );

const logFile = (home: string, name: string): string => path.join(home, 'logs', `${name}.log`);

/** The last run's log stays beside this one's; older ones go. */
async function keepPrevious(file: string): Promise<void> {
  await rename(file, `${file}.previous`).catch((error: NodeJS.ErrnoException) => {
    if (error.code !== 'ENOENT') throw error;
  });
}

/** The API key that works. */
async function seed({ home, say }: ProductOptions, keys: DevKeys, edgeUrl: string): Promise<string> {
  const client = createAdminClient(edgeUrl, keys.adminKey);
  const apiKey = await ensureApiKey(client, keys.apiKey);
  if (apiKey !== keys.apiKey) await saveKeys(home, { ...keys, apiKey });
  const preset = await ensurePreset(client, await readMaskSet(presetFile(LIVE_PRESET)));
  if (preset === 'kept_other') say('A mask set other than the preset is live, and stays live.');
  if (preset === 'other_model') {
    say(`The preset mask set is for other weights than these of ${DEFAULT_MODEL}; requests run dense.`);
  } else {
    for (const file of [LIVE_PRESET, ...STORED_PRESETS]) await storePreset(client, presetFile(file));
  }
  return apiKey;
}
