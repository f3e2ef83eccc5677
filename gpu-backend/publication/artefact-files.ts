/** Reads a mask set from disk, refused with the reason before anything is sent anywhere. */
import { readFile, stat } from 'node:fs/promises';
import { MaskrouteError } from '../../shared/errors.ts';
import { type EvaluationFigures, evaluationFiguresSchema } from '../../shared/evaluation.ts';
import { type MaskSet, maskSetSchema } from '../../shared/mask-set.ts';

/* Reads a JSON file that a person names: bounded, and refused with the reason. */

/** Well above what a D1 row holds (2 MB), so that the edge's own limit is the one that people meet. */
const FILE_BYTES_MAX = 16 * 1024 * 1024;

/** @throws what `invalid` makes of the reason. */
export async function readJsonFile(
  file: string,
  invalid: (reason: string, cause?: unknown) => Error,
): Promise<unknown> {
  const size = await stat(file).catch((error: unknown) => {
    throw invalid('cannot be read', error);
  });
  if (!size.isFile()) throw invalid('is not a file');
  if (size.size > FILE_BYTES_MAX) throw invalid(`is larger than ${FILE_BYTES_MAX} bytes`);
  const text = await readFile(file, 'utf8');
  try {
    return JSON.parse(text);
  } catch (error) {
    throw invalid('is not JSON', error);
  }
}

/** @throws MaskrouteError `invalid_mask_set` with file and reason. */
export async function readMaskSet(file: string): Promise<MaskSet> {
  const invalid = (reason: string, cause?: unknown) =>
    new MaskrouteError('invalid_mask_set', `${file}: ${reason}`, { cause });
  const json = await readJsonFile(file, invalid);
  const parsed = maskSetSchema.safeParse(json);
  if (parsed.success) return parsed.data;
  const [issue] = parsed.error.issues;
  throw invalid(`${issue!.path.join('.') || 'the set'}: ${issue!.message}`, parsed.error);
}

/* Reads an `evaluation.json` from disk, refused with the reason before anything is sent anywhere. */

/** What an edge keeps of it. @throws MaskrouteError `invalid_argument` with file and reason. */
export async function readEvaluation(file: string): Promise<EvaluationFigures> {
  const invalid = (reason: string, cause?: unknown) =>
    new MaskrouteError('invalid_argument', `${file}: ${reason}`, { cause });
  const parsed = evaluationFiguresSchema.safeParse(await readJsonFile(file, invalid));
  if (parsed.success) return parsed.data;
  const [issue] = parsed.error.issues;
  throw invalid(`${issue!.path.join('.') || 'the evaluation'}: ${issue!.message}`, parsed.error);
}
