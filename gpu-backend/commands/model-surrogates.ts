/**
 * Surrogates of installed models: the table that comes with the project for the default model, and tables that people
 * learn themselves.
 */
import { fileURLToPath } from 'node:url';
import { installSurrogates } from '../model/install-surrogates.ts';
import type { ImportHooks } from '../model/progress.ts';
import { DEFAULT_MODEL, DEFAULT_MODEL_HASH } from '../model/sources/default-model.ts';
import type { InstalledModel } from '../model/store.ts';
import { recoverStore, sha256OfFiles } from '../model/store.ts';
import { withStoreLock } from '../model/store-lock.ts';
import { surrogatesIdOf } from '../model/surrogates.ts';

const PRESET_FILE = fileURLToPath(
  new URL(`../presets/${DEFAULT_MODEL}/surrogates.safetensors`, import.meta.url),
);

/**
 * The default model with the table that was fitted for it; the model as it is when its weights are from another file,
 * or when somebody installed a table of their own. Takes the store's lock where there is something to do.
 */
export async function withPresetSurrogates(
  home: string,
  model: InstalledModel,
  hooks: Pick<ImportHooks, 'log' | 'signal'>,
): Promise<InstalledModel> {
  const { manifest } = model;
  if (manifest.hash !== DEFAULT_MODEL_HASH || manifest.surrogates?.preset === false) return model;
  const id = surrogatesIdOf(await sha256OfFiles([PRESET_FILE]));
  if (manifest.surrogates?.id === id) return model;
  hooks.log(`Installing the surrogates of ${manifest.name}`);
  return locked(home, hooks, () => installSurrogates(home, manifest.name, PRESET_FILE, { preset: true }));
}

/** @throws MaskrouteError `model_not_found`, `surrogates_mismatch` for another model's table, `invalid_request`. */
export const installOwnSurrogates = (
  home: string,
  name: string,
  file: string,
  hooks: Pick<ImportHooks, 'log' | 'signal'>,
): Promise<InstalledModel> =>
  locked(home, hooks, () => installSurrogates(home, name, file, { preset: false }));

function locked<T>(
  home: string,
  { log, signal }: Pick<ImportHooks, 'log' | 'signal'>,
  work: () => Promise<T>,
): Promise<T> {
  const onWait = () => log('Another import is running; waiting for it to end.');
  return withStoreLock(home, { onWait, signal }, async () => {
    await recoverStore(home);
    return work();
  });
}
