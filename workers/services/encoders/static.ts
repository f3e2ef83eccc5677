/** The static encoder: its table is a worker asset, read once an isolate; embedding needs no network. */
import type { Encoder } from '../../../shared/embedding/encoder.ts';
import { loadStaticEncoder } from '../../../shared/embedding/static-encoder.ts';
import kernel from '../../../shared/embedding/weighted-sum.wasm';
import type { Env } from '../../env.ts';

/** The assets binding answers by path; the host means nothing. */
const TABLE_URL = 'http://assets/encoder/static.bin';

/** @throws Error when the asset is missing, MaskrouteError `invalid_encoder` when it is malformed. */
export async function loadStatic(env: Env): Promise<Encoder> {
  if (env.ASSETS === undefined) throw new Error('the binding ASSETS is missing');
  const response = await env.ASSETS.fetch(TABLE_URL);
  if (!response.ok) throw new Error(`the asset encoder/static.bin answered ${response.status}`);
  return loadStaticEncoder(await response.arrayBuffer(), kernel);
}
