/** The child process in which `npm start` runs the backend. */
import { type BackendOptions, startBackend } from '../main.ts';
import { serveParent } from './child-protocol.ts';

/** What can cross a process boundary of the backend's options. */
export type BackendConfig = Pick<BackendOptions, 'home' | 'model' | 'backendKey'> & { readonly port: number };

serveParent<BackendConfig>(startBackend);
