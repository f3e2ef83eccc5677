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
import { type DevFile, removeDevFile, writeDevFile } from './dev-file.ts';
import type { EdgeOptions } from './edge.ts';
import { lockHome } from './home-lock.ts';
import { type DevKeys, loadOrCreateKeys, saveKeys } from './keys.ts';
import { expectFreePort } from './ports.ts';
import { ensureApiKey, ensurePreset, storePreset } from './seed.ts';
import { type Supervised, supervise } from './supervise.ts';
import { waitReady } from './wait-ready.ts';

const PROJECT_FOLDER = fileURLToPath(new URL('../..', import.meta.url));
const PRESETS_FOLDER = path.join(PROJECT_FOLDER, 'gpu-backend/presets', DEFAULT_MODEL);
/** What a fresh start makes live, and what it only stores, for the operator to activate. */
const LIVE_PRESET = 'mask-set.json';
const STORED_PRESETS = ['mask-set-25.json', 'mask-set-blocks.json', 'mask-set-blocks-25.json'];
const presetFile = (name: string): string => path.join(PRESETS_FOLDER, name);
const READY_WITHIN_ms = 60_000;
/** Longer than a backend takes to finish what runs, or to end it. */
const BACKEND_STOP_ms = 60_000;
const EDGE_STOP_ms = 5000;

export type ProductOptions = {
  readonly home: string;
  /** 0 picks a free one. */
  readonly port: number;
  readonly backendPort: number;
  /** Gets one line for people about what goes on. */
  readonly say: (line: string) => void;
  /** Installs the model in `home` unless it is there. */
  readonly ensureModel: (name: string) => Promise<void>;
  /** Aborting ends a start that is under way. */
  readonly signal: AbortSignal;
};

export type Product = { readonly dev: DevFile; stop(): Promise<void> };

type Parts = { backend?: Supervised; edge?: Supervised };

/** @throws MaskrouteError `already_running`, `port_in_use`, `start_failed`, and what a model pull throws. */
export async function startProduct(options: ProductOptions): Promise<Product> {
  const { home } = options;
  await mkdir(path.join(home, 'logs'), { recursive: true, mode: 0o700 });
  const unlock = lockHome(home);
  const parts: Parts = {};
  const stop = async () => {
    await removeDevFile(home);
    // The backend finishes what runs while the edge still carries its answers.
    await parts.backend?.stop(BACKEND_STOP_ms);
    await parts.edge?.stop(EDGE_STOP_ms);
    unlock();
  };
  try {
    return { dev: await startParts(options, parts), stop };
  } catch (error) {
    await stop();
    throw error;
  }
}

async function startParts(options: ProductOptions, parts: Parts): Promise<DevFile> {
  const { home, signal } = options;
  await removeDevFile(home);
  await expectFreePort(options.port, 'PORT');
  await expectFreePort(options.backendPort, 'BACKEND_PORT');
  for (const name of ['backend', 'edge']) await keepPrevious(logFile(home, name));
  const keys = await loadOrCreateKeys(home);
  await options.ensureModel(DEFAULT_MODEL);
  signal.throwIfAborted();

  parts.backend = await startBackendChild(options, keys);
  signal.throwIfAborted();
  parts.edge = await startEdgeChild(options, keys, parts.backend.url);
  await waitReady(parts.backend.url, READY_WITHIN_ms, signal);
  await waitReady(parts.edge.url, READY_WITHIN_ms, signal);

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
  { home, port, say }: ProductOptions,
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
        bindings: { BACKEND_URL: backendUrl, BACKEND_KEY: backendKey, ADMIN_KEY: adminKey },
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
