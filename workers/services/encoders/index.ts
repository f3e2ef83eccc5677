/** The one place that picks an encoder: the variable `ENCODER` names it. */
import type { Encoder } from '../../../shared/embedding/encoder.ts';
import type { Config, Env } from '../../env.ts';
import type { BackendPool } from '../backends/index.ts';
import { loadBackendEncoder } from './backend.ts';
import { cached } from './cached.ts';
import { loadStatic } from './static.ts';
import { createWorkersAiEncoder } from './workers-ai.ts';

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
      return cached((await import('./huggingface.ts')).createHuggingFaceEncoder(config));
    case 'backend':
      return cached(await loadBackendEncoder(backends));
  }
}
