/**
 * What a fresh edge lacks: a tenant with a key, and a mask set that is live. All of it through the admin API,
 * and all of it the same when it is done again.
 */
import { existsSync } from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { createdKeySchema, DEFAULT_TENANT, tenantSchema } from '../../shared/admin/admin-wire.ts';
import { type MaskSet, maskSetVersion } from '../../shared/mask/mask-set.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { type ModelEntry, modelListSchema } from '../../shared/wire/protocol.ts';
import { DEFAULT_MODEL } from '../model/sources/resolve.ts';
import { type AdminClient, createAdminClient, createBackendClient } from '../publication/admin-client.ts';
import {
  livePublication,
  namesOfVersions,
  publicationHistory,
  publishMaskSet,
  readEvaluation,
  readMaskSet,
  storeEvaluation,
  storeMaskSet,
} from '../publication/publish.ts';
import type { DevKeys } from './dev-home.ts';

const PRESETS_FOLDER = fileURLToPath(new URL(`../presets/${DEFAULT_MODEL}`, import.meta.url));
/** What a fresh start makes live, and what it only stores, for the operator to activate. */
const LIVE_PRESET = 'mask-set.json';
const STORED_PRESETS = ['mask-set-25.json', 'mask-set-blocks.json', 'mask-set-blocks-25.json'];
const TENANT = { id: 'local', name: 'This machine' };

/** Gives the API key that works. `say` gets a line when the preset is not what goes live. */
export async function seed(edge: string, keys: DevKeys, say: (line: string) => void): Promise<string> {
  const client = createAdminClient(edge, keys.adminKey);
  const apiKey = await ensureApiKey(client, keys.apiKey);
  const files = [LIVE_PRESET, ...STORED_PRESETS].map((name) => path.join(PRESETS_FOLDER, name));
  const preset = await readMaskSet(files[0]!);
  // The same model may come from a source with other bytes. Nobody could activate a set that lies there for these.
  if (!isFor(preset, await servedModels(edge, apiKey))) {
    say(
      `The preset mask sets are for other weights or surrogates than these of ${DEFAULT_MODEL}, so none is stored; requests run dense until a set is published.`,
    );
    return apiKey;
  }
  if ((await ensurePreset(client, preset)) === 'kept_other')
    say('A mask set other than the preset is live, and stays live.');
  for (const file of files) await storePreset(client, file);
  return apiKey;
}

/** What the edge has backends for. It says so as each of them does. */
const servedModels = async (edge: string, apiKey: string): Promise<readonly ModelEntry[]> =>
  (await createBackendClient(edge, apiKey).request({ method: 'GET', path: '/models' }, modelListSchema)).data;

const isFor = ({ model, surrogates }: MaskSet, served: readonly ModelEntry[]): boolean =>
  served.some(
    ({ maskroute }) =>
      maskroute?.hash === model.hash && (surrogates === undefined || maskroute.surrogates === surrogates),
  );

/** The key that was kept when the edge still takes it, else a new one. */
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

async function isAccepted(edge: string, key: string): Promise<boolean> {
  const response = await fetch(`${edge}/v1/models`, { headers: { authorization: `Bearer ${key}` } });
  await response.body?.cancel();
  return response.status !== 401;
}

/**
 * Makes the preset live where nothing is, or where an older preset is. A set that somebody published
 * themselves stays, and so does their choice to roll back from this one.
 */
export async function ensurePreset(
  client: AdminClient,
  preset: MaskSet,
): Promise<'published' | 'live' | 'kept_other'> {
  const version = maskSetVersion(preset);
  const live = await livePublication(client, DEFAULT_TENANT);
  if (live?.version === version) return 'live';
  const history = await publicationHistory(client, DEFAULT_TENANT);
  const wasPublished = history.some((publication) => publication.version === version);
  if (
    live !== undefined &&
    (wasPublished ||
      (await namesOfVersions(client, DEFAULT_TENANT, [live.version])).get(live.version) !== preset.name)
  ) {
    return 'kept_other';
  }
  await publishMaskSet(client, preset, { tenant: DEFAULT_TENANT, activate: true });
  return 'published';
}

/**
 * Stores a preset that is live or may be made so, with what was measured of it where that lies beside it
 * (`evaluation-25.json` beside `mask-set-25.json`).
 */
export async function storePreset(client: AdminClient, file: string): Promise<void> {
  const set = await readMaskSet(file);
  await storeMaskSet(client, set, DEFAULT_TENANT);
  const evaluation = path.join(path.dirname(file), path.basename(file).replace('mask-set', 'evaluation'));
  if (!existsSync(evaluation)) return;
  await storeEvaluation(client, maskSetVersion(set), await readEvaluation(evaluation), DEFAULT_TENANT);
}
