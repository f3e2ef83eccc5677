/** Guessing administrators' keys: how many guesses there are, from one address and from all of them. */

import { runInDurableObject } from 'cloudflare:test';
import { env } from 'cloudflare:workers';
import fc from 'fast-check';
import { afterEach, describe, expect, it, vi } from 'vitest';
import { type AttemptBook, openAttemptBook } from '../../workers/attempts/attempt-book.ts';
import { addressGroup } from '../../workers/services/key-attempts.ts';
import { ADMIN_KEY, EDGE_URL } from '../support/edge/constants.ts';
import { call, errorCode, freshIsolate, newKey, newTenant } from './support/edge.ts';

afterEach(() => {
  vi.useRealTimers();
});
const later = (ms: number) => vi.useFakeTimers({ toFake: ['Date'], now: Date.now() + ms });
const MINUTE_ms = 60_000;

const login = (key: string, address: string, isolate = freshIsolate()) =>
  call(
    'POST',
    '/dashboard/session',
    { body: { key }, headers: { origin: EDGE_URL, 'cf-connecting-ip': address } },
    isolate,
  );
const asAdmin = (key: string, address: string, isolate = freshIsolate()) =>
  call('GET', '/admin/v1/tenants', { key, headers: { 'cf-connecting-ip': address } }, isolate);

describe('logging in', () => {
  it('is refused after ten wrong keys of an address, with the right one too, in every isolate', async () => {
    for (let i = 0; i < 10; i++) {
      expect(await errorCode(login(`wrong-key-${i}`, '198.51.100.1'))).toBe('401 invalid_api_key');
    }
    for (const key of ['wrong-key', ADMIN_KEY]) {
      const refused = await login(key, '198.51.100.1');
      expect(Number(refused.headers.get('retry-after'))).toBeGreaterThan(890);
      expect(refused.headers.get('set-cookie')).toBeNull();
      expect(await errorCode(refused)).toBe('429 too_many_attempts');
    }
    expect((await login(ADMIN_KEY, '198.51.100.2')).status).toBe(200);
    later(15 * MINUTE_ms);
    expect((await login(ADMIN_KEY, '198.51.100.1')).status).toBe(200);
  });

  it('counts ten at once as it counts ten in turn', async () => {
    const answers = await Promise.all(
      Array.from({ length: 30 }, (_, i) => login(`wrong-key-${i}`, '198.51.100.3').then(errorCode)),
    );
    expect(answers.filter((code) => code === '401 invalid_api_key')).toHaveLength(10);
    expect(answers.filter((code) => code === '429 too_many_attempts')).toHaveLength(20);
  });

  it('lets any number on at once with the right key', async () => {
    const isolate = freshIsolate();
    const statuses = async (keys: readonly string[]) =>
      (await Promise.all(keys.map((key) => asAdmin(key, '198.51.100.9', isolate)))).map(
        ({ status }) => status,
      );
    expect(await statuses(Array(70).fill(ADMIN_KEY))).toEqual(Array(70).fill(200));
    // Guesses among them count as any others.
    const guesses = Array.from({ length: 12 }, (_, i) => `wrong-key-${i}`);
    expect(await statuses([...guesses, ADMIN_KEY])).toContain(401);
    expect(await errorCode(asAdmin('wrong-key', '198.51.100.9', isolate))).toBe('429 too_many_attempts');
  });

  it('with the right key does not count, and takes back no other attempt', async () => {
    const isolate = freshIsolate();
    for (let i = 0; i < 9; i++) await login(`wrong-key-${i}`, '198.51.100.4', isolate);
    for (let i = 0; i < 30; i++) {
      expect((await login(ADMIN_KEY, '198.51.100.4', isolate)).status).toBe(200);
    }
    expect(await errorCode(login('wrong-key', '198.51.100.4', isolate))).toBe('401 invalid_api_key');
    expect(await errorCode(login(ADMIN_KEY, '198.51.100.4', isolate))).toBe('429 too_many_attempts');
  });

  it('takes the addresses of an IPv6 network for one', async () => {
    for (let i = 0; i < 10; i++) await login(`wrong-key-${i}`, `2001:db8:1:2::${i}`);
    expect(await errorCode(login(ADMIN_KEY, '2001:0DB8:1:2:ffff::1'))).toBe('429 too_many_attempts');
    expect((await login(ADMIN_KEY, '2001:db8:1:3::1')).status).toBe(200);
  });

  it('and a key that sends completions is one of them; a body that is none is not', async () => {
    const { key } = await newTenant();
    for (let i = 0; i < 12; i++) {
      const answer = call('POST', '/dashboard/session', {
        body: '{',
        headers: { origin: EDGE_URL, 'cf-connecting-ip': '198.51.100.5' },
      });
      expect(await errorCode(answer)).toBe('400 invalid_json');
    }
    for (let i = 0; i < 10; i++) {
      expect(await errorCode(login(key, '198.51.100.5'))).toBe('403 forbidden');
    }
    expect(await errorCode(login(ADMIN_KEY, '198.51.100.5'))).toBe('429 too_many_attempts');
  });

  it('without anybody to count is refused', async () => {
    const KEY_ATTEMPTS = {
      idFromName: env.KEY_ATTEMPTS.idFromName.bind(env.KEY_ATTEMPTS),
      get: () => broken,
    };
    const broken = { begin: () => Promise.reject(new Error('the object is gone')) };
    const isolate = freshIsolate({ KEY_ATTEMPTS: KEY_ATTEMPTS as never });
    expect(await errorCode(login(ADMIN_KEY, '198.51.100.6', isolate))).toBe('503 configuration_unavailable');
  });
});

describe('the admin API', () => {
  it('is no way around: guesses there count as well', async () => {
    for (let i = 0; i < 10; i++) {
      expect(await errorCode(asAdmin(`wrong-key-${i}`, '198.51.100.10'))).toBe('401 invalid_api_key');
    }
    expect(await errorCode(asAdmin(ADMIN_KEY, '198.51.100.10'))).toBe('429 too_many_attempts');
    expect(await errorCode(login(ADMIN_KEY, '198.51.100.10'))).toBe('429 too_many_attempts');
  });

  it('lets a key on that the isolate knows, whatever else comes from its address', async () => {
    const isolate = freshIsolate();
    const { key } = await newKey({ kind: 'admin' });
    expect((await asAdmin(key, '198.51.100.11', isolate)).status).toBe(200);
    for (let i = 0; i < 11; i++) await asAdmin(`wrong-key-${i}`, '198.51.100.11');
    expect((await asAdmin(key, '198.51.100.11', isolate)).status).toBe(200);
    expect(await errorCode(asAdmin(ADMIN_KEY, '198.51.100.11'))).toBe('429 too_many_attempts');
  });
});

const LIMITS = { window_ms: 1_000, addressMax: 3, totalMax: 6, known_ms: 100_000, knownMax: 2 };
let books = 0;
const withBook = <T>(work: (book: AttemptBook) => T): Promise<T> =>
  runInDurableObject(env.KEY_ATTEMPTS.getByName(`book-${++books}`), (_object, state) => {
    for (const table of ['attempts', 'known']) state.storage.sql.exec(`DROP TABLE IF EXISTS ${table}`);
    return work(openAttemptBook(state.storage.sql, LIMITS));
  });

describe('the book', () => {
  it('lets nobody keep out those from whose address the right key came', async () => {
    await withBook((book) => {
      const first = book.begin('admin', 0);
      if (first.allowed) book.succeeded(first.attempt, 0);
      for (let i = 0; i < 6; i++) expect(book.begin(`bot-${i}`, 10).allowed).toBe(true);
      expect(book.begin('bot-7', 10)).toEqual({ allowed: false, retryAfter_ms: 1_000 });
      for (let i = 0; i < 3; i++) expect(book.begin('admin', 20).allowed).toBe(true);
      expect(book.begin('admin', 20)).toEqual({ allowed: false, retryAfter_ms: 1_000 });
    });
  });

  it('never allows more wrong keys than its limits, in any stretch of a window', async () => {
    const step = fc.record({
      who: fc.nat(3),
      wait_ms: fc.constantFrom(1, 2, 200, 999, 1_000),
      right: fc.nat(4),
    });
    await fc.assert(
      fc.asyncProperty(fc.array(step, { maxLength: 60 }), async (steps) => {
        await withBook((book) => {
          const wrong: { who: number; at_ms: number }[] = [];
          const known = new Set<number>();
          let now_ms = 0;
          for (const { who, wait_ms, right } of steps) {
            now_ms += wait_ms;
            const inside = wrong.filter(({ at_ms }) => at_ms > now_ms - LIMITS.window_ms);
            const own = inside.filter((entry) => entry.who === who).length;
            const mayTry = own < 3 && (inside.length < 6 || known.has(who));
            const answer = book.begin(String(who), now_ms);
            expect(answer.allowed).toBe(mayTry);
            if (!answer.allowed) {
              expect(answer.retryAfter_ms).toBeGreaterThan(0);
              expect(answer.retryAfter_ms).toBeLessThanOrEqual(LIMITS.window_ms);
            } else if (right === 0) {
              book.succeeded(answer.attempt, now_ms);
              known.delete(who);
              known.add(who);
              if (known.size > 2) known.delete([...known][0]!);
            } else wrong.push({ who, at_ms: now_ms });
          }
        });
      }),
      { numRuns: 30 },
    );
  });
});

it.each([
  ['203.0.113.7', '203.0.113.7'],
  ['2001:db8::1', '2001:db8:0:0'],
  ['2001:0db8:0001:0002:0003:0004:0005:0006', '2001:db8:1:2'],
  ['::1', '0:0:0:0'],
  ['fe80::', 'fe80:0:0:0'],
])('%s is counted as %s', (address, group) => {
  expect(addressGroup(address)).toBe(group);
});
