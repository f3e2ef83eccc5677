/** Requests that run again dense in the background: which ones, how, and that nobody notices. */
import { env } from 'cloudflare:workers';
import { describe, expect, it, vi } from 'vitest';
import type { EdgeEvent, EdgeMessage } from '../../../shared/admin/requests-wire.ts';
import { TRIAL_HEADERS } from '../../../shared/wire/protocol.ts';
import type { Call, Called, Purpose } from '../../../workers/backends/call-backend.ts';
import { agreementOf, createDenseComparison } from '../../../workers/counting/compare-dense.ts';
import { BUDGET, COMPARISON, EVENT_BATCH, EVENT_RETRY_DELAYS_ms } from '../../../workers/limits.ts';
import type { Recorded } from '../../support/edge/constants.ts';
import { CHAT, call, chat, freshIsolate, goLive, later, newTenant, recorded, soon } from '../support/edge.ts';

/** An isolate whose events are also seen here. */
function listening(share: number) {
  const events: EdgeEvent[] = [];
  const EVENTS = {
    sendBatch: async (messages: Iterable<{ body: EdgeMessage }>) => {
      for (const { body } of messages) events.push(...[body].flat());
    },
  };
  const fetch = freshIsolate({ EVENTS: EVENTS as never, COMPARISON_SHARE: share });
  const until = (kind: EdgeEvent['kind']) =>
    vi.waitFor(() => {
      const found = events.find((event) => event.kind === kind);
      expect(found).toBeDefined();
      return found!;
    }, 20_000);
  return { fetch, events, until };
}

async function tenantWithSet() {
  const { tenant, key } = await newTenant();
  await goLive('compared', tenant);
  return key;
}

describe('a comparison with the dense model', () => {
  it('runs the request again, masked and dense, greedily and short, and says what they have in common', async () => {
    const key = await tenantWithSet();
    const { fetch, until } = listening(0.2);
    // The lot is drawn by the request's random id.
    for (let i = 0; i < 60; i++) {
      const response = await chat(key, { temperature: 2, stop: 'x', n: 1, user: 'me' }, fetch);
      await response.text();
    }
    const comparison = await until('comparison');
    expect(comparison).toMatchObject({ agreement: 0.5 });
    const { request } = comparison as { request: string };
    for (const [which, mask] of [
      ['masked', expect.stringMatching(/^m_/)],
      ['dense', 'dense'],
    ] as const) {
      const { body } = (await recorded(`compare_${request}_${which}`)) as Recorded;
      expect(body).toEqual({
        model: 'test-model',
        mask,
        temperature: 0,
        max_tokens: 16,
        logprobs: true,
        messages: [{ role: 'user', content: 'north is cold' }],
      });
    }
  });

  it('has ended before the platform ends the request, however late everything comes', () => {
    const sending = EVENT_BATCH.lost_ms + EVENT_RETRY_DELAYS_ms.reduce<number>((sum, one) => sum + one, 0);
    const settling = Math.max(BUDGET.tries * BUDGET.wait_ms, sending);
    expect(settling + 2 * COMPARISON.timeout_ms + sending).toBeLessThan(30_000);
  });

  it('is made of few requests, and of none that is a trial or that routing did not mask', async () => {
    const key = await tenantWithSet();
    const { fetch, events } = listening(0.2);
    const trial = { key, body: CHAT, headers: { [TRIAL_HEADERS.source]: 'playground' } };
    const asked = Array.from({ length: 50 }, () => [
      chat(key, { mask: 'dense' }, fetch),
      call('POST', '/v1/chat/completions', trial, fetch),
    ]);
    for (const response of await Promise.all(asked.flat())) await response.text();
    await soon(() => expect(events.filter(({ kind }) => kind === 'request')).toHaveLength(100));
    expect(events.filter(({ kind }) => kind === 'comparison')).toEqual([]);
    const never = listening(0);
    for (let i = 0; i < 20; i++) await (await chat(key, {}, never.fetch)).text();
    await never.until('request');
    expect(never.events.filter(({ kind }) => kind === 'comparison')).toEqual([]);
  });

  it('that fails is nobody’s trouble', async () => {
    const key = await tenantWithSet();
    const { fetch, events } = listening(0.2);
    // This backend answers the second question, about logprobs, with something else.
    for (let i = 0; i < 30; i++) {
      const response = await chat(key, { user: 'masks-unknown', mask: null }, fetch);
      expect(response.status).toBe(200);
      await response.text();
    }
    await soon(() => expect(events.filter(({ kind }) => kind === 'request')).toHaveLength(30));
  });
});

describe('what a comparison says', () => {
  type Said = { decode_ms?: number; backend?: string; weights?: string; tokens?: string[] };
  const EVEN = '0'.repeat(20);
  const ROUTABLE = { kind: 'chat', body: CHAT } as const;

  /** What becomes of two answers, and the requests for them. */
  async function compared(masked: Said, dense: Said, event = EVEN, routable: object = ROUTABLE) {
    const asked: { path: string; body: Record<string, unknown> }[] = [];
    const sent: EdgeEvent[] = [];
    const call = async ({ request: { path, body = '' } }: Call): Promise<Called> => {
      asked.push({ path, body: JSON.parse(body) });
      const {
        decode_ms,
        backend = 'one',
        weights = 'w',
        tokens = ['a', 'b', 'c'],
      } = asked.at(-1)!.body.mask === 'dense' ? dense : masked;
      const logprobs =
        path === '/v1/completions' ? { tokens } : { content: tokens.map((token) => ({ token })) };
      const maskroute = decode_ms === undefined ? {} : { maskroute: { decode_ms } };
      const response = Response.json({ choices: [{ logprobs }], system_fingerprint: weights, ...maskroute });
      return { kind: 'answer', response, backend, affinity: undefined, rest: undefined, gaveUp: false };
    };
    const events = { send: async (one: EdgeEvent) => void sent.push(one) };
    const decision = { set: null, cluster: 0, fallback: null, maskId: 'm_1', mask: 'm_1' };
    const routed = { decision, assignment: { arm: null, region: 'local' } };
    await createDenseComparison({ backend: { call }, events, share: 1 }).maybeCompare({
      ...{ event, tenant: 'a', routable, routed, hold: () => {} },
    } as never);
    return { sent, asked };
  }

  it('is the share of a token’s time that the mask saves', async () => {
    // Of three tokens two come after the first.
    const { sent } = await compared({ decode_ms: 6 }, { decode_ms: 8 });
    expect(sent).toMatchObject([{ kind: 'comparison', request: EVEN, agreement: 1, saved: 0.25 }]);
    const longer = await compared({ decode_ms: 6 }, { decode_ms: 8, tokens: ['a', 'b', 'x', 'y', 'z'] });
    expect(longer.sent).toMatchObject([{ agreement: 2 / 5, saved: 1 - 3 / 2 }]);
  });

  it.each<[string, Said, Said]>([
    ['of two backends', { decode_ms: 6, backend: 'two' }, { decode_ms: 8 }],
    ['without a time of the masked answer', {}, { decode_ms: 8 }],
    ['without a time of the dense answer', { decode_ms: 6 }, {}],
    ['where the dense one took none', { decode_ms: 6 }, { decode_ms: 0 }],
    ['of one token', { decode_ms: 6, tokens: ['a'] }, { decode_ms: 8 }],
  ])('is nothing of times %s', async (_, masked, dense) => {
    expect((await compared(masked, dense)).sent).toMatchObject([{ kind: 'comparison', saved: null }]);
  });

  it('is nothing at all of answers of different weights', async () => {
    expect((await compared({ weights: 'v' }, { weights: 'w' })).sent).toEqual([]);
  });

  it('does not depend on which of the two goes first, and half of them begin with the dense one', async () => {
    const said = [{ decode_ms: 6 }, { decode_ms: 8 }] as const;
    for (const [event, masks] of [
      [`${EVEN.slice(1)}2`, ['m_1', 'dense']],
      [`${EVEN.slice(1)}3`, ['dense', 'm_1']],
    ] as const) {
      const { sent, asked } = await compared(...said, event);
      expect(asked.map(({ body }) => body.mask)).toEqual(masks);
      expect(sent).toMatchObject([{ saved: 0.25 }]);
    }
  });

  it('is of a prompt, too, and not of one of token ids', async () => {
    const prompt = (of: string | number[]) => ({
      kind: 'completion',
      body: { model: CHAT.model, prompt: of },
    });
    const { sent, asked } = await compared({}, {}, EVEN, prompt('north'));
    expect(sent).toMatchObject([{ agreement: 1 }]);
    const body = { model: CHAT.model, temperature: 0, max_tokens: 16, prompt: 'north', logprobs: 1 };
    expect(asked[0]).toEqual({ path: '/v1/completions', body: { ...body, mask: 'm_1' } });
    expect((await compared({}, {}, EVEN, prompt([1, 2]))).asked).toEqual([]);
  });
});

/** An answered request, as far as a comparison reads it. */
const answered = (decision: object) =>
  ({
    event: '0'.repeat(20),
    tenant: 'a',
    routable: { kind: 'chat', body: CHAT },
    routed: { decision, assignment: { arm: null } },
    hold: () => {},
  }) as never;

it('a comparison that the platform ended with its request is not waited for', async () => {
  const call = vi.fn(() => new Promise<never>(() => {}));
  const events = { send: async () => {} };
  const comparison = createDenseComparison({ backend: { call }, events, share: 1 });
  const decision = { set: null, cluster: 0, fallback: null, maskId: `m_${'0'.repeat(24)}` };
  const compare = () => void comparison.maybeCompare(answered(decision));
  compare();
  compare();
  expect(call).toHaveBeenCalledTimes(1);
  later(2 * COMPARISON.timeout_ms + 1);
  compare();
  vi.useRealTimers();
  expect(call).toHaveBeenCalledTimes(2);
});

it('two answers of different weights are not compared', async () => {
  const answers = ['fp_aaaaaaaaaaaa_dense', `fp_bbbbbbbbbbbb_m_${'0'.repeat(24)}`];
  const wanted: Purpose[] = [];
  const call = async ({ purpose }: { readonly purpose: Purpose }) => {
    wanted.push(purpose);
    const choices = [{ logprobs: { content: [{ token: 'x' }] } }];
    const response = Response.json({ choices, system_fingerprint: answers.shift() });
    return {
      kind: 'answer' as const,
      response,
      backend: 'a',
      affinity: undefined,
      rest: undefined,
      gaveUp: false,
    };
  };
  const send = vi.fn(async () => {});
  const decision = {
    cluster: 0,
    fallback: null,
    needs: { modelHash: 'a'.repeat(64), surrogates: undefined },
    maskId: `m_${'0'.repeat(24)}`,
    mask: `m_${'0'.repeat(24)}`,
  };
  const comparison = createDenseComparison({ backend: { call }, events: { send }, share: 1 });
  await comparison.maybeCompare(answered(decision));
  expect(answers).toEqual([]);
  // Both were sent to the same backend, as far as it can be chosen.
  expect(wanted[0]).toMatchObject({ mask: decision.maskId, needs: { modelHash: 'a'.repeat(64) } });
  expect(wanted[1]).toEqual(wanted[0]);
  expect(send).not.toHaveBeenCalled();
});

it('agreement is what comes before the first difference, as a share of the longer answer', () => {
  expect(agreementOf(['a', 'b', 'c'], ['a', 'b', 'c'])).toBe(1);
  expect(agreementOf(['a', 'x', 'c'], ['a', 'b', 'c'])).toBeCloseTo(1 / 3);
  expect(agreementOf(['a'], ['a', 'b'])).toBe(0.5);
  expect(agreementOf(['a', 'b'], ['a'])).toBe(0.5);
  expect(agreementOf([], [])).toBe(1);
  expect(agreementOf([], ['a'])).toBe(0);
});

it('a whole answer goes through the queue into the counts, and so does its rating', async () => {
  const { tenant, key } = await newTenant();
  await goLive('counted', tenant);
  const response = await chat(key);
  const { id } = await response.json<{ id: string }>();
  expect((await call('POST', '/v1/feedback', { key, body: { id, rating: 1 } })).status).toBe(201);
  await vi.waitFor(
    async () => {
      const rows = await env.DB.prepare(
        'select total(requests) as requests, total(ratings_up) as up from outcomes where tenant = ?',
      )
        .bind(tenant)
        .all();
      expect(rows.results).toEqual([{ requests: 1, up: 1 }]);
    },
    { timeout: 12_000, interval: 200 },
  );
});
