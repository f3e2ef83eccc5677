/** Reads a mask set from disk, refused with the reason before anything is sent anywhere. */

import { MaskrouteError } from '../../shared/errors.ts';
import { type MaskSet, maskSetSchema } from '../../shared/mask-set.ts';
import { check } from '../../shared/parse-body.ts';
import { readJsonFile } from './json-file.ts';

/** @throws MaskrouteError `invalid_mask_set` with file and reason. */
export async function readMaskSet(file: string): Promise<MaskSet> {
  const invalid = (reason: string, cause?: unknown) =>
    new MaskrouteError('invalid_mask_set', `${file}: ${reason}`, { cause });
  const json = await readJsonFile(file, invalid);
  const checked = check(maskSetSchema, json, 'the set');
  if (checked.kind === 'good') return checked.value;
  throw invalid(checked.message);
}
