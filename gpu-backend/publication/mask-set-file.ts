/** Reads a mask set from disk, refused with the reason before anything is sent anywhere. */
import { readFile, stat } from 'node:fs/promises';
import { MaskrouteError } from '../../shared/errors.ts';
import { type MaskSet, maskSetSchema } from '../../shared/mask-set.ts';

/** Well above what a D1 row holds (2 MB), so that the edge's own limit is the one that people meet. */
const FILE_BYTES_MAX = 16 * 1024 * 1024;

/** @throws MaskrouteError `invalid_mask_set` with file and reason. */
export async function readMaskSet(file: string): Promise<MaskSet> {
  const invalid = (reason: string, cause?: unknown) =>
    new MaskrouteError('invalid_mask_set', `${file}: ${reason}`, { cause });
  const size = await stat(file).catch((error: unknown) => {
    throw invalid('cannot be read', error);
  });
  if (!size.isFile()) throw invalid('is not a file');
  if (size.size > FILE_BYTES_MAX) throw invalid(`is larger than ${FILE_BYTES_MAX} bytes`);
  let json: unknown;
  try {
    json = JSON.parse(await readFile(file, 'utf8'));
  } catch (error) {
    throw invalid('is not JSON', error);
  }
  const parsed = maskSetSchema.safeParse(json);
  if (parsed.success) return parsed.data;
  const [issue] = parsed.error.issues;
  throw invalid(`${issue!.path.join('.') || 'the set'}: ${issue!.message}`, parsed.error);
}
