/** Encoders by the name that `--encoder` takes. Files are read here; everything below works on what was read. */
import { readFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import type { Encoder } from '../../shared/embedding/encoder.ts';
import { loadStaticEncoder, STATIC_ENCODER_ID } from '../../shared/embedding/static-encoder.ts';
import { verifyStaticTable } from '../../shared/embedding/static-table.ts';
import { MaskrouteError } from '../../shared/errors.ts';
import { loadSentenceEncoder } from './sentence-encoder.ts';

/** The table that ships with the project; the edge serves it as an asset. */
export const STATIC_TABLE_PATH = fileURLToPath(
  new URL('../../workers/assets/encoder/static.bin', import.meta.url),
);

export type OpenEncoder = { readonly encoder: Encoder; close(): Promise<void> };

/**
 * `static` is the table that ships; a path to a `.bin` is another table; any other path is the folder of a full
 * sentence encoder.
 * @throws MaskrouteError `invalid_encoder`.
 */
export async function openEncoder(name: string, threads: number): Promise<OpenEncoder> {
  if (name === STATIC_ENCODER_ID) return openStatic(STATIC_TABLE_PATH);
  if (name.endsWith('.bin')) return openStatic(name);
  const encoder = await loadSentenceEncoder(name, threads);
  return { encoder, close: () => encoder.close() };
}

async function openStatic(path: string): Promise<OpenEncoder> {
  let bytes: Uint8Array;
  try {
    bytes = await readFile(path);
  } catch (cause) {
    throw new MaskrouteError('invalid_encoder', `${path} cannot be read.`, { cause });
  }
  verifyStaticTable(bytes);
  return { encoder: loadStaticEncoder(bytes), close: async () => {} };
}
