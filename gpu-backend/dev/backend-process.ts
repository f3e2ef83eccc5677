/** The child process in which `npm start` runs the backend. */
import { fileURLToPath } from 'node:url';
import { type BackendOptions, OWN_ADDRESS, startBackend } from '../main.ts';
import { serveParent } from './children.ts';

/** What can cross a process boundary of the backend's options. */
export type BackendConfig = Pick<BackendOptions, 'home' | 'model' | 'backendKey'> & { readonly port: number };

const CLI = fileURLToPath(new URL('../cli/cli.ts', import.meta.url));

serveParent<BackendConfig>((config) => startBackend({ ...config, audience: OWN_ADDRESS, jobEntry: CLI }));
