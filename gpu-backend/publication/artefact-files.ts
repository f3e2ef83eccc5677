/** Reads what people name to publish it, a mask set or its evaluation: refused with the reason before anything is sent. */

import { type EvaluationFigures, evaluationFiguresSchema } from '../../shared/admin/stats-wire.ts';
import { type MaskSet, maskSetSchema } from '../../shared/mask/mask-set.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { check } from '../../shared/wire/parse-body.ts';
import { readJson } from '../files.ts';

/** Well above what a D1 row holds (2 MB), so that the edge's own limit is the one that people meet. */
const FILE_BYTES_MAX = 16 * 1024 * 1024;

/** @throws MaskrouteError `invalid_mask_set` with file and reason; `invalid_argument` for what is no regular file. */
export async function readMaskSet(file: string): Promise<MaskSet> {
  const invalid = (reason: string, cause?: unknown) =>
    new MaskrouteError('invalid_mask_set', `${file}: ${reason}`, { cause });
  const checked = check(maskSetSchema, await readJsonFile(file, invalid), 'the set');
  if (checked.kind === 'good') return checked.value;
  throw invalid(checked.message);
}

/** What an edge keeps of it. @throws MaskrouteError `invalid_argument` with file and reason. */
export async function readEvaluation(file: string): Promise<EvaluationFigures> {
  const invalid = (reason: string, cause?: unknown) =>
    new MaskrouteError('invalid_argument', `${file}: ${reason}`, { cause });
  const checked = check(evaluationFiguresSchema, await readJsonFile(file, invalid), 'the evaluation');
  if (checked.kind === 'good') return checked.value;
  throw invalid(checked.message);
}

async function readJsonFile(
  file: string,
  invalid: (reason: string, cause?: unknown) => Error,
): Promise<unknown> {
  return await readJson(file, FILE_BYTES_MAX, invalid).catch((error: unknown) => {
    throw error instanceof MaskrouteError ? error : invalid('cannot be read', error);
  });
}
