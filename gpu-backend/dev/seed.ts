/**
 * Seeds a fresh edge with a tenant, its key, and a live mask set, through the admin API. Idempotent.
 */
import { existsSync } from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { createdKeySchema, DEFAULT_TENANT, tenantSchema } from '../../shared/admin/admin-wire.ts';
import { type MaskSet, maskSetVersion } from '../../shared/mask/mask-set.ts';
import { type ErrorCode, MaskrouteError } from '../../shared/wire/errors.ts';
import { type ModelEntry, modelListSchema } from '../../shared/wire/protocol.ts';
import { DEFAULT_MODEL } from '../model/sources/resolve.ts';
import {
  type AdminClient,
  createAdminClient,
  createBackendClient,
  createTenantClient,
  type Requests,
} from '../publication/admin-client.ts';
import {
  livePublication,
  namesOfVersions,
  publishMaskSet,
  readEvaluation,
  readMaskSet,
  storeEvaluation,
  storeMaskSet,
  wasPublished,
} from '../publication/publish.ts';
import type { DevKeys } from './dev-home.ts';

const PRESETS_FOLDER = fileURLToPath(new URL(`../presets/${DEFAULT_MODEL}`, import.meta.url));
/** The preset that a fresh start makes live, and those that it only stores. */
const LIVE_PRESET = 'mask-set.json';
const STORED_PRESETS = ['mask-set-25.json', 'mask-set-blocks.json', 'mask-set-blocks-25.json'];
const TENANT = { id: 'local', name: 'This machine' };

/** @returns a working API key. `say` gets a line when the preset does not become live. */
export async function seed(
  { edge, backend }: { readonly edge: string; readonly backend: string },
  keys: DevKeys,
  say: (line: string) => void,
): Promise<string> {
  const client = createAdminClient(edge, keys.adminKey);
  const apiKey = await ensureApiKey(client, keys.apiKey);
  const files = [LIVE_PRESET, ...STORED_PRESETS].map((name) => path.join(PRESETS_FOLDER, name));
  const preset = await readMaskSet(files[0]!);
  // The model may come from a source with other weights. Then the presets could not be activated, so none is stored.
  // The tenant may be disabled, limited or unreadable, and its administrator needs the edge to change that.
  if (!isFor(preset, await modelsAt(createBackendClient(backend, keys.backendKey)))) {
    say(
      `The preset mask sets are for other weights or surrogates of ${DEFAULT_MODEL} than the installed ones, so none is stored; requests run dense until a set is published.`,
    );
    return apiKey;
  }
  if ((await ensurePreset(client, preset)) === 'kept_other')
    say('A mask set other than the preset is live, and stays live.');
  for (const file of files) await storePreset(client, file);
  return apiKey;
}

const modelsAt = async (server: Requests): Promise<readonly ModelEntry[]> =>
  (await server.request({ method: 'GET', path: '/models' }, modelListSchema)).data;

const isFor = ({ model, surrogates }: MaskSet, served: readonly ModelEntry[]): boolean =>
  served.some(
    ({ maskroute }) =>
      maskroute?.hash === model.hash && (surrogates === undefined || maskroute.surrogates === surrogates),
  );

/** The stored key if the edge still accepts it, otherwise a new one. */
export async function ensureApiKey(client: AdminClient, kept: string | undefined): Promise<string> {
  if (kept !== undefined && (await isAccepted(client.edge, kept))) return kept;
  try {
    await client.request({ method: 'POST', path: '/tenants', body: TENANT }, tenantSchema);
  } catch (error) {
    if (!(error instanceof MaskrouteError) || error.code !== 'conflict') throw error;
  }
  const body = { kind: 'tenant', tenant: TENANT.id, name: 'npm start' };
  return (await client.request({ method: 'POST', path: '/keys', body }, createdKeySchema)).key;
}

/** Whether the edge takes the key, whatever its backends do. @throws MaskrouteError `edge_unreachable`, `backend_error` when it is no edge. */
async function isAccepted(edge: string, key: string): Promise<boolean> {
  try {
    await modelsAt(createTenantClient(edge, key));
    return true;
  } catch (error) {
    const isEdges = error instanceof MaskrouteError && !NOT_HEARD.includes(error.code);
    if (isEdges) return error.status !== 401;
    throw error;
  }
}
const NOT_HEARD: readonly ErrorCode[] = ['edge_unreachable', 'backend_error'];

/**
 * Makes the preset live if nothing or an older preset is live. A set that a user published stays live, and so does the
 * result of a rollback from this preset.
 */
export async function ensurePreset(
  client: AdminClient,
  preset: MaskSet,
): Promise<'published' | 'live' | 'kept_other'> {
  const version = maskSetVersion(preset);
  const live = await livePublication(client, DEFAULT_TENANT);
  if (live?.version === version) return 'live';
  if (live !== undefined) {
    const names = await namesOfVersions(client, DEFAULT_TENANT, [live.version]);
    const isAPreset = names.get(live.version) === preset.name;
    if (!isAPreset || (await wasPublished(client, DEFAULT_TENANT, version))) return 'kept_other';
  }
  await publishMaskSet(client, preset, { tenant: DEFAULT_TENANT, activate: true });
  return 'published';
}

/**
 * Stores a preset, and its evaluation if there is a file for it (`evaluation-25.json` for `mask-set-25.json`).
 */
export async function storePreset(client: AdminClient, file: string): Promise<void> {
  const set = await readMaskSet(file);
  await storeMaskSet(client, set, DEFAULT_TENANT);
  const evaluation = path.join(path.dirname(file), path.basename(file).replace('mask-set', 'evaluation'));
  if (!existsSync(evaluation)) return;
  await storeEvaluation(client, maskSetVersion(set), await readEvaluation(evaluation), DEFAULT_TENANT);
}
