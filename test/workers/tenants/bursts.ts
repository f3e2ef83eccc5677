/** What anybody may send at once: every tenant, and every administrator. */
import { env } from 'cloudflare:workers';
import { afterEach, describe, expect, it, vi } from 'vitest';
import { createNamedMasks } from '../../../workers/routing/live-sets.ts';
import { createBurstLimit } from '../../../workers/tenants/budgets.ts';
import { ADMIN_KEY, EDGE_URL } from '../../support/edge/constants.ts';
import { CHAT, call, chat, errorCode, freshIsolate, goLive, newKey, newTenant } from '../support/edge.ts';

afterEach(() => {
  vi.restoreAllMocks();
});

/** A caller's first request in an isolate is the one for which the limiter is asked. */
const askAtOnce = () => vi.spyOn(Math, 'random').mockReturnValue(0.9999);

const limiter = env.TENANT_BURST!;
/** The binding's own, in vitest.config.ts. */
const LIMIT = 100;

/** The limiter's windows are the clock's: one may end between using it up and asking. */
async function onceUsedUp(who: string, ask: () => Promise<Response>): Promise<Response> {
  return await vi.waitFor(async () => {
    await Promise.all(Array.from({ length: LIMIT }, () => limiter.limit({ key: who })));
    const response = await ask();
    expect(response.status).toBe(429);
    return response;
  }, 10_000);
}

describe('a tenant without limits of its own', () => {
  it('is held to a ceiling at every door, and told when to come back; others are not', async () => {
    askAtOnce();
    const { tenant, key } = await newTenant();
    const doors = [
      ['POST', '/v1/chat/completions', CHAT],
      ['POST', '/v1/route', CHAT],
      ['POST', '/v1/feedback', { id: 'chatcmpl-x', rating: 1 }],
      ['GET', '/v1/models', undefined],
    ] as const;
    for (const [method, path, body] of doors) {
      const refused = await onceUsedUp(tenant, () => call(method, path, { key, body }, freshIsolate()));
      expect(refused.headers.get('retry-after'), path).toBe('10');
      expect(await errorCode(refused)).toBe('429 rate_limit_exceeded');
    }
    const { key: other } = await newTenant();
    expect((await chat(other, {}, freshIsolate())).status).toBe(200);
  });

  it('rates no faster than an administrator may ask, since each rating is written to the database', async () => {
    askAtOnce();
    const [rates, other] = [await newTenant(), await newTenant()];
    const isolate = () => freshIsolate({ ADMIN_BURST: limiter });
    const rate = async ({ key }: { key: string }) => {
      const { id } = await (await chat(key)).json<{ id: string }>();
      return await call('POST', '/v1/feedback', { key, body: { id, rating: 1 } }, isolate());
    };
    const refused = await onceUsedUp(`feedback:${rates.tenant}`, () => rate(rates));
    expect(refused.headers.get('retry-after')).toBe('10');
    expect(await errorCode(refused)).toBe('429 rate_limit_exceeded');
    expect((await chat(rates.key, {}, isolate())).status).toBe(200);
    expect((await rate(other)).status).toBe(201);
  });

  it('names no more masks that nobody knows than an administrator may ask questions', async () => {
    askAtOnce();
    const { set } = await goLive('known-masks');
    const [names, other] = [await newTenant(), await newTenant()];
    const isolate = freshIsolate({ ADMIN_BURST: limiter });
    const unknown = `m_${'0'.repeat(24)}`;
    const named = (mask: string, key = names.key) => chat(key, { mask }, isolate);
    const refused = await onceUsedUp(`mask:${names.tenant}`, () => named(unknown));
    expect(await errorCode(refused)).toBe('429 rate_limit_exceeded');
    // Neither those that are live here, nor anybody else.
    for (const mask of ['dense', set.clusters[0]!.mask]) expect((await named(mask)).status).toBe(200);
    expect(await errorCode(await named(unknown, other.key))).toBe('400 unknown_mask');
  });

  it('names a mask that a backend worked with as often as it likes', async () => {
    const asked: string[] = [];
    const burst = { enter: (who: string) => Promise.resolve(void asked.push(who)) };
    const finds: string[] = [];
    const find = async (id: string) => {
      finds.push(id);
      return id === 'm_1' ? 0.25 : null;
    };
    const masks = createNamedMasks(burst, (id) => id === 'm_held', find);
    await masks.enter('a', 'm_1');
    expect(asked).toEqual(['mask:a']);
    masks.met('m_1');
    for (const id of ['m_1', 'm_held', 'dense']) await masks.enter('a', id);
    expect(asked).toEqual(['mask:a']);
    for (let i = 0; i < 2; i++) expect(await masks.sparsityOf('m_1')).toBe(0.25);
    for (let i = 0; i < 2; i++) expect(await masks.sparsityOf('m_2')).toBeNull();
    expect(finds).toEqual(['m_1', 'm_2', 'm_2']);
  });

  it('is let in when nobody can say how much it sent', async () => {
    askAtOnce();
    const { key } = await newTenant();
    const broken = { limit: () => Promise.reject(new Error('the limiter is gone')) };
    expect((await chat(key, {}, freshIsolate({ TENANT_BURST: broken }))).status).toBe(200);
  });
});

describe('a burst limit', () => {
  const counting = () => {
    const counted = { asked: 0 };
    const binding: Pick<RateLimit, 'limit'> = {
      limit: (options) => {
        counted.asked++;
        return limiter.limit(options);
      },
    };
    return { binding, counted };
  };

  it('is asked so often only, and holds all the same', async () => {
    const { binding, counted } = counting();
    const burst = createBurstLimit(binding, 'Too many', 50, () => 0.9999);
    let entered = 0;
    const refusal = await (async () => {
      for (; ; entered++) await burst.enter('flood');
    })().catch((error) => error);
    expect(refusal).toMatchObject({ code: 'rate_limit_exceeded', retryAfter_s: 10 });
    expect(entered % 50).toBe(0);
    expect(counted.asked).toBe(entered / 50 + 1);
    expect(entered).toBeGreaterThanOrEqual(50 * LIMIT);
    // A window may have ended meanwhile.
    expect(entered).toBeLessThanOrEqual(2 * 50 * LIMIT);
  });

  it('counts what a caller sends, in however many isolates', async () => {
    const { binding, counted } = counting();
    // One request in each of twice as many isolates as the limit has places: all of them are let in.
    for (let isolate = 0; isolate < 2 * LIMIT; isolate++) {
      await createBurstLimit(binding, 'Too many', 250).enter('thinly-spread');
    }
    expect(counted.asked).toBeLessThan(10);
    // Twenty-five in each of two hundred are 5,000, which is a hundred fifties.
    counted.asked = 0;
    const limit = async () => {
      counted.asked++;
      return { success: true };
    };
    for (let isolate = 0; isolate < 200; isolate++) {
      const burst = createBurstLimit({ limit }, 'Too many', 50);
      for (let i = 0; i < 25; i++) await burst.enter('spread');
    }
    expect(counted.asked).toBeGreaterThan(60);
    expect(counted.asked).toBeLessThan(140);
  });

  it('asks for each request of a caller that it refused, until one is let in', async () => {
    let success = false;
    let asked = 0;
    const limit = async () => {
      asked++;
      return { success };
    };
    const burst = createBurstLimit({ limit }, 'Too many', 50, () => 0.9999);
    for (let i = 0; i < 3; i++) {
      await expect(burst.enter('one')).rejects.toMatchObject({ code: 'rate_limit_exceeded' });
    }
    success = true;
    await burst.enter('one');
    await burst.enter('one');
    expect(asked).toBe(4);
  });
});

describe('an administrator', () => {
  /** With a limit that a test can reach. */
  const isolate = () => {
    askAtOnce();
    return freshIsolate({ ADMIN_BURST: limiter });
  };
  const list = (key: string, from = isolate()) => call('GET', '/admin/v1/tenants', { key }, from);

  it('with a known key is held to a rate, and others are not', async () => {
    const [{ key, id }, other] = [await newKey({ kind: 'admin' }), await newKey({ kind: 'admin' })];
    const refused = await onceUsedUp(`key:${id}`, () => list(key));
    expect(refused.headers.get('retry-after')).toBe('10');
    expect(await errorCode(refused)).toBe('429 rate_limit_exceeded');
    const from = isolate();
    for (let i = 0; i < 3; i++) expect((await list(other.key, from)).status).toBe(200);
  });

  it('of one tenant counts together with all others of it', async () => {
    const { tenant } = await newTenant();
    for (let i = 0; i < 2; i++) {
      const { key } = await newKey({ tenant, kind: 'tenant_admin' });
      const refused = await onceUsedUp(`tenant:${tenant}`, () => list(key));
      expect(await errorCode(refused)).toBe('429 rate_limit_exceeded');
    }
  });

  it('counts with a session as with its key, and logging in counts', async () => {
    const { key, id } = await newKey({ kind: 'admin' });
    const login = () =>
      call('POST', '/dashboard/session', { body: { key }, headers: { origin: EDGE_URL } }, isolate());
    const cookie = (await login()).headers.get('set-cookie')!.split(';')[0]!;
    const withSession = () => call('GET', '/admin/v1/tenants', { headers: { cookie } }, isolate());
    expect((await withSession()).status).toBe(200);
    expect(await errorCode(await onceUsedUp(`key:${id}`, withSession))).toBe('429 rate_limit_exceeded');
    expect(await errorCode(await onceUsedUp(`key:${id}`, login))).toBe('429 rate_limit_exceeded');
  });

  it('with the root key is held as well', async () => {
    const refused = await onceUsedUp('key:root', () => list(ADMIN_KEY));
    expect(await errorCode(refused)).toBe('429 rate_limit_exceeded');
  });
});
