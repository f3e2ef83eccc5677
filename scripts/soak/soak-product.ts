/** Starts the product of a soak: the edge of `npm start` with its D1, two backends, tenants and mask sets. */
import { rename } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { type BackendConfig, type Supervised, supervise } from '../../gpu-backend/dev/children.ts';
import { loadOrCreateKeys } from '../../gpu-backend/dev/dev-home.ts';
import { openBackups } from '../../gpu-backend/dev/local-database.ts';
import type { EdgeOptions } from '../../gpu-backend/dev/local-edge.ts';
import { seed } from '../../gpu-backend/dev/seed.ts';
import { DEFAULT_MODEL } from '../../gpu-backend/model/sources/resolve.ts';
import { type AdminClient, createAdminClient } from '../../gpu-backend/publication/admin-client.ts';
import { livePublication } from '../../gpu-backend/publication/publish.ts';
import { listSchema } from '../../shared/admin/admin-wire.ts';
import { maskSetSummarySchema } from '../../shared/admin/publication-wire.ts';
import { type MaskSet, maskSetSchema } from '../../shared/mask/mask-set.ts';
import { backendSchema } from '../../shared/wire/backend-load.ts';
import { createHome, removeHome } from '../../test/e2e/product.ts';
import { createTenant } from '../load/clients.ts';

const PROJECT_FOLDER = fileURLToPath(new URL('../..', import.meta.url));
/** The module around the edge's worker that can stall D1. */
const AROUND = fileURLToPath(new URL('./stallable-d1.ts', import.meta.url));
const BACKENDS = 2;
const STOP_ms = 60_000;
const READY_WITHIN_ms = 60_000;

/**
 * V8 flags that make leaks visible. V8 keeps garbage, and the native memory that belongs to it, while there is room. In
 * `npm start` each of workerd's sixteen isolates (ours, and those of D1, queues and limits) has a young generation of 16 MB
 * and more, which fills slowly. With these flags collections are frequent and full, so memory that grows is still referenced.
 * The old generation has the size that Cloudflare gives an isolate in all.
 */
export const EDGE_V8_FLAGS =
  '--gc-global --min-semi-space-size=1 --max-semi-space-size=2 --max-old-space-size=128';

/** A limit that is never reached: it only makes the budget count tokens. */
const BOOKS_ONLY = 1_000_000_000;
/** Fewer tokens than the tenant's clients need, so that some requests are refused. */
const TIGHT = 4_000;

/** The tenants of a soak. The last has its own mask sets. */
const TENANTS = [
  { id: 'unlimited', terms: {} },
  { id: 'counted', terms: { tokens_per_day: BOOKS_ONLY } },
  { id: 'tight', terms: { tokens_per_minute: TIGHT, tokens_per_day: BOOKS_ONLY } },
  { id: 'own-sets', terms: { tokens_per_day: BOOKS_ONLY } },
] as const;

type SoakTenant = { readonly id: string; readonly key: string; readonly hasBooks: boolean };

export type SoakProduct = {
  readonly edge: string;
  readonly model: string;
  readonly admin: AdminClient;
  /** D1's file. */
  readonly database: string;
  readonly backends: readonly Supervised[];
  readonly tenants: readonly SoakTenant[];
  /** Tenants for which the soak publishes; `''`: the default of all tenants. */
  readonly publishers: readonly string[];
  /** By version. */
  readonly maskSets: ReadonlyMap<string, MaskSet>;
  /** The version that is live for all tenants at first. */
  readonly live: string;
  /** Stops everything, and moves the edge's log to `folder`. */
  stop(folder: string): Promise<void>;
};

export async function startSoakProduct(say: (line: string) => void): Promise<SoakProduct> {
  const homes = Array.from({ length: BACKENDS }, createHome);
  const home = homes[0]!;
  const started: Supervised[] = [];
  const stop = async () => {
    const [edge, ...backends] = started.toReversed();
    for (const backend of backends) await backend.drain(STOP_ms);
    await edge?.stop(STOP_ms);
    for (const backend of backends) await backend.stop(STOP_ms);
  };
  try {
    const keys = await loadOrCreateKeys(home);
    for (const own of homes) {
      const { backendKey } = keys;
      const config = { home: own, model: DEFAULT_MODEL, port: 0, backendKey } satisfies BackendConfigOfSoak;
      const logFile = path.join(own, 'backend.log');
      started.push(await supervise({ name: 'backend', config, logFile }, say));
    }
    const backends = [...started];
    const bindings = {
      BACKEND_URL: backends[0]!.url,
      BACKEND_KEY: keys.backendKey,
      ADMIN_KEY: keys.adminKey,
    };
    const config: EdgeOptions = {
      projectFolder: PROJECT_FOLDER,
      stateFolder: path.join(home, 'edge'),
      port: 0,
      bindings,
      around: AROUND,
    };
    const edgeLog = path.join(home, 'edge.log');
    process.env.MINIFLARE_WORKERD_V8_FLAGS = EDGE_V8_FLAGS;
    const edge = await supervise({ name: 'edge', config, logFile: edgeLog }, say);
    started.push(edge);
    await untilReady(edge.url);
    const admin = createAdminClient(edge.url, keys.adminKey);
    await seed({ edge: edge.url, backend: backends[0]!.url }, keys, say);
    for (const [index, { url }] of backends.entries()) await register(admin, `backend-${index + 1}`, url);
    const database = await openBackups(home).database();
    if (database === undefined) throw new Error('the edge has no database');
    const publishers = ['', TENANTS.at(-1)!.id];
    const tenants = await createTenants(admin);
    const maskSets = await shareMaskSets(admin, publishers);
    const live = (await livePublication(admin, ''))!.version;
    return {
      edge: edge.url,
      model: DEFAULT_MODEL,
      admin,
      database,
      backends,
      tenants,
      publishers,
      maskSets,
      live,
      async stop(folder) {
        await stop();
        await rename(edgeLog, path.join(folder, 'edge.log')).catch(() => {});
        for (const own of homes) removeHome(own);
      },
    };
  } catch (error) {
    await stop();
    for (const own of homes) removeHome(own);
    throw error;
  }
}

type BackendConfigOfSoak = Pick<BackendConfig, 'home' | 'model' | 'port' | 'backendKey'>;

async function untilReady(url: string): Promise<void> {
  const deadline_ms = performance.now() + READY_WITHIN_ms;
  while (!(await isReady(url))) {
    if (performance.now() > deadline_ms) throw new Error(`${url} is not ready`);
    await sleep(100);
  }
}

export async function isReady(url: string): Promise<boolean> {
  const response = await fetch(`${url}/readyz`).catch(() => undefined);
  await response?.body?.cancel();
  return response?.ok === true;
}

const register = (admin: AdminClient, id: string, url: string) =>
  admin.request({ method: 'POST', path: '/backends', body: { id, url } }, backendSchema);

async function createTenants(admin: AdminClient): Promise<SoakTenant[]> {
  const made: SoakTenant[] = [];
  for (const { id, terms } of TENANTS) {
    const key = await createTenant(admin, id, terms);
    made.push({ id, key, hasBooks: 'tokens_per_day' in terms });
  }
  return made;
}

/** Stores the seed's presets for each publisher; returns them by version. */
async function shareMaskSets(
  admin: AdminClient,
  publishers: readonly string[],
): Promise<Map<string, MaskSet>> {
  const stored = await admin.request({ method: 'GET', path: '/mask-sets' }, listSchema(maskSetSummarySchema));
  const sets = new Map<string, MaskSet>();
  for (const { version } of stored.data) {
    const set = await admin.request({ method: 'GET', path: `/mask-sets/${version}` }, maskSetSchema);
    sets.set(version, set);
    for (const tenant of publishers.filter((id) => id !== '')) {
      const path = `/mask-sets?tenant=${tenant}`;
      await admin.request({ method: 'POST', path, body: set }, maskSetSummarySchema);
    }
  }
  return sets;
}
