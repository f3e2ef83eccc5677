/** Reads an `evaluation.json` from disk, refused with the reason before anything is sent anywhere. */

import { MaskrouteError } from '../../shared/errors.ts';
import { type EvaluationFigures, evaluationFiguresSchema } from '../../shared/evaluation.ts';
import { check } from '../../shared/parse-body.ts';
import { readJsonFile } from './json-file.ts';

/** What an edge keeps of it. @throws MaskrouteError `invalid_argument` with file and reason. */
export async function readEvaluation(file: string): Promise<EvaluationFigures> {
  const invalid = (reason: string, cause?: unknown) =>
    new MaskrouteError('invalid_argument', `${file}: ${reason}`, { cause });
  const checked = check(evaluationFiguresSchema, await readJsonFile(file, invalid), 'the evaluation');
  if (checked.kind === 'good') return checked.value;
  throw invalid(checked.message);
}
