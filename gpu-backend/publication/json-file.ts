/** Reads a JSON file that a person names: bounded, and refused with the reason. */
import { MaskrouteError } from '../../shared/errors.ts';
import { readRegular } from '../regular-file.ts';

/** Well above what a D1 row holds (2 MB), so that the edge's own limit is the one that people meet. */
const FILE_BYTES_MAX = 16 * 1024 * 1024;

/** @throws what `invalid` makes of the reason; MaskrouteError `invalid_argument` for what is no regular file. */
export async function readJsonFile(
  file: string,
  invalid: (reason: string, cause?: unknown) => Error,
): Promise<unknown> {
  const bytes = await readRegular(file, FILE_BYTES_MAX).catch((error: unknown) => {
    throw error instanceof MaskrouteError ? error : invalid('cannot be read', error);
  });
  try {
    return JSON.parse(bytes.toString('utf8'));
  } catch (error) {
    throw invalid('is not JSON', error);
  }
}
