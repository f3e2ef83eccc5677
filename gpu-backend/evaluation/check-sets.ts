/** What a mask set must be to be compared at all, said before the work and not in the middle of it. */
import { MaskrouteError } from '../../shared/errors.ts';
import type { MaskSet } from '../../shared/mask-set.ts';
import type { InstalledModel } from '../model/store.ts';
import { oneMask } from './routing.ts';

/** @throws MaskrouteError `invalid_mask_set` for a set of another model, or whose record has masks that are none. */
export function checkMaskSets(sets: readonly MaskSet[], model: Pick<InstalledModel, 'manifest'>): void {
  for (const set of sets) {
    checkModel(set, model);
    oneMask(set);
  }
}

/** @throws MaskrouteError `invalid_mask_set`. */
function checkModel({ name, model }: MaskSet, { manifest }: Pick<InstalledModel, 'manifest'>): void {
  const blockCount = 2 * manifest.config.layerCount;
  if (model.hash === manifest.hash && model.blockCount === blockCount) return;
  throw new MaskrouteError('invalid_mask_set', `The mask set ${name} is for ${otherModel(model, manifest)}.`);
}

/** Two models may have one name. */
function otherModel(
  { name, hash, blockCount }: MaskSet['model'],
  installed: InstalledModel['manifest'],
): string {
  if (hash === installed.hash)
    return `${blockCount} blocks, and ${name} has ${2 * installed.config.layerCount}`;
  if (name !== installed.name) return `another model (${name}), not for ${installed.name}`;
  return `another ${name} (SHA-256 ${hash.slice(0, 12)}…) than the installed one (${installed.hash.slice(0, 12)}…)`;
}
