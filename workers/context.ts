/** What Hono carries through a request. */
import type { Context } from 'hono';
import type { Env } from './env.ts';
import type { Caller } from './services/api-keys.ts';
import type { Hold } from './services/deadline.ts';
import type { Services } from './services/index.ts';

export type AppEnv = {
  Bindings: Env;
  Variables: { requestId: string; services: Services; caller: Caller; admin: AdminCaller };
};
export type AppContext = Context<AppEnv>;

/** `tenant` limits what the caller sees and changes; undefined for those who manage everything. */
export type AdminCaller = { readonly actor: string; readonly tenant: string | undefined };

/** Keeps work alive after the answer. */
export const holdOf =
  (c: AppContext): Hold =>
  (work) =>
    c.executionCtx.waitUntil(work);
