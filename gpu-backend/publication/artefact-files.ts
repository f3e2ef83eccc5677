/** Reads the files that people publish, a mask set and its evaluation; what is wrong with one is said before anything is sent. */
import type { z } from 'zod';
import { type EvaluationFigures, evaluationFiguresSchema } from '../../shared/admin/stats-wire.ts';
import { type MaskSet, maskSetSchema } from '../../shared/mask/mask-set.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { check } from '../../shared/wire/parse-body.ts';
import { readJson } from '../files.ts';

/** Well above what a D1 row holds (2 MB), so that the edge's own limit is what people meet. */
const FILE_BYTES_MAX = 16 * 1024 * 1024;

/** @throws MaskrouteError `invalid_mask_set` with file and reason; `invalid_argument` for what is no regular file. */
export const readMaskSet = (file: string): Promise<MaskSet> =>
  readArtefact(file, maskSetSchema, 'the set', 'invalid_mask_set');

/** What an edge keeps of it. @throws MaskrouteError `invalid_argument` with file and reason. */
export const readEvaluation = (file: string): Promise<EvaluationFigures> =>
  readArtefact(file, evaluationFiguresSchema, 'the evaluation', 'invalid_argument');

async function readArtefact<T>(
  file: string,
  schema: z.ZodType<T>,
  what: string,
  code: 'invalid_mask_set' | 'invalid_argument',
): Promise<T> {
  const invalid = (reason: string, cause?: unknown) =>
    new MaskrouteError(code, `${file}: ${reason}`, { cause });
  const json = await readJson(file, FILE_BYTES_MAX, invalid).catch((error: unknown) => {
    throw error instanceof MaskrouteError ? error : invalid('cannot be read', error);
  });
  const checked = check(schema, json, what);
  if (checked.kind === 'good') return checked.value;
  throw invalid(checked.message);
}
