/** What a request costs its tenant on which several backends worked: the one answer that came, once. */
import { afterEach, describe, expect, it, vi } from 'vitest';
import type { UsageRow } from '../../../shared/admin/admin-wire.ts';
import { HEADERS } from '../../../shared/wire/protocol.ts';
import {
  BUDGET,
  COST_QUESTION_DELAYS_ms,
  COST_QUESTION_ms,
  COST_QUESTION_WAIT_ms,
} from '../../../workers/limits.ts';
import { askedOf, homeOf, mood, testBackends } from '../support/backends.ts';
import {
  admin,
  CHAT,
  call,
  chat,
  errorCode,
  freshIsolate,
  hurry,
  recorded,
  say,
  soon,
} from '../support/edge.ts';
import { budgetOf, limitedTenant } from '../support/limits.ts';

const SECOND_ms = 1_000;
const sumOf = (delays_ms: readonly number[]) => delays_ms.reduce((sum, one) => sum + one, 0);
const { register, removeAll } = testBackends('cost');
afterEach(async () => {
  vi.useRealTimers();
  await removeAll();
});

async function tokensUsed(tenant: string): Promise<number> {
  const response = await admin('GET', `/usage?tenant=${tenant}&group=tenant`);
  const { data } = await response.json<{ data: UsageRow[] }>();
  return data.reduce((sum, row) => sum + row.prompt_tokens + row.completion_tokens, 0);
}

describe('what is charged', () => {
  /** The test backend counts a token a word of the prompt, and three of a whole answer. */
  const BODY = { ...say('a b'), max_tokens: 10 };
  const WHOLE = 2 + 3;
  const QUIET = { BACKEND_SILENCE_MS: '100' };
  /** In the budget and in usage, which is what a bill is written by. */
  const charged = (tenant: string, tokens: number, within_ms = 8 * SECOND_ms) =>
    vi.waitFor(
      async () => {
        expect((await budgetOf(tenant))['tokens/day']).toBe(tokens);
        expect(await tokensUsed(tenant)).toBe(tokens);
      },
      { timeout: within_ms, interval: 50 },
    );
  /**
   * The bad one of two backends comes first. Behind the good one it would be asked where a busy machine makes that late, too,
   * and as the last one it has all the time that a request may take.
   */
  const charges = async (tokens: number, how: string, ask: (key: string) => Promise<void>) => {
    const { tenant, key } = await limitedTenant({ tokens_per_day: 1000 });
    await register();
    await register();
    await mood((await homeOf(key, BODY))!, how);
    await ask(key);
    await charged(tenant, tokens);
  };

  it.each(['half-dead', 'spent-stopping', 'sick-late'])(
    'is the answer that came, after one that had computed and then was %s',
    async (how) => {
      await charges(WHOLE, how, async (key) => {
        const response = await chat(key, BODY, freshIsolate());
        expect(response.status).toBe(200);
        expect(await askedOf(response)).toHaveLength(2);
      });
    },
  );

  it('is the stream that came, after one that was given up in silence', () =>
    charges(WHOLE, 'busy', async (key) => {
      const response = await chat(key, { ...BODY, stream: true }, freshIsolate(QUIET));
      expect(await response.text()).toContain('data: [DONE]');
    }));

  it('is what the one that answered had made, when its answer broke off', () =>
    charges(2 + 2, 'busy', async (key) => {
      const body = { ...BODY, stream: true, user: 'die-mid-stream' };
      const response = await chat(key, body, freshIsolate(QUIET));
      expect(await response.text()).toContain('backend_error');
    }));

  // The prompt weighs what was reserved for it: its bytes, and the template.
  it('is what was seen of an answer whose backend is gone, and not what another one had made', () =>
    charges(3 + 40 + 2, 'busy', async (key) => {
      const body = { ...BODY, stream: true, user: 'vanish-mid-stream' };
      await (await chat(key, body, freshIsolate(QUIET))).text();
    }));

  it('is what the hedge that won had made, when its answer broke off', () =>
    charges(WHOLE, 'busy', async (key) => {
      const isolate = freshIsolate({ BACKEND_HEDGE_MS: '50' });
      expect(await errorCode(chat(key, { ...BODY, user: 'half-whole' }, isolate))).toBe('502 backend_error');
    }));

  /** A client leaves before it saw anything, and this happens to its backend just before. @returns what was reserved. */
  const leavesAfter = async (change: (backend: string) => Promise<unknown>) => {
    const { tenant, key } = await limitedTenant({ tokens_per_day: 1000 });
    const backend = await register();
    const leave = new AbortController();
    const headers = { [HEADERS.requestId]: `left-by-${backend}` };
    const asked = { key, body: { ...CHAT, ...BODY, user: 'busy' }, signal: leave.signal, headers };
    const left = call('POST', '/v1/chat/completions', asked);
    await soon(async () => expect(await recorded(headers[HEADERS.requestId])).not.toBeNull());
    await change(backend);
    leave.abort();
    expect((await left).status).toBe(499);
    // Its bytes, the template and the answer.
    return { tenant, reserved: 3 + 40 + 10 };
  };
  const leavesOneThatIs = (how: string) => leavesAfter((backend) => mood(backend, how));

  /** As long as the platform lets anybody ask. */
  const allQuestions = async () => {
    hurry();
    await new Promise((resolve) =>
      setTimeout(resolve, sumOf(COST_QUESTION_DELAYS_ms) + 5 * COST_QUESTION_ms + SECOND_ms),
    );
    vi.useRealTimers();
  };

  // With 503 and 504 proxies also say that a backend is busy, or slow.
  it.each(['mute', 'gateway-503', 'gateway-504'])(
    'is all that was reserved, when the client left before it saw anything and the backend is silent: %s',
    async (how) => {
      const { tenant, reserved } = await leavesOneThatIs(how);
      await allQuestions();
      await charged(tenant, reserved);
    },
  );

  it('is settled before the platform ends the request, however late every answer comes', () => {
    const questions = COST_QUESTION_DELAYS_ms.length * (COST_QUESTION_WAIT_ms + COST_QUESTION_ms);
    const settling = BUDGET.tries * BUDGET.wait_ms;
    expect(sumOf(COST_QUESTION_DELAYS_ms) + questions + settling).toBeLessThan(30 * SECOND_ms);
  });

  it.each([
    ['it refuses connections', 'down', false],
    ['it refuses connections, and another one was not asked', 'down', true],
    ['a proxy says so', 'gateway-502', false],
  ])('is nothing when the backend has ended, and soon: %s', async (_, how, hasOther) => {
    if (hasOther) await register({ regions: ['NA'] });
    const { tenant } = await leavesOneThatIs(how);
    await charged(tenant, 0, 6 * SECOND_ms);
  });

  /** A client leaves when two backends work on its request. Then one ends, and the other one knows nothing of it. */
  const leavesTwo = async () => {
    const { tenant, key } = await limitedTenant({ tokens_per_day: 1000 });
    const [one, other] = [await register(), await register()];
    for (const id of [one, other]) await mood(id, 'busy');
    const leave = new AbortController();
    const headers = { [HEADERS.requestId]: `left-by-${one}` };
    const body = { ...CHAT, ...BODY, stream: true, stop: ['t0t1t2t9'] };
    const asked = { key, body, signal: leave.signal, headers };
    const left = call('POST', '/v1/chat/completions', asked, freshIsolate(QUIET));
    await soon(async () => expect((await recorded(headers[HEADERS.requestId]))!.places).toHaveLength(2));
    await mood(one, 'down');
    await mood(other, 'restarted');
    leave.abort();
    expect((await left).status).toBe(499);
    return { tenant, other };
  };

  it('is nothing when one of two backends has ended and the other one knows nothing of it', async () => {
    const { tenant } = await leavesTwo();
    await allQuestions();
    await charged(tenant, 0);
  });

  it('is what the other one makes when one of two has ended, also where it begins late', async () => {
    const { tenant, other } = await leavesTwo();
    await new Promise((resolve) => setTimeout(resolve, 2 * SECOND_ms));
    await mood(other, 'good');
    await charged(tenant, WHOLE);
  });

  it.each(['down', 'restarted'])(
    'is the prompt as it was reserved, when the client left a stream without a token, and the backend is %s',
    async (how) => {
      const { tenant, key } = await limitedTenant({ tokens_per_day: 1000 });
      const backend = await register();
      const leave = new AbortController();
      const body = { ...CHAT, ...BODY, user: 'slow-tokens', stream: true };
      const response = await call('POST', '/v1/chat/completions', { key, body, signal: leave.signal });
      expect(response.status).toBe(200);
      await mood(backend, how);
      leave.abort();
      await charged(tenant, 3 + 40);
    },
  );

  it.each<[string, (backend: string) => Promise<unknown>]>([
    ['removed, as a drain removes it,', (backend) => admin('DELETE', `/backends/${backend}`)],
    ['disabled', (backend) => admin('PATCH', `/backends/${backend}`, { enabled: false })],
  ])('is what was made at a backend that was %s before the client left', async (_, change) => {
    await register({ regions: ['NA'] });
    const { tenant } = await leavesAfter(change);
    await charged(tenant, WHOLE);
  });

  it('is the prompt as it was reserved, when the backend broke off and is gone', async () => {
    const { tenant, key } = await limitedTenant({ tokens_per_day: 1000 });
    await register();
    await (await chat(key, { ...BODY, user: 'half-whole-vanishes' }, freshIsolate())).text();
    await charged(tenant, 3 + 40);
  });

  it('is one of them when all were silent', async () => {
    const { tenant, key } = await limitedTenant({ tokens_per_day: 1000 });
    for (const id of [await register(), await register()]) await mood(id, 'busy');
    const isolate = freshIsolate({ ...QUIET, BACKEND_TIMEOUT_MS: '300' });
    // What could become the stop text is held back: a stream has nothing to show, though tokens were made.
    const body = { ...BODY, stream: true, stop: ['t0t1t2t9'] };
    const response = await chat(key, body, isolate);
    expect(await askedOf(response)).toHaveLength(2);
    expect(await errorCode(response)).toBe('504 deadline_exceeded');
    await charged(tenant, WHOLE);
  });

  it('is the same while another tenant’s clients leave in a flood, and nobody says what theirs cost', async () => {
    const [flood, honest] = [
      await limitedTenant({ tokens_per_day: 100_000 }),
      await limitedTenant({ tokens_per_day: 1000 }),
    ];
    const mute = await register({ regions: ['EU'] });
    await register({ regions: ['NA'] });
    const isolate = freshIsolate();
    /** A client that reads the beginning of a stream. The result hangs up. */
    const begin = async (key: string, continent: string) => {
      const leave = new AbortController();
      const response = await chat(key, { ...BODY, stream: true, user: 'stall-mid-stream' }, (request) =>
        isolate(new Request(request, { signal: leave.signal, cf: { continent } } as RequestInit)),
      );
      await response.body!.getReader().read();
      return () => leave.abort();
    };
    const many = await Promise.all(Array.from({ length: 12 }, () => begin(flood.key, 'EU')));
    const one = await begin(honest.key, 'NA');
    await mood(mute, 'mute');
    for (const leave of many) leave();
    // The flood's first questions are under way by then.
    await new Promise((resolve) => setTimeout(resolve, 200));
    one();
    // The first three questions come before that. Without room of their own they would find none: the flood's first
    // four are without an answer for 2 s, and come again.
    await charged(honest.tenant, 2 + 2, 4 * SECOND_ms);
  }, 30_000);
});
