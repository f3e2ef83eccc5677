/** `maskroute model pull|list|show` as plain functions; the command line only parses arguments and prints. */

import { MaskrouteError } from '../../shared/errors.ts';
import { importModel } from '../model/import-model.ts';
import type { ImportHooks } from '../model/progress.ts';
import { DEFAULT_MODEL, DEFAULT_MODEL_HASH } from '../model/sources/default-model.ts';
import { fetchModel, nameOfSpec, parseModelSpec } from '../model/sources/resolve.ts';
import type { InstalledModel } from '../model/store.ts';
import { listInstalled, openInstalled, recoverStore, verifyInstalled } from '../model/store.ts';
import { withStoreLock } from '../model/store-lock.ts';
import type { WeightKind } from '../model/types.ts';
import { withPresetSurrogates } from './model-surrogates.ts';

export { DEFAULT_MODEL } from '../model/sources/default-model.ts';

export type PullOptions = ImportHooks & {
  readonly home: string;
  readonly weights: WeightKind;
  /** Import again what is installed already. */
  readonly force?: boolean;
};

/**
 * Installs a model. 8-bit weights have the plain name; others stand beside it as `<name>-q4` and `<name>-f32`.
 * A model that is installed already, from the same weights, is left alone.
 * @throws MaskrouteError `download_failed`, `corrupt_model`, `unsupported_model`, `not_found`, `invalid_request`,
 * `storage_failed`, `cancelled`.
 */
export async function pullModel(specText: string, options: PullOptions): Promise<InstalledModel> {
  try {
    return await pull(specText, options);
  } catch (error) {
    if (options.signal?.aborted && !(error instanceof MaskrouteError)) {
      throw new MaskrouteError('cancelled', 'Stopped; nothing was installed.', { cause: error });
    }
    const { code, message } = error as NodeJS.ErrnoException;
    if (code === undefined || !DISK_ERRORS.has(code)) throw error;
    throw new MaskrouteError('storage_failed', `The disk does not do what an import needs: ${message}`, {
      cause: error,
    });
  }
}

const DISK_ERRORS = new Set(['ENOSPC', 'EDQUOT', 'EACCES', 'EPERM', 'EROFS', 'EIO', 'ENOTDIR']);

async function pull(specText: string, options: PullOptions): Promise<InstalledModel> {
  const { home, weights, log, signal, force = false } = options;
  const spec = await parseModelSpec(specText);
  const plainName = nameOfSpec(spec);
  const name = weights === 'q8' ? plainName : `${plainName}-${weights}`;
  // The default model is asked for at every start: when it is there, neither the network nor the lock is needed.
  // Whichever source it was taken from counts.
  const present = async () =>
    plainName === DEFAULT_MODEL && !force ? openInstalled(home, name).catch(() => undefined) : undefined;
  const onWait = () => log('Another import is running; waiting for it to end.');
  const model =
    (await present()) ??
    (await withStoreLock(home, { onWait, signal }, async () => {
      await recoverStore(home);
      return (
        (await present()) ?? importModel(await fetchModel(spec, home, options), { ...options, name, force })
      );
    }));
  return withPresetSurrogates(home, model, options);
}

export type ModelRow = {
  readonly name: string;
  readonly weights: WeightKind | undefined;
  readonly bytes: number;
  readonly source: string;
  /** Why it cannot be used, when it cannot. */
  readonly problem: string | undefined;
};

export async function listModels(home: string): Promise<ModelRow[]> {
  return (await listInstalled(home)).map((entry) => {
    if ('problem' in entry) {
      return { name: entry.name, weights: undefined, bytes: 0, source: '', problem: entry.problem };
    }
    const { name, weights, source, files } = entry.manifest;
    const bytes = Object.values(files).reduce((sum, file) => sum + file.bytes, 0);
    return { name, weights, bytes, source, problem: undefined };
  });
}

/** `verify`: read every file and compare hashes. @throws MaskrouteError `model_not_found`, `corrupt_model`. */
export async function showModel(
  home: string,
  name: string,
  options: { readonly verify?: boolean } = {},
): Promise<InstalledModel> {
  const model = await openInstalled(home, name);
  if (options.verify === true) await verifyInstalled(model);
  return model;
}

/** Whether a model is the one that the preset mask set was learned on. */
export const hasPresetMasks = (model: InstalledModel): boolean => model.manifest.hash === DEFAULT_MODEL_HASH;
