/** Reads a JSON file that a person names: bounded, and refused with the reason. */
import { readFile, stat } from 'node:fs/promises';

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
