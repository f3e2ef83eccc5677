/** The one place that picks an encoder: the variable `ENCODER` names it. */
import type { Encoder } from '../../../shared/embedding/encoder.ts';
import { loadStaticEncoder } from '../../../shared/embedding/static-encoder.ts';
import type { BackendPool } from '../../backends/pool.ts';
import type { Config, Env } from '../../env.ts';
import { cached, createWorkersAiEncoder, loadBackendEncoder } from './remote.ts';

/* The static encoder: its table is a worker asset, read once an isolate; embedding needs no network. */

/** The assets binding answers by path; the host means nothing. */
const TABLE_URL = 'http://assets/encoder/static.bin';

/** @throws Error when the asset is missing, MaskrouteError `invalid_encoder` when it is malformed. */
export async function loadStatic(env: Env): Promise<Encoder> {
  if (env.ASSETS === undefined) throw new Error('the binding ASSETS is missing');
  const response = await env.ASSETS.fetch(TABLE_URL);
  if (!response.ok) throw new Error(`the asset encoder/static.bin answered ${response.status}`);
  return loadStaticEncoder(await response.arrayBuffer());
}

/** @throws Error when a binding or an asset that the encoder needs is missing. */
export async function loadEncoder(
  config: Config,
  env: Env,
  backends: Pick<BackendPool, 'askAll' | 'call'>,
): Promise<Encoder> {
  switch (config.ENCODER) {
    case 'static':
      return await loadStatic(env);
    case 'workers-ai':
      if (env.AI === undefined) throw new Error('the binding AI is missing');
      return cached(createWorkersAiEncoder(env.AI));
    case 'huggingface':
      // Its client is large; an isolate that does not use it does not start slower for it.
      return cached((await import('./remote.ts')).createHuggingFaceEncoder(config));
    case 'backend':
      return cached(await loadBackendEncoder(backends));
  }
}
