/** Opens encoders by the name that `--encoder` takes: fetches and reads their files. */
import { fileURLToPath } from 'node:url';
import type { Encoder } from '../../../shared/embedding/encoder.ts';
import {
  loadStaticEncoder,
  STATIC_ENCODER_ID,
  verifyStaticTable,
} from '../../../shared/embedding/static-encoder.ts';
import type { EncoderOptions } from '../../encoder/full-encoder.ts';
import { namedEncoder, openFullEncoder } from '../../encoder/full-encoder.ts';
import { readRegular, unreadable } from '../../files.ts';

/** The table that comes with the project; the edge serves it as an asset. */
export const STATIC_TABLE_PATH = fileURLToPath(
  new URL('../../../workers/assets/encoder/static.bin', import.meta.url),
);
/** Thirty times the size of the table that comes with the project. */
const TABLE_BYTES_MAX = 256 * 1024 * 1024;

export type OpenEncoder = { readonly encoder: Encoder; close(): Promise<void> };

/**
 * `static` is the table that comes with the project; a path to a `.bin` file is another table; any other name is a full
 * sentence encoder, as {@link openFullEncoder} takes it.
 * @throws MaskrouteError `invalid_encoder`, `download_failed`, `invalid_argument` for a table that cannot be read.
 */
export async function openEncoder(name: string, options: EncoderOptions): Promise<OpenEncoder> {
  if (name === STATIC_ENCODER_ID) return openStatic(STATIC_TABLE_PATH);
  if (name.endsWith('.bin')) return openStatic(name);
  const encoder = await openFullEncoder(name, options);
  return { encoder, close: () => encoder.close() };
}

/**
 * Checks that {@link openEncoder} can find the encoder, without downloading anything.
 * @throws MaskrouteError `invalid_encoder`, `invalid_argument` for a table that cannot be read.
 */
export async function checkEncoder(name: string): Promise<void> {
  if (name === STATIC_ENCODER_ID) return;
  if (name.endsWith('.bin')) await openStatic(name);
  else await namedEncoder(name);
}

async function openStatic(path: string): Promise<OpenEncoder> {
  const bytes = await readRegular(path, TABLE_BYTES_MAX).catch((error: unknown) => {
    throw unreadable(path, error);
  });
  verifyStaticTable(bytes);
  return { encoder: loadStaticEncoder(bytes), close: async () => {} };
}
