/** The child process in which `npm start` runs one part of the product: its argument says which. */
import { enableCompileCache } from 'node:module';
import { fileURLToPath } from 'node:url';
import type { BackendOptions } from '../main.ts';
import { serveParent } from './children.ts';
import type { EdgeOptions } from './local-edge.ts';

/** What can cross a process boundary of the backend's options. */
export type BackendConfig = Pick<
  BackendOptions,
  'home' | 'model' | 'port' | 'backendKey' | 'jobEntry' | 'collector'
>;

// What an earlier start compiled loads in half the time.
enableCompileCache(fileURLToPath(new URL('../../node_modules/.cache/node-compile', import.meta.url)));

if (process.argv[2] === 'edge') {
  serveParent(async (options: EdgeOptions) => {
    const { startEdge } = await import('./local-edge.ts');
    return await startEdge(options);
  });
} else {
  serveParent(async (config: BackendConfig) => {
    const main = await import('../main.ts');
    return await main.startBackend({ ...config, audience: main.OWN_ADDRESS });
  });
}
