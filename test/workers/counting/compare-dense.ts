/** Requests that run again dense in the background: which ones, how, and that nobody notices. */
import { env } from 'cloudflare:workers';
import { describe, expect, it, vi } from 'vitest';
import type { EdgeEvent, EdgeMessage } from '../../../shared/admin/requests-wire.ts';
import type { Purpose } from '../../../workers/backends/call-backend.ts';
import { agreementOf, createDenseComparison } from '../../../workers/counting/compare-dense.ts';
import { COMPARISON } from '../../../workers/limits.ts';
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

  it('is made of few requests, and of none that routing did not mask', async () => {
    const key = await tenantWithSet();
    const { fetch, events } = listening(0.2);
    const texts = Array.from({ length: 100 }, () => chat(key, { mask: 'dense' }, fetch));
    for (const response of await Promise.all(texts)) await response.text();
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

it('a comparison that the platform ended with its request is not waited for', async () => {
  const call = vi.fn(() => new Promise<never>(() => {}));
  const events = { send: async () => {} };
  const comparison = createDenseComparison({ backend: { call }, events, share: 1 });
  const decision = { set: null, cluster: 0, fallback: null, maskId: `m_${'0'.repeat(24)}` };
  const compare = () =>
    void comparison.maybeCompare({
      event: '0'.repeat(20),
      tenant: 'a',
      routable: { kind: 'chat', body: CHAT },
      routed: { decision, assignment: { arm: null } },
      hold: () => {},
    } as never);
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
  await createDenseComparison({ backend: { call }, events: { send }, share: 1 }).maybeCompare({
    event: '0'.repeat(20),
    tenant: 'a',
    routable: { kind: 'chat', body: CHAT },
    routed: { decision, assignment: { arm: null } },
    hold: () => {},
  } as never);
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
