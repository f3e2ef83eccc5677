/** `npm start`: the whole product on this machine until SIGINT or SIGTERM; then it drains and exits with 0. */
import { MaskrouteError } from '../../shared/errors.ts';
import { maskrouteHome } from '../home.ts';
import type { DevFile } from './dev-file.ts';
import { installModel } from './install-model.ts';
import { portFrom } from './ports.ts';
import { startProduct } from './product.ts';

const EDGE_PORT = 8787;
const BACKEND_PORT = 8080;

async function main(): Promise<void> {
  const stopAsked = new AbortController();
  const stopped = new Promise<void>((resolve) => {
    for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) {
      process.once(signal, () => {
        console.log('Stopping: running answers finish first. (Once more ends it at once.)');
        stopAsked.abort();
        resolve();
      });
    }
  });
  const home = maskrouteHome();
  const product = await startProduct({
    home,
    port: portFrom(process.env, 'PORT', EDGE_PORT),
    backendPort: portFrom(process.env, 'BACKEND_PORT', BACKEND_PORT),
    say: console.log,
    ensureModel: (name) => installModel(home, name, stopAsked.signal),
    signal: stopAsked.signal,
  }).catch((error: unknown) => {
    if (stopAsked.signal.aborted) return undefined;
    throw error;
  });
  if (product === undefined) return;
  console.log(greeting(product.dev));
  await stopped;
  await product.stop();
}

const greeting = ({ edge, apiKey, model }: DevFile): string => `Maskroute is ready at ${edge}. Try:
curl -N ${edge}/v1/chat/completions -H 'authorization: Bearer ${apiKey}' -H 'content-type: application/json' -d '{"model": "${model}", "stream": true, "messages": [{"role": "user", "content": "Why is the sky blue?"}]}'`;

try {
  await main();
  process.exit(0);
} catch (error) {
  console.error(error instanceof MaskrouteError ? `error: ${error.message}` : error);
  process.exit(1);
}
