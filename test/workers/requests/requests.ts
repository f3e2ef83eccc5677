/** Requests one by one, as administrators see them: their decision, what was thought of them, and kept of them. */

import { env } from 'cloudflare:workers';
import { afterEach, describe, expect, it, vi } from 'vitest';
import type { Rated, RequestDetail, SeenRequest } from '../../../shared/admin/requests-wire.ts';
import { TRIAL_HEADERS } from '../../../shared/wire/protocol.ts';
import edge from '../../../workers/index.ts';
import { EVENTS, FEEDBACK_KEPT_ms } from '../../../workers/limits.ts';
import {
  admin,
  badD1,
  CHAT,
  call,
  chat,
  created,
  errorCode,
  freshIsolate,
  goLive,
  hurry,
  makeMaskSet,
  newKey,
  newTenant,
  say,
  soon,
  upload,
} from '../support/edge.ts';

afterEach(() => void vi.useRealTimers());

async function listed(query: string, key?: string): Promise<SeenRequest[]> {
  const response = await admin('GET', `/requests?${query}`, undefined, key);
  return (await response.json<{ data: SeenRequest[] }>()).data;
}
const detail = async (id: string, key?: string) =>
  await (await admin('GET', `/requests/${id}`, undefined, key)).json<RequestDetail>();

/** Asks, and waits until the request is counted. */
async function counted(
  key: string,
  body: object = {},
  headers: Record<string, string> = {},
): Promise<SeenRequest> {
  const id = `asked-${crypto.randomUUID()}`;
  const options = { key, body: { ...CHAT, ...body }, headers: { 'x-request-id': id, ...headers } };
  const response = await call('POST', '/v1/chat/completions', options);
  const text = await response.text();
  expect(response.status, text).toBe(200);
  return await soon(async () => {
    const [found] = await listed(`q=${id}`);
    expect(found).toBeDefined();
    return found!;
  });
}

describe('a request', () => {
  it('is found by its x-request-id and by its completion, with its decision, by its own tenant alone', async () => {
    const { version } = await goLive('seen');
    const { tenant, key, keyId } = await newTenant();
    const seen = await counted(key);
    expect(seen).toMatchObject({
      tenant,
      key_id: keyId,
      version,
      cluster: 0,
      status: 200,
      error_code: null,
      source: 'client',
      fallback: null,
      endpoint: 'chat',
      rating: null,
      experiment: 'none',
    });
    expect(seen.total_ms).toBeGreaterThanOrEqual(0);
    expect(seen.similarity).toBeGreaterThan(0.9);
    for (const prefix of ['chatcmpl-', 'cmpl-', 'resp_', ''])
      expect(await listed(`q=${prefix}${seen.id}.0123456789abcdef`), prefix).toEqual([seen]);
    const { key: own } = await newKey({ tenant, kind: 'tenant_admin' });
    expect((await detail(seen.id, own)).id).toBe(seen.id);
    const { tenant: other } = await newTenant();
    const { key: others } = await newKey({ tenant: other, kind: 'tenant_admin' });
    expect(await errorCode(admin('GET', `/requests/${seen.id}`, undefined, others))).toBe('404 not_found');
    expect(await listed(`q=${seen.request_id}`, others)).toEqual([]);
  });

  it('is listed newest first or longest first, page by page', async () => {
    const { tenant, key } = await newTenant();
    const asked: SeenRequest[] = [];
    for (const content of ['north', 'north is cold and far', 'north is very cold and farther than that']) {
      asked.push(await counted(key, say(content)));
    }
    const all = await listed(`tenant=${tenant}`);
    expect(all.map(({ id }) => id)).toEqual(asked.map(({ id }) => id).reverse());
    for (const sort of ['created_at', 'total_ms', 'tokens']) {
      const whole = await listed(`tenant=${tenant}&sort=${sort}`);
      const paged: SeenRequest[] = [];
      let before = '';
      do {
        const path = `/requests?tenant=${tenant}&sort=${sort}&limit=1${before}`;
        const page = await (await admin('GET', path)).json<{ data: SeenRequest[]; next: string | null }>();
        paged.push(...page.data);
        before = page.next === null ? '' : `&before=${page.next}`;
      } while (before !== '');
      expect(paged, sort).toEqual(whole);
    }
  });

  it('shows its ratings with their comments, until their time is over', async () => {
    const { tenant, key } = await newTenant();
    const answer = await (await chat(key)).json<{ id: string }>();
    const rating = { id: answer.id, rating: -1, comment: 'Not what I asked.' };
    await created(call('POST', '/v1/feedback', { key, body: rating }));
    const [seen] = await soon(async () => {
      const found = await listed(`tenant=${tenant}&outcome=rated`);
      expect(found).toHaveLength(1);
      return found;
    });
    expect(seen!.rating).toBe(-1);
    expect((await detail(seen!.id)).ratings).toMatchObject([{ rating: -1, comment: 'Not what I asked.' }]);
    const ratings = async () =>
      (await (await admin('GET', `/ratings?tenant=${tenant}&commented=true`)).json<{ data: Rated[] }>()).data;
    expect(await ratings()).toMatchObject([{ request: seen!.id, comment: 'Not what I asked.' }]);
    const { id } = await (await chat(key)).json<{ id: string }>();
    await created(call('POST', '/v1/feedback', { key, body: { id, rating: 1 } }));
    const page = async (before = '') =>
      await (await admin('GET', `/ratings?tenant=${tenant}&limit=1${before}`)).json<{
        data: Rated[];
        next: string | null;
      }>();
    const newest = await page();
    expect(newest.data).toMatchObject([{ rating: 1, comment: null }]);
    const last = await page(`&before=${newest.next}`);
    expect(last).toMatchObject({ data: [{ request: seen!.id }], next: null });

    const forgetAt = async (after_ms: number) => {
      vi.useFakeTimers({ toFake: ['Date'], now: Date.now() + after_ms });
      await edge.scheduled({} as never, env as never);
      vi.useRealTimers();
    };
    await forgetAt(EVENTS.kept_ms - 60_000);
    expect(await listed(`tenant=${tenant}&outcome=rated`)).not.toEqual([]);
    await forgetAt(EVENTS.kept_ms + 60_000);
    expect(await listed(`tenant=${tenant}`)).toEqual([]);
    expect(await ratings()).toHaveLength(1);
    await forgetAt(FEEDBACK_KEPT_ms + 60_000);
    expect(await ratings()).toEqual([]);
  });
});

describe('prompts and answers', () => {
  it('are kept by no tenant that did not ask for it', async () => {
    const { key } = await newTenant();
    expect((await detail((await counted(key)).id)).texts).toBeNull();
  });

  it('are kept where the tenant says so, for as many days, streamed or whole', async () => {
    const { tenant, key } = await newTenant();
    const { key: own } = await newKey({ tenant, kind: 'tenant_admin' });
    expect((await admin('PATCH', `/tenants/${tenant}`, { texts_kept_days: 2 }, own)).status).toBe(200);
    // A change of terms holds within 5 s.
    vi.useFakeTimers({ toFake: ['Date'], now: Date.now() + 5_001 });
    const whole = await counted(key, say('north and secret'));
    await soon(async () => expect((await detail(whole.id)).texts).not.toBeNull());
    const texts = (await detail(whole.id)).texts!;
    expect(texts.prompt).toBe('user: north and secret');
    expect(texts.answer.length).toBeGreaterThan(0);
    expect(texts.answer).not.toContain('{');
    const days = (Date.parse(texts.expires_at) - Date.now()) / 86_400_000;
    expect(days).toBeGreaterThan(1.9);
    expect(days).toBeLessThan(2.1);
    const streamed = await counted(key, { ...say('north'), stream: true });
    await soon(async () => expect((await detail(streamed.id)).texts?.answer).toBe(texts.answer));
    const ofSeveral = await counted(key, { ...say('north'), n: 3, stream: true });
    await soon(async () => expect((await detail(ofSeveral.id)).texts?.answer).toBe(texts.answer));
  });
});

describe('prompts and answers, while D1 fails', () => {
  it.each(['failing', 'stalled'] as const)(
    'are kept when it is back: %s',
    async (mood) => {
      const { tenant, key } = await newTenant();
      expect((await admin('PATCH', `/tenants/${tenant}`, { texts_kept_days: 2 })).status).toBe(200);
      const d1 = badD1();
      const isolate = freshIsolate({ DB: d1.DB });
      await (await chat(key, {}, isolate)).text();
      d1.be(mood);
      const answer = await (await chat(key, say('north'), isolate)).json<{ id: string }>();
      setTimeout(() => d1.be('good'), 500);
      const request = /[0-9a-f]{20}/.exec(answer.id)![0];
      await vi.waitFor(async () => expect((await detail(request)).texts?.prompt).toBe('user: north'), 20_000);
    },
    30_000,
  );
});

describe('a trial', () => {
  it('is marked, takes part in no experiment, and is routed by any set that is named', async () => {
    const { version: live } = await goLive('live');
    const { tenant, key } = await newTenant();
    const { version: stored } = await upload(makeMaskSet('only-stored'), tenant);
    const variants = [
      { name: 'a', weight: 1, mask_set: 'dense' },
      { name: 'b', weight: 1, mask_set: live },
    ];
    await created(admin('POST', '/experiments', { id: 'trial', tenant, variants, shadow_share: 0 }));
    expect((await admin('POST', `/experiments/trial/start?tenant=${tenant}`)).status).toBe(200);
    await soon(async () => expect((await counted(key)).experiment).toBe('trial'));
    const marked = { [TRIAL_HEADERS.source]: 'playground' };
    const trial = await counted(key, {}, marked);
    expect(trial).toMatchObject({ source: 'playground', experiment: 'none', version: live, cluster: 0 });
    const other = await counted(key, {}, { ...marked, [TRIAL_HEADERS.version]: stored });
    expect(other).toMatchObject({ source: 'playground', version: stored, cluster: 0 });
    const { key: stranger } = await newTenant();
    const headers = { ...marked, [TRIAL_HEADERS.version]: stored };
    const refused = call('POST', '/v1/chat/completions', { key: stranger, body: CHAT, headers });
    expect(await errorCode(refused)).toBe('404 not_found');
    await admin('POST', `/experiments/trial/stop?tenant=${tenant}`);
  });

  it.each(['failing', 'stalled'] as const)(
    'of a set that D1 does not tell (%s) is told that',
    async (mood) => {
      const { tenant, key } = await newTenant();
      const { version } = await upload(makeMaskSet(`untold-${mood}`), tenant);
      const d1 = badD1();
      const isolate = freshIsolate({ DB: d1.DB });
      await (await chat(key, {}, isolate)).text();
      d1.be(mood);
      hurry();
      const headers = { [TRIAL_HEADERS.source]: 'playground', [TRIAL_HEADERS.version]: version };
      const refused = call('POST', '/v1/chat/completions', { key, body: CHAT, headers }, isolate);
      expect(await errorCode(refused)).toBe('503 configuration_unavailable');
    },
  );
});
