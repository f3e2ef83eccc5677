/** Budgets: reserved before, settled after, exact whatever happens in between, and never guessed. */
import { env } from 'cloudflare:workers';
import OpenAI from 'openai';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import type { Env } from '../../../workers/env.ts';
import type { ReserveRequest } from '../../../workers/tenants/ledger.ts';
import { EDGE_URL } from '../../support/edge/constants.ts';
import {
  CHAT,
  call,
  chat,
  errorCode,
  freshIsolate,
  later,
  newTenant,
  recorded,
  say,
  soon,
} from '../support/edge.ts';
import { budgetOf, limitedTenant, midMinute } from '../support/limits.ts';

beforeEach(midMinute);
afterEach(() => {
  vi.useRealTimers();
  vi.restoreAllMocks();
});

/** What the test backend counts: a token a word of the prompt (here one word), three of the answer. */
const ONE = { ...say('north'), max_tokens: 10 };
const COST = 4;

const settled = (tenant: string, tokens: number) =>
  soon(async () => expect((await budgetOf(tenant))['tokens/day']).toBe(tokens));

describe('a budget of requests', () => {
  it('is exact, also for requests at once, and says when to come back', async () => {
    const { tenant, key } = await limitedTenant({ requests_per_minute: 20 });
    const answers = await Promise.all(Array.from({ length: 50 }, () => chat(key, ONE)));
    const taken = answers.filter((response) => response.status === 200);
    expect(taken).toHaveLength(20);
    const refused = answers.find((response) => response.status === 429)!;
    expect(refused.headers.get('retry-after')).toBe('59');
    expect(Object.fromEntries(refused.headers)).toMatchObject({
      'x-ratelimit-limit-requests': '20',
      'x-ratelimit-remaining-requests': '0',
      'x-ratelimit-reset-requests': '61s',
    });
    for (const response of answers)
      if (response.status !== 200) expect(await errorCode(response)).toBe('429 budget_exceeded');
    expect(await budgetOf(tenant)).toEqual({ 'requests/minute': 20 });
    later(59_000);
    const early = await chat(key, ONE);
    expect(early.headers.get('retry-after')).toBe('2');
    expect(await errorCode(early)).toBe('429 budget_exceeded');
    later(2_000);
    expect((await chat(key, ONE)).status).toBe(200);
  });

  it.each([
    ['is used up until tomorrow', { requests_per_day: 1 }, {}],
    ['never has room', { tokens_per_day: 60 }, { max_tokens: 100 }],
  ])("that %s is an error of OpenAI's client at once: retries are in vain", async (_, limits, more) => {
    const { key } = await limitedTenant(limits);
    await (await chat(key, { ...ONE, max_tokens: 1 })).text();
    const { client, fetch } = clientOf(key);
    const answer = client.chat.completions.create({ ...CHAT, ...more } as never);
    await expect(answer).rejects.toMatchObject({ status: 429, code: 'budget_exceeded' });
    expect(fetch).toHaveBeenCalledTimes(1);
  });

  it("that is used up within a second is waited for by OpenAI's client", async () => {
    const { key } = await limitedTenant({ requests_per_minute: 1 });
    await (await chat(key, ONE)).text();
    const real = globalThis.setTimeout;
    const sleepOf_ms = vi.fn();
    vi.spyOn(globalThis, 'setTimeout').mockImplementation(((work: () => void, ms: number) => {
      if (ms < 59_000) return real(work, ms);
      sleepOf_ms(ms);
      later(61_000);
      return real(work, 0);
    }) as typeof setTimeout);
    const { client, fetch } = clientOf(key);
    await client.chat.completions.create(CHAT as never, { timeout: 10_000 });
    expect(sleepOf_ms).toHaveBeenCalledExactlyOnceWith(59_000);
    expect(fetch).toHaveBeenCalledTimes(2);
  });

  function clientOf(key: string) {
    const isolate = freshIsolate();
    const fetch = vi.fn(
      (url: string | URL | Request, init?: RequestInit): Promise<Response> =>
        isolate(new Request(url as string, init)),
    );
    return { client: new OpenAI({ baseURL: `${EDGE_URL}/v1`, apiKey: key, fetch }), fetch };
  }

  it('counts what is left for the client', async () => {
    const { key } = await limitedTenant({ requests_per_minute: 5, requests_per_day: 3 });
    const response = await chat(key, ONE);
    expect(response.headers.get('x-ratelimit-limit-requests')).toBe('3');
    expect(response.headers.get('x-ratelimit-remaining-requests')).toBe('2');
    expect(response.headers.get('x-ratelimit-limit-tokens')).toBeNull();
  });
});

describe('a budget of tokens', () => {
  it('is settled with what the backend counted', async () => {
    const { tenant, key } = await limitedTenant({ tokens_per_day: 1000 });
    const response = await chat(key, ONE);
    // Reserved: 5 bytes, the template, and ten tokens of answer.
    expect(Number(response.headers.get('x-ratelimit-remaining-tokens'))).toBe(1000 - (5 + 32 + 8) - 10);
    await response.text();
    await settled(tenant, COST);
    await (await chat(key, { ...ONE, stream: true })).text();
    await settled(tenant, 2 * COST);
  });

  it('is never overdrawn by requests at once', async () => {
    const { tenant, key } = await limitedTenant({ tokens_per_minute: 300, tokens_per_day: 10_000 });
    const answers = await Promise.all(Array.from({ length: 20 }, () => chat(key, { ...ONE, stream: true })));
    // 55 are reserved a request.
    expect(answers.filter(({ status }) => status === 200)).toHaveLength(5);
    await Promise.all(answers.map((response) => response.text()));
    await settled(tenant, 5 * COST);
  });

  it('cuts an answer of open length to what is left, and refuses what could not be useful', async () => {
    const { tenant, key } = await limitedTenant({ tokens_per_day: 100 });
    const response = await chat(key, say('north'));
    expect(response.status).toBe(200);
    await response.text();
    const seen = await recorded(response.headers.get('x-request-id')!);
    expect(seen!.body).toMatchObject({ max_tokens: 100 - 45 });
    await settled(tenant, COST);
    const tooLong = await chat(key, { ...say('north'), max_tokens: 90 });
    expect(tooLong.headers.get('retry-after')).toBeNull();
    expect(await errorCode(tooLong)).toBe('429 budget_exceeded');
    expect((await chat(key, { ...say('north'), max_tokens: 50 })).status).toBe(200);
  });

  it('refuses an answer of open length whose least length has no room, as what it is', async () => {
    const { key } = await limitedTenant({ tokens_per_day: 100 });
    expect(await errorCode(chat(key, { ...say('north'), min_tokens: 60 }))).toBe('429 budget_exceeded');
    expect((await chat(key, { ...say('north'), min_tokens: 50 })).status).toBe(200);
  });

  it('cuts each choice to its part of what is left, by the name that the wire has for it', async () => {
    const bodyOf = async (path: string, body: object) => {
      const { key } = await limitedTenant({ tokens_per_day: 100 });
      const response = await call('POST', path, { key, body: { model: CHAT.model, ...body } });
      await response.text();
      return (await recorded(response.headers.get('x-request-id')!))!.body;
    };
    const left_tokens = 100 - 45;
    const choices = await bodyOf('/v1/chat/completions', { ...say('north'), n: 2 });
    expect(choices).toMatchObject({ max_tokens: Math.floor(left_tokens / 2) });
    const newer = await bodyOf('/v1/responses', { input: 'north' });
    expect(newer).toMatchObject({ max_output_tokens: left_tokens });
    expect(newer).not.toHaveProperty('max_tokens');
  });

  it('counts choices and prompts', async () => {
    const { key } = await limitedTenant({ tokens_per_day: 100 });
    expect(await errorCode(chat(key, { ...ONE, n: 6 }))).toBe('429 budget_exceeded');
    expect((await chat(key, { ...ONE, n: 5 })).status).toBe(200);
  });

  it('counts what was made for a client that hung up', async () => {
    const { tenant, key } = await limitedTenant({ tokens_per_day: 1000 });
    const leave = new AbortController();
    const isolate = freshIsolate();
    const answer = await chat(key, { ...ONE, stream: true, user: 'stream-forever' }, (request) =>
      isolate(new Request(request, { signal: leave.signal })),
    );
    const reader = answer.body!.getReader();
    // The role, and two tokens.
    for (let chunk = 0; chunk < 3; chunk++) await reader.read();
    await reader.cancel();
    leave.abort();
    await vi.waitFor(async () => {
      const used = (await budgetOf(tenant))['tokens/day']!;
      expect(used).toBeGreaterThanOrEqual(3);
      expect(used).toBeLessThan(20);
    }, 8_000);
  });

  /** The books, where `reserve` meets `trouble`. */
  const troubled = (trouble: (reserving: () => unknown) => Promise<unknown>): Pick<Env, 'BUDGETS'> => ({
    BUDGETS: new Proxy(env.BUDGETS, {
      get(target, name) {
        if (name !== 'get') return Reflect.get(target, name).bind(target);
        return (id: DurableObjectId) => {
          const object = target.get(id);
          return {
            reserve: (request: ReserveRequest) => trouble(() => object.reserve(request)),
            settle: (name: string, tokens: number) => object.settle(name, tokens),
          };
        };
      },
    }),
  });

  it('takes nothing for a client that left while it was asked, and asks no backend', async () => {
    const { tenant, key } = await limitedTenant({ tokens_per_day: 1000, requests_per_day: 9 });
    const leave = new AbortController();
    const isolate = freshIsolate(
      troubled(async (reserving) => {
        const granted = await reserving();
        expect((await budgetOf(tenant))['tokens/day']).toBe(55);
        leave.abort();
        return granted;
      }),
    );
    const answer = chat(key, { ...ONE, user: 'busy' }, (request) =>
      isolate(new Request(request, { signal: leave.signal })),
    );
    expect((await answer).status).toBe(499);
    await settled(tenant, 0);
    expect(await recorded((await answer).headers.get('x-request-id')!)).toBeNull();
    expect((await budgetOf(tenant))['requests/day']).toBe(1);
  });

  it('takes nothing for a request that was refused since the books did not answer, though they had heard', async () => {
    const { tenant, key } = await limitedTenant({ tokens_per_day: 1000 });
    const isolate = freshIsolate(
      troubled(async (reserving) => {
        await reserving();
        throw new Error('Network connection lost');
      }),
    );
    expect(await errorCode(chat(key, ONE, isolate))).toBe('503 budget_unavailable');
    await settled(tenant, 0);
  });

  it.each([
    ['is what it took to find out', 'too-long', 1],
    ['is nothing where nobody knows', 'too-long-unmeasured', 0],
  ])('of a prompt that is too long %s', async (_, user, tokens) => {
    const { tenant, key } = await limitedTenant({ tokens_per_day: 1000 });
    expect(await errorCode(chat(key, { ...ONE, user }))).toBe('400 context_length_exceeded');
    await settled(tenant, tokens);
  });

  it('takes nothing for a request that no backend ran', async () => {
    const { tenant, key } = await limitedTenant({ tokens_per_day: 1000, requests_per_day: 9 });
    expect(await errorCode(chat(key, { ...ONE, user: 'queue-full' }))).toBe('429 queue_full');
    expect(await errorCode(chat(key, { ...ONE, mask: 'm_wrong' }))).toBe('400 invalid_request');
    await settled(tenant, 0);
    expect((await budgetOf(tenant))['requests/day']).toBe(1);
  });
});

describe('the books', () => {
  const broken = (failures: number): Pick<Env, 'BUDGETS'> => {
    let left = failures;
    return {
      BUDGETS: new Proxy(env.BUDGETS, {
        get(target, name) {
          if (name !== 'get') return Reflect.get(target, name).bind(target);
          return (id: DurableObjectId) => {
            if (left-- > 0) return { reserve: () => Promise.reject(new Error('Durable Object reset')) };
            return target.get(id);
          };
        },
      }),
    };
  };

  it('are not asked for a tenant without limits', async () => {
    const { key } = await newTenant();
    const response = await chat(key, ONE, freshIsolate(broken(Number.POSITIVE_INFINITY)));
    expect(response.status).toBe(200);
    expect([...response.headers.keys()].filter((name) => name.startsWith('x-ratelimit'))).toEqual([]);
  });

  it('are asked again once, and a request is refused when they cannot be', async () => {
    const { tenant, key } = await limitedTenant({ requests_per_day: 100 });
    expect((await chat(key, ONE, freshIsolate(broken(1)))).status).toBe(200);
    expect(await budgetOf(tenant)).toEqual({ 'requests/day': 1 });
    const refused = await chat(key, ONE, freshIsolate(broken(Number.POSITIVE_INFINITY)));
    expect(refused.headers.get('retry-after')).toBe('1');
    expect(await errorCode(refused)).toBe('503 budget_unavailable');
  });

  it('are each of one tenant', async () => {
    const [one, other] = [
      await limitedTenant({ requests_per_day: 1 }),
      await limitedTenant({ requests_per_day: 1 }),
    ];
    expect((await chat(one.key, ONE)).status).toBe(200);
    expect(await errorCode(chat(one.key, ONE))).toBe('429 budget_exceeded');
    expect((await chat(other.key, ONE)).status).toBe(200);
  });

  it('are not even asked in a burst', async () => {
    const { tenant, key } = await limitedTenant({ requests_per_day: 1000 });
    // A new isolate asks the limiter for its first request, which else is left to chance.
    vi.spyOn(Math, 'random').mockReturnValue(0.9999);
    // The limiter's windows are the clock's, so one may end in between.
    let taken = 0;
    const refused = await vi.waitFor(async () => {
      await Promise.all(Array.from({ length: 100 }, () => env.TENANT_BURST!.limit({ key: tenant })));
      const response = await chat(key, ONE, freshIsolate());
      if (response.status === 200) taken++;
      expect(response.status).toBe(429);
      return response;
    }, 10_000);
    expect(refused.headers.get('retry-after')).toBe('10');
    expect(await errorCode(refused)).toBe('429 rate_limit_exceeded');
    expect(await budgetOf(tenant)).toEqual({ 'requests/day': taken });
  });
});
