/** Backends of a test file: one server stands for all of them, each at an address of its own. */
import { env } from 'cloudflare:workers';
import { BACKEND_HEADERS } from '../../../shared/wire/backend-load.ts';
import type { DryRun } from '../../../shared/wire/openai.ts';
import { HEADERS } from '../../../shared/wire/protocol.ts';
import { admin, CHAT, call, created, freshIsolate, recorded } from './edge.ts';

/** `prefix`: the server is there for all test files at once, so each has names of its own. */
export function testBackends(prefix: string) {
  let names = 0;
  const registered: string[] = [];
  return {
    /** Its id is also its place at the server. */
    async register(change: object = {}): Promise<string> {
      const id = `${prefix}-${++names}`;
      await created(admin('POST', '/backends', { id, url: `${env.BACKEND_URL}/at/${id}`, ...change }));
      registered.push(id);
      return id;
    },
    async removeAll(): Promise<void> {
      for (const id of registered.splice(0)) await admin('DELETE', `/backends/${id}`);
    },
  };
}

export const mood = (id: string, how: string) =>
  fetch(`${env.BACKEND_URL}/mood/${id}`, { method: 'POST', body: how });

export const idOf = (response: Response) => response.headers.get(HEADERS.requestId)!;
export const askedOf = async (response: Response) => (await recorded(idOf(response)))?.places;
export const backendOf = (response: Response) => response.headers.get(BACKEND_HEADERS.backend);

/** The conversation's own backend, which is asked first; null where there is no choice. */
export async function homeOf(
  key: string,
  body: object,
  isolate = freshIsolate(),
): Promise<DryRun['backend']> {
  const response = await call('POST', '/v1/route', { key, body: { ...CHAT, ...body } }, isolate);
  return (await response.json<DryRun>()).backend;
}
