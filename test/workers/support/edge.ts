/** How tests talk to the edge: through its own HTTP interface, with what `npm start` would seed. */
import { createExecutionContext } from 'cloudflare:test';
import { env } from 'cloudflare:workers';
import { expect, vi } from 'vitest';
import type { CreatedKey } from '../../../shared/admin/admin-wire.ts';
import type { MaskSetSummary, Publication } from '../../../shared/admin/publication-wire.ts';
import { type ModelHash, maskBits, maskId, sparsity } from '../../../shared/mask/mask.ts';
import type { MaskSet } from '../../../shared/mask/mask-set.ts';
import type { Env } from '../../../workers/env.ts';
import edge from '../../../workers/index.ts';
import {
  ADMIN_KEY,
  EDGE_URL,
  ENCODER,
  MODEL,
  type Recorded,
  TEST_MASKS,
} from '../../support/edge/constants.ts';
import { interceptedD1 } from '../../support/intercepted-d1.ts';

export type Call = { key?: string; body?: unknown; headers?: Record<string, string>; signal?: AbortSignal };
type Fetch = (request: Request) => Promise<Response>;

/**
 * An isolate of its own: nothing is cached yet, and its bindings are what the test says. `held` hears of what goes on
 * when the client is gone.
 */
export const freshIsolate = (
  overrides: Partial<Env> = {},
  held: (work: Promise<unknown>) => void = () => {},
): Fetch => isolateOf({ ...env, ...overrides }, held);

/**
 * Calls the worker itself. Through the test runtime's own door (`exports.default.fetch`) a request takes twenty times as long,
 * and longer with each one before it; `../index.ts` shows that it opens.
 */
function isolateOf(isolate: Env, held: (work: Promise<unknown>) => void): Fetch {
  return async (request) => {
    const context = createExecutionContext();
    const waitUntil = context.waitUntil.bind(context);
    context.waitUntil = (work) => {
      held(work);
      waitUntil(work);
    };
    return await edge.fetch(request as never, isolate, context);
  };
}

/** The isolate that also counts what comes from the queue. */
const usual = isolateOf(env, () => {});

/** A string or bytes go as they are, everything else as JSON. */
export function call(method: string, path: string, options: Call = {}, fetch: Fetch = usual) {
  const { key, body, headers, signal } = options;
  const isRaw = typeof body === 'string' || body instanceof Uint8Array || body instanceof ReadableStream;
  return fetch(
    new Request(EDGE_URL + path, {
      method,
      headers: {
        ...(body === undefined ? {} : { 'content-type': 'application/json' }),
        ...(key === undefined ? {} : { authorization: `Bearer ${key}` }),
        ...headers,
      },
      ...(body === undefined ? {} : { body: isRaw ? (body as BodyInit) : JSON.stringify(body) }),
      ...(signal === undefined ? {} : { signal }),
    }),
  );
}

export const admin = (method: string, path: string, body?: unknown, key: string = ADMIN_KEY) =>
  call(method, `/admin/v1${path}`, { key, body });

export const chat = (key: string, body: object = {}, fetch?: Fetch) =>
  call('POST', '/v1/chat/completions', { key, body: { ...CHAT, ...body } }, fetch);

export const CHAT = { model: MODEL.id, messages: [{ role: 'user', content: 'north is cold' }] };
export const say = (content: string) => ({ messages: [{ role: 'user', content }] });

let tenants = 0;

/** A new tenant and a key of it. */
export async function newTenant(): Promise<{ tenant: string; key: string; keyId: string }> {
  const tenant = `tenant-${++tenants}`;
  await created(admin('POST', '/tenants', { id: tenant, name: tenant }));
  const { key, id } = await newKey({ tenant, kind: 'tenant' });
  return { tenant, key, keyId: id };
}

export const newKey = (body: object): Promise<CreatedKey> =>
  created(admin('POST', '/keys', { name: 'test', ...body }));

/** Moves the clock on. The test sets it right with `vi.useRealTimers()`. */
export const later = (ms: number): void => {
  vi.useFakeTimers({ toFake: ['Date'], now: Date.now() + ms });
};

const TICK_ms = 10;
/**
 * From now on the clock runs ten times as fast, and with it whatever is set to it; what travels over the network does not. The
 * test sets it right with `vi.useRealTimers()`.
 */
export function hurry(): void {
  vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout', 'Date'] });
  const { setTimeout: hurried } = globalThis;
  const clock = setInterval(() => {
    // Another test may have faked timers of its own by now.
    if (globalThis.setTimeout === hurried) vi.advanceTimersByTime(10 * TICK_ms);
    else clearInterval(clock);
  }, TICK_ms);
}

/** Asks again and again, for as long as a busy machine may take. */
export const soon = <T>(check: () => T | Promise<T>): Promise<T> =>
  vi.waitFor(check, { timeout: 12_000, interval: 50 });

/** The body of a 201. */
export async function created<T>(answer: Promise<Response>): Promise<T> {
  const response = await answer;
  const text = await response.text();
  expect(response.status, text).toBe(201);
  return JSON.parse(text);
}

const DIRECTIONS = { north: [1, 0, 0, 0], east: [0, 1, 0, 0], south: [0, 0, 1, 0] };

/** Three clusters, each with a mask of its own; `name` makes the version another one. */
export function makeMaskSet(name: string, change: Partial<MaskSet> = {}): MaskSet {
  const clusters = Object.entries(DIRECTIONS).map(([label, centroid], index) => {
    const mask = TEST_MASKS[index]!;
    expect(sparsity(mask)).toBeCloseTo(2 / 12);
    return {
      centroid,
      bits: maskBits(mask),
      mask: maskId(MODEL.hash as ModelHash, mask),
      share: 1 / 3,
      label,
    };
  });
  return {
    format: 'maskroute-mask-set-v1',
    name,
    model: { name: MODEL.id, hash: MODEL.hash, blockCount: MODEL.blockCount },
    encoder: { ...ENCODER },
    clusters,
    targetSparsity: 2 / 12,
    reachedSparsity: 2 / 12,
    surrogate: false,
    learned: { method: 'by hand' },
    heldOut: { learned: { agreement: 0.9 } },
    createdAt: '2026-01-01T00:00:00Z',
    ...change,
  };
}

export const upload = (set: MaskSet, tenant = '', key?: string): Promise<MaskSetSummary> =>
  created(admin('POST', `/mask-sets?tenant=${tenant}`, set, key));

export const activate = (version: string, more: object = {}): Promise<Publication> =>
  created(admin('POST', '/publications', { version, ...more }));

/** Uploads a set and makes it live. */
export async function goLive(name: string, tenant = ''): Promise<{ set: MaskSet; version: string }> {
  const set = makeMaskSet(name);
  const { version } = await upload(set, tenant);
  await activate(version, { tenant });
  return { set, version };
}

/** What the backend server saw of a request. */
export async function recorded(requestId: string): Promise<Recorded | null> {
  return await (await fetch(`${env.BACKEND_URL}/recorded/${requestId}`)).json();
}

export async function errorCode(answer: Promise<Response> | Response): Promise<string> {
  const response = await answer;
  const body = await response.json<{ error: { code: string; message: string; type: string } }>();
  expect(body.error.message).toBeTypeOf('string');
  expect(body.error.type).toBeTypeOf('string');
  return `${response.status} ${body.error.code}`;
}

type Mood = 'good' | 'slow' | 'stalled' | 'failing';
const SLOW_ms = 400;

/** D1 as it is on a bad day: questions take long, are never answered, or fail. The real binding is behind it. */
export function badD1(): { DB: D1Database; be(mood: Mood): void; asked(): number } {
  let mood: Mood = 'good';
  let asked = 0;
  const ask = (question: () => unknown): unknown => {
    asked++;
    if (mood === 'stalled') return new Promise(() => {});
    if (mood === 'failing') return Promise.reject(new Error('D1_ERROR: the storage is overloaded'));
    return mood === 'slow' ? new Promise((go) => setTimeout(go, SLOW_ms)).then(question) : question();
  };
  return {
    DB: interceptedD1(env.DB, ask),
    be(next) {
      mood = next;
    },
    asked: () => asked,
  };
}
