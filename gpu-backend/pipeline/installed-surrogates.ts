/** The table of surrogates that an installed model serves with, to learn masks for it. */
import { join } from 'node:path';
import type { InstalledModel } from '../model/store.ts';
import type { Surrogates } from '../model/surrogates.ts';
import { readSurrogates } from '../model/surrogates.ts';

const SURROGATES_FILE = 'surrogates.safetensors';

/** `undefined` for a model without one. @throws MaskrouteError `corrupt_model`. */
export async function installedSurrogates({
  folder,
  manifest,
}: InstalledModel): Promise<Surrogates | undefined> {
  if (manifest.surrogates === undefined) return undefined;
  return readSurrogates(join(folder, SURROGATES_FILE));
}
