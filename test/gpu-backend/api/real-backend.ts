/** The backend over the real model that `real-model.test.ts` starts, as its parts see it. */
import { mkdtemp, rm, symlink } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import OpenAI from 'openai';
import { pino } from 'pino';
import { type RunningBackend, startBackend } from '../../../gpu-backend/main.ts';
import { DEFAULT_MODEL } from '../../../gpu-backend/model/sources/resolve.ts';
import { testHome } from '../../support/installed-model.ts';
import { BACKEND_KEY } from './harness.ts';

export let home: string;
export let backend: RunningBackend;
export let client: OpenAI;

export async function openRealBackend(): Promise<void> {
  // A home of its own, so that masks of the tests stay out of the user's.
  home = await mkdtemp(join(tmpdir(), 'maskroute-real-'));
  await symlink(join(testHome, 'models'), join(home, 'models'));
  backend = await startReal();
  client = clientOf(backend);
}

export const clientOf = ({ url }: RunningBackend): OpenAI =>
  new OpenAI({ baseURL: `${url}/v1`, apiKey: BACKEND_KEY, maxRetries: 0 });

/** Another one over the same home. */
export const startReal = (options: { readonly promptLookup?: boolean } = {}): Promise<RunningBackend> =>
  startBackend({
    home,
    model: DEFAULT_MODEL,
    port: 0,
    backendKey: BACKEND_KEY,
    log: pino({ level: 'silent' }),
    // However slow the machine is: an answer's first event comes before its status.
    limits: { commit_ms: 60_000 },
    // Other tests run beside this one; threads that wait for each other would crawl.
    threads: 1,
    ...options,
  });

export async function closeRealBackend(): Promise<void> {
  await backend?.close();
  if (home !== undefined) await rm(home, { recursive: true, force: true });
}
