/**
 * Several backends behind the edge: the registry, who is asked and who comes next, and what clients see when
 * backends are gone, full, silent or break off. One server stands for all of them, each at an address of its own.
 */
import { env } from 'cloudflare:workers';
import { afterEach, describe, expect, it, vi } from 'vitest';
import { BACKEND_HEADERS, type BackendEntry } from '../../../shared/wire/backend-load.ts';
import { EVENT_STREAM_HEADERS, HEADERS } from '../../../shared/wire/protocol.ts';
import { createVerifier } from '../../../shared/wire/service-token.ts';
import { BackendPool } from '../../../workers/backends/pool.ts';
import { LOAD_PROBE, MODELS } from '../../../workers/limits.ts';
import { ADMIN_KEY, BACKEND_KEY, EDGE_URL, LONG_WHOLE_EVENT, MODEL } from '../../support/edge/constants.ts';
import { askedOf, backendOf, homeOf, idOf, mood, testBackends } from '../support/backends.ts';
import {
  admin,
  badD1,
  CHAT,
  call,
  chat,
  errorCode,
  freshIsolate,
  goLive,
  hurry,
  later,
  makeMaskSet,
  newKey,
  newTenant,
  recorded,
  say,
  soon,
  upload,
} from '../support/edge.ts';

const SECOND_ms = 1_000;
const { register, removeAll } = testBackends('backend');

afterEach(async () => {
  vi.useRealTimers();
  await removeAll();
});

describe('the registry', () => {
  it('is the one backend of BACKEND_URL while it is empty', async () => {
    const { data } = await (await admin('GET', '/backends')).json<{ data: BackendEntry[] }>();
    expect(data).toMatchObject([{ id: 'default', url: env.BACKEND_URL, regions: ['*'], created_at: null }]);
    expect(await (await admin('GET', '/backends/default')).json()).toEqual(data[0]);
  });

  it('makes, changes, shows and removes entries', async () => {
    const id = await register({ regions: ['EU', 'DE'], weight: 2 });
    const shown = await (await admin('GET', `/backends/${id}`)).json();
    expect(shown).toMatchObject({ id, regions: ['EU', 'DE'], weight: 2, enabled: true });
    expect(shown).toMatchObject({ state: { breaker: 'closed', in_flight: 0, running: null } });
    const changed = await admin('PATCH', `/backends/${id}`, { enabled: false });
    expect(await changed.json()).toMatchObject({ enabled: false, weight: 2 });
    expect(await errorCode(admin('POST', '/backends', { id, url: 'http://x.test' }))).toBe('409 conflict');
    expect((await admin('DELETE', `/backends/${id}`)).status).toBe(200);
    expect(await errorCode(admin('DELETE', `/backends/${id}`))).toBe('404 not_found');
    expect(await errorCode(admin('GET', `/backends/${id}`))).toBe('404 not_found');
    expect(await errorCode(admin('PATCH', `/backends/${id}`, { weight: 1 }))).toBe('404 not_found');
  });

  it.each([
    [{ id: 'Bad Id', url: 'http://x.test' }],
    [{ id: 'x', url: '.' }],
    [{ id: 'x', url: 'ftp://x.test' }],
    [{ id: 'x', url: 'http://user:secret@x.test' }],
    [{ id: 'x', url: 'http://x.test/?a=1' }],
    [{ id: 'x', url: 'http://x.test', regions: [] }],
    [{ id: 'x', url: 'http://x.test', regions: ['europe'] }],
    [{ id: 'x', url: 'http://x.test', weight: 0 }],
    [{ id: 'x', url: 'http://x.test', secret: 1 }],
  ])('refuses %j', async (body) => {
    expect(await errorCode(admin('POST', '/backends', body))).toBe('400 invalid_request');
  });

  it('is not for administrators of one tenant', async () => {
    const { tenant } = await newTenant();
    const { key } = await newKey({ tenant, kind: 'tenant_admin' });
    expect(await errorCode(admin('GET', '/backends', undefined, key))).toBe('403 forbidden');
    expect(await errorCode(admin('DELETE', '/backends/x', undefined, key))).toBe('403 forbidden');
  });

  it('that was read once serves while D1 does not', async () => {
    const { tenant, key } = await newTenant();
    await goLive('compass', tenant);
    const id = await register();
    const d1 = badD1();
    const isolate = freshIsolate({ DB: d1.DB });
    expect(backendOf(await chat(key, {}, isolate))).toBe(id);
    for (const how of ['stalled', 'failing'] as const) {
      d1.be(how);
      later(10 * SECOND_ms);
      // The first request finds out that D1 does not answer, for all that is asked of it.
      expect(backendOf(await chat(key, {}, isolate))).toBe(id);
      const started_ms = performance.now();
      for (let i = 0; i < 10; i++) expect(backendOf(await chat(key, {}, isolate))).toBe(id);
      // Each would wait for a second.
      expect(performance.now() - started_ms).toBeLessThan(8 * SECOND_ms);
    }
  });

  it('was changed, though D1 does not answer right after', async () => {
    const refresh = vi.spyOn(BackendPool.prototype, 'refresh').mockRejectedValue(new Error('D1 is slow'));
    const id = await register();
    const changed = await admin('PATCH', `/backends/${id}`, { weight: 2 });
    expect([changed.status, await changed.json()]).toEqual([200, expect.objectContaining({ weight: 2 })]);
    expect((await admin('DELETE', `/backends/${id}`)).status).toBe(200);
    expect(refresh).toHaveBeenCalledTimes(3);
    refresh.mockRestore();
  });

  it('that loses a backend and gets it back knows nothing of what it did before', async () => {
    const { key } = await newTenant();
    const id = await register();
    const isolate = freshIsolate();
    const change = (method: string, path: string, body?: object) =>
      call(method, `/admin/v1/backends${path}`, { key: ADMIN_KEY, body }, isolate);
    const breaker = async () => (await (await change('GET', `/${id}`)).json<BackendEntry>()).state.breaker;
    await mood(id, 'html');
    for (let i = 0; i < 5; i++) await chat(key, {}, isolate);
    expect(await breaker()).toBe('open');
    expect((await change('DELETE', `/${id}`)).status).toBe(200);
    expect((await chat(key, {}, isolate)).status).toBe(200);
    await mood(id, 'good');
    const url = `${env.BACKEND_URL}/at/${id}`;
    expect((await change('POST', '', { id, url })).status).toBe(201);
    expect(await breaker()).toBe('closed');
    expect(backendOf(await chat(key, {}, isolate))).toBe(id);
  });

  it('takes 64 backends and no more, however many come at once', async () => {
    const added = await Promise.allSettled(Array.from({ length: 70 }, () => register({ enabled: false })));
    const refused = added.filter((one) => one.status === 'rejected');
    expect(refused).toHaveLength(6);
    expect(String(refused[0]!.reason)).toContain('There are 64 backends already.');
    const { data } = await (await admin('GET', '/backends')).json<{ data: BackendEntry[] }>();
    expect(data).toHaveLength(64);
  });

  it('without an enabled backend is 503', async () => {
    const { key } = await newTenant();
    await register({ enabled: false });
    expect(await errorCode(chat(key, {}, freshIsolate()))).toBe('503 backend_unreachable');
  });

  it('whose last backend is disabled lists no models any more, and a refused set’s message says so', async () => {
    const { tenant, key } = await newTenant();
    const id = await register();
    const isolate = freshIsolate();
    const models = async () => {
      const listed = await call('GET', '/v1/models', { key }, isolate);
      return (await listed.json<{ data: { id: string }[] }>()).data.map((entry) => entry.id);
    };
    expect(await models()).toEqual([MODEL.id, `${MODEL.id}:dense`]);
    await admin('PATCH', `/backends/${id}`, { enabled: false });
    hurry();
    await soon(async () => expect(await models()).toEqual([]));
    const { version } = await upload(makeMaskSet('early'), tenant);
    const refused = await admin('POST', '/publications', { tenant, version });
    const { error } = await refused.json<{ error: { code: string; message: string } }>();
    expect(error).toMatchObject({ code: 'mask_model_mismatch' });
    expect(error.message).toContain('which no enabled backend serves');
  });
});

describe('who is asked', () => {
  const from = (cf: object, key: string, isolate: ReturnType<typeof freshIsolate>) =>
    isolate(
      new Request(`${EDGE_URL}/v1/chat/completions`, {
        method: 'POST',
        headers: { 'content-type': 'application/json', authorization: `Bearer ${key}` },
        body: JSON.stringify(CHAT),
        cf,
      } as RequestInit),
    );

  it('is the region, and the next one when that is gone', async () => {
    const { key } = await newTenant();
    const europe = await register({ regions: ['EU'] });
    const america = await register({ regions: ['NA'] });
    const isolate = freshIsolate();
    expect(backendOf(await from({ continent: 'EU', country: 'DE', colo: 'FRA' }, key, isolate))).toBe(europe);
    expect(backendOf(await from({ continent: 'NA', country: 'US', colo: 'DFW' }, key, isolate))).toBe(
      america,
    );
    await mood(europe, 'down');
    const response = await from({ continent: 'EU', country: 'DE', colo: 'FRA' }, key, isolate);
    expect([response.status, backendOf(response)]).toEqual([200, america]);
  });

  const affinityOf = (response: Response) => response.headers.get(BACKEND_HEADERS.affinity);
  const WORDS = ['north', 'east', 'south', 'west', 'up', 'down'];
  /** Where conversations are, one request after the other: several at once are spread by load. */
  async function placesOf(key: string, isolate = freshIsolate(), turns = 1): Promise<(string | null)[]> {
    const places: (string | null)[] = [];
    for (const content of WORDS) {
      const { messages } = say(content);
      const turnsAfter = Array.from({ length: turns - 1 }, (_, i) => [
        { role: 'assistant', content: `answer ${i}` },
        { role: 'user', content: `and then ${i}?` },
      ]).flat();
      const response = await chat(key, { messages: [...messages, ...turnsAfter] }, isolate);
      await response.text();
      expect(affinityOf(response)).toBe('hit');
      places.push(backendOf(response));
    }
    return places;
  }

  it('is the same for all turns of a conversation, whatever isolate asks', async () => {
    const { tenant, key } = await newTenant();
    await goLive('compass', tenant);
    for (let i = 0; i < 3; i++) await register();
    const places = await placesOf(key);
    expect(new Set(places).size).toBeGreaterThan(1);
    const isolate = freshIsolate();
    for (let turns = 1; turns <= 3; turns++) expect(await placesOf(key, isolate, turns)).toEqual(places);
  });

  it('stays the same for most conversations when a backend comes or goes', async () => {
    const { key } = await newTenant();
    await register();
    await register();
    const before = await placesOf(key);
    const third = await register();
    const after = await placesOf(key);
    for (const [i, place] of after.entries()) if (place !== third) expect(place).toBe(before[i]);
    await admin('DELETE', `/backends/${third}`);
    expect(await placesOf(key)).toEqual(before);
  });

  it('is what a dry run says, and is not said where there is one', async () => {
    const { key } = await newTenant();
    const only = await register();
    const isolate = freshIsolate();
    expect(await homeOf(key, {}, isolate)).toBeNull();
    expect(affinityOf(await chat(key, {}, isolate))).toBeNull();
    await admin('DELETE', `/backends/${only}`);
    await register();
    await register();
    later(10 * SECOND_ms);
    await vi.waitFor(async () => expect(await homeOf(key, {}, isolate)).not.toBeNull(), 20_000);
    for (const word of WORDS) {
      const { messages } = say(word);
      expect(backendOf(await chat(key, { messages }, isolate))).toBe(
        await homeOf(key, { messages }, isolate),
      );
    }
  });

  it('is another one while the first has a line', async () => {
    const { key } = await newTenant();
    await register();
    await register();
    const isolate = freshIsolate();
    const first = backendOf(await chat(key, {}, isolate))!;
    await mood(first, 'loaded');
    // The answer that tells of the line is still from there.
    expect(backendOf(await chat(key, {}, isolate))).toBe(first);
    const other = await chat(key, {}, isolate);
    expect(backendOf(other)).not.toBe(first);
    expect(affinityOf(other)).toBe('overflow');
    await mood(first, 'queue-full');
    expect(affinityOf(await chat(key, {}, freshIsolate()))).toBe('overflow');
    await mood(first, 'down');
    expect(affinityOf(await chat(key, {}, freshIsolate()))).toBe('failover');
  });

  it('is several for a conversation that asks much at once', async () => {
    const { key } = await newTenant();
    const ids = [await register(), await register(), await register()];
    const isolate = freshIsolate();
    const home = backendOf(await chat(key, {}, isolate));
    const answers = await Promise.all(
      Array.from({ length: 9 }, () => chat(key, { user: 'slow-whole' }, isolate)),
    );
    const places = answers.map(backendOf);
    for (const id of ids) expect(places).toContain(id);
    for (const [i, place] of places.entries()) {
      expect(affinityOf(answers[i]!)).toBe(place === home ? 'hit' : 'overflow');
    }
  });
});

describe('a backend that drains', () => {
  const from =
    (cf: object) =>
    (key: string, isolate: ReturnType<typeof freshIsolate>, body: object = {}, headers = {}) =>
      call('POST', '/v1/chat/completions', { key, headers, body: { ...CHAT, ...body } }, (request) =>
        isolate(new Request(request, { cf } as RequestInit)),
      );
  const inEurope = from({ continent: 'EU', country: 'DE', colo: 'FRA' });
  const inAmerica = from({ continent: 'NA', country: 'US', colo: 'DFW' });
  const pair = async () => ({
    key: (await newTenant()).key,
    near: await register({ regions: ['EU'] }),
    far: await register({ regions: ['NA'] }),
  });

  it('is asked once, and then after all others', async () => {
    const { key, near, far } = await pair();
    const isolate = freshIsolate();
    await mood(near, 'stopping');
    expect(await askedOf(await inEurope(key, isolate))).toEqual([near, far]);
    for (let i = 0; i < 3; i++) expect(await askedOf(await inEurope(key, isolate))).toEqual([far]);
    await mood(far, 'sick');
    expect((await askedOf(await inEurope(key, isolate)))!.slice(0, 2)).toEqual([far, near]);
  });

  it('is passed over as soon as it reports that', async () => {
    const { key, near, far } = await pair();
    const isolate = freshIsolate();
    await mood(near, 'stopping');
    // Long enough for the loads that are asked for behind it.
    expect(backendOf(await inAmerica(key, isolate, { user: 'slow-whole' }))).toBe(far);
    expect(await askedOf(await inEurope(key, isolate))).toEqual([far]);
  });

  it('is the first one again when another process answers at its address', async () => {
    const { key, near, far } = await pair();
    const isolate = freshIsolate();
    await mood(near, 'stopping');
    await inEurope(key, isolate);
    await mood(near, 'good');
    await mood(far, 'sick');
    expect(await askedOf(await inEurope(key, isolate))).toEqual([far, near]);
    await mood(far, 'good');
    expect(await askedOf(await inEurope(key, isolate))).toEqual([near]);
  });

  it('is the first one again when it reports that it stays', async () => {
    const { key, near } = await pair();
    const isolate = freshIsolate();
    await mood(near, 'stopping');
    await inEurope(key, isolate);
    await mood(near, 'good');
    // By then its load is asked for again, and what it reported before still holds.
    later(3 * SECOND_ms);
    await vi.waitFor(async () => expect(backendOf(await inEurope(key, isolate))).toBe(near), 5 * SECOND_ms);
  });

  it('still drains when it finishes what it had begun', async () => {
    const { key, near, far } = await pair();
    const isolate = freshIsolate();
    const id = crypto.randomUUID();
    const begun = inEurope(key, isolate, { user: 'slow-whole' }, { [HEADERS.requestId]: id });
    await soon(async () => expect((await recorded(id))?.places).toEqual([near]));
    await mood(near, 'stopping');
    expect(backendOf(await inEurope(key, isolate))).toBe(far);
    expect(backendOf(await begun)).toBe(near);
    expect(await askedOf(await inEurope(key, isolate))).toEqual([far]);
  });

  it('is nobody to give up a silent stream for', async () => {
    const { key, near, far } = await pair();
    const isolate = freshIsolate({ BACKEND_SILENCE_MS: '100' });
    await mood(far, 'stopping');
    await mood(near, 'sick');
    expect(await errorCode(inEurope(key, isolate))).toBe('503 not_ready');
    await mood(near, 'good');
    const response = await inEurope(key, isolate, { stream: true, user: 'slow-first' });
    expect(await response.text()).toContain('data: [DONE]');
    expect(backendOf(response)).toBe(near);
  });
});

describe('when a backend fails', () => {
  it('at one request again and again, the request is refused in the end, and no backend is left out', async () => {
    const { key } = await newTenant();
    const backends = [await register(), await register()];
    const isolate = freshIsolate();
    for (const backend of backends) await mood(backend, 'sick');
    const codes: string[] = [];
    for (let i = 0; i < 12; i++) codes.push(await errorCode(chat(key, { seed: 404 }, isolate)));
    // Both backends met it, each at most twice.
    expect(codes[0]).toBe('500 engine_failed');
    expect(new Set(codes.slice(2))).toEqual(new Set(['422 request_fails_engine']));
    const answer = await call('GET', '/admin/v1/backends', { key: ADMIN_KEY }, isolate);
    const { data } = await answer.json<{ data: BackendEntry[] }>();
    for (const id of backends) expect(data.find((one) => one.id === id)?.state.breaker).toBe('closed');
    for (const backend of backends) await mood(backend, 'good');
    expect((await chat(key, { seed: 405 }, isolate)).status).toBe(200);
  });

  /** A request, and what happens once its first backend has it. */
  async function onceAsked(key: string, isolate: ReturnType<typeof freshIsolate>, then: () => unknown) {
    const id = crypto.randomUUID();
    const headers = { [HEADERS.requestId]: id };
    const answering = call('POST', '/v1/chat/completions', { key, headers, body: CHAT }, isolate);
    await soon(async () => expect(await recorded(id)).not.toBeNull());
    await then();
    return await answering;
  }

  it.each(['down', 'sick', 'html', 'bad-error', 'unauthorized', 'queue-full', 'stopping', 'gateway-502'])(
    'with %s, the next one answers, and the client sees nothing of it',
    async (how) => {
      const { key } = await newTenant();
      const ids = [await register(), await register()];
      for (const bad of ids) {
        await mood(bad, how);
        const response = await chat(key, {}, freshIsolate());
        expect(response.status).toBe(200);
        expect(backendOf(response)).not.toBe(bad);
        await mood(bad, 'good');
      }
    },
  );

  it('because it stops, the one that follows it at its address answers', async () => {
    const { key } = await newTenant();
    const id = await register();
    const isolate = freshIsolate();
    await mood(id, 'stopping');
    const response = await onceAsked(key, isolate, () => mood(id, 'good'));
    expect(response.status).toBe(200);
    expect((await askedOf(response))!.length).toBeGreaterThan(1);
  });

  it('because it stops, and nothing follows, nobody is blamed', async () => {
    const { key } = await newTenant();
    const id = await register();
    const isolate = freshIsolate();
    await mood(id, 'stopping');
    const refused = await Promise.all(Array.from({ length: 6 }, () => chat(key, {}, isolate)));
    for (const response of refused) expect(await errorCode(response)).toBe('503 not_ready');
    await mood(id, 'good');
    expect((await chat(key, {}, isolate)).status).toBe(200);
  });

  it.each(['gateway-502', 'gateway-503', 'gateway-504', 'gateway-520', 'gateway-530', 'foreign-error'])(
    'and what is in between says so (%s), it is asked again, and is unreachable',
    async (how) => {
      const { key } = await newTenant();
      const id = await register();
      await mood(id, how);
      const response = await chat(key, {}, freshIsolate());
      expect(response.headers.get('retry-after')).toBe('1');
      expect(await askedOf(response)).toEqual(Array(5).fill(id));
      expect(await errorCode(response)).toBe('503 backend_unreachable');
    },
  );

  it('that lists its models in another form does not hide those of the others', async () => {
    const { key } = await newTenant();
    const [odd] = [await register(), await register()];
    await mood(odd, 'odd-models');
    const logged = vi.spyOn(console, 'error').mockImplementation(() => {});
    const listed = await call('GET', '/v1/models', { key }, freshIsolate());
    const { data } = await listed.json<{ data: { id: string }[] }>();
    expect(data.map(({ id }) => id)).toEqual([MODEL.id, `${MODEL.id}:dense`]);
    const lines = logged.mock.calls.map(([line]) => String(line));
    logged.mockRestore();
    expect(lines.find((line) => line.includes('model_list_malformed'))).toContain(`"backend":"${odd}"`);
  });

  it('that never answers leaves the edge ready while another one answers', async () => {
    const [silent] = [await register(), await register()];
    await mood(silent, 'mute');
    const ready = await call('GET', '/readyz', {}, freshIsolate());
    expect(ready.status, await ready.text()).toBe(200);
  });

  it('that never answers does not hide the models of the others', async () => {
    const { key } = await newTenant();
    const [silent] = [await register(), await register()];
    await mood(silent, 'mute');
    const isolate = freshIsolate();
    await soon(async () => {
      const listed = await call('GET', '/v1/models', { key }, isolate);
      expect(listed.status, await listed.text()).toBe(200);
    });
  });

  it('that serves another model than a moment ago is asked again before a set is published', async () => {
    const { tenant } = await newTenant();
    const id = await register();
    const { version } = await upload(makeMaskSet('of-a-model'), tenant);
    const publish = () => admin('POST', '/publications', { tenant, version });
    expect((await publish()).status).toBe(201);
    await mood(id, 'no-models');
    expect(await errorCode(publish())).toBe('400 mask_model_mismatch');
    await mood(id, 'good');
    expect((await publish()).status).toBe(201);
    // A backend that is down for a moment refuses nothing.
    await mood(id, 'gateway-502');
    expect((await publish()).status).toBe(201);
  });

  it('that serves other weights under the same name hides those of no other when a set is published', async () => {
    const { tenant } = await newTenant();
    const ids = [await register(), await register()];
    const { version } = await upload(makeMaskSet('of-weights'), tenant);
    for (const other of ids) {
      await mood(other, 'other-weights');
      expect((await admin('POST', '/publications', { tenant, version })).status).toBe(201);
      await mood(other, 'good');
    }
  });

  it('to serve the same weights as another, conversations keep their masks at the other one', async () => {
    const { tenant, key } = await newTenant();
    await goLive('of-some', tenant);
    const ids = [await register(), await register()];
    for (const other of ids) {
      await mood(other, 'other-weights');
      const isolate = freshIsolate();
      const seen = new Set<string>();
      for (let i = 0; i < 12; i++) {
        const response = await chat(key, say(`north ${i}`), isolate);
        const [first] = (await askedOf(response))!;
        seen.add(`${first === other} ${response.headers.get(HEADERS.fallback)}`);
      }
      expect(seen).toEqual(new Set(['false null']));
      const listed = await call('GET', '/v1/models', { key }, isolate);
      expect((await listed.json<{ data: object[] }>()).data).toHaveLength(2);
      await mood(other, 'good');
    }
  });

  it('to serve the same weights as another, a mask that a client names goes to the other one, too', async () => {
    const { tenant, key } = await newTenant();
    const { set } = await goLive('named-of-some', tenant);
    const ids = [await register(), await register()];
    for (const other of ids) {
      await mood(other, 'other-weights');
      const isolate = freshIsolate();
      for (let i = 0; i < 12; i++) {
        const response = await chat(key, { ...say(`north ${i}`), mask: set.clusters[0]!.mask }, isolate);
        expect(response.status, await response.clone().text()).toBe(200);
        expect(await askedOf(response)).not.toContain(other);
      }
      await mood(other, 'good');
    }
  });

  it('to have surrogates, a written-out mask with surrogates goes to the backend with a table', async () => {
    const { key } = await newTenant();
    const ids = [await register(), await register()];
    const mask = { skipFfn: [0], surrogate: true };
    for (const able of ids) {
      await mood(able, 'with-surrogates');
      const isolate = freshIsolate();
      for (let i = 0; i < 12; i++) {
        const response = await chat(key, { ...say(`north ${i}`), mask }, isolate);
        expect(response.status, await response.clone().text()).toBe(200);
        expect(await askedOf(response)).toEqual([able]);
      }
      // Without surrogates it is the same mask at both.
      const plain = await chat(key, { mask: { skipFfn: [0] } }, isolate);
      expect(plain.headers.get(HEADERS.mask)).toMatch(/^m_/);
      const body = { ...CHAT, mask };
      const routed = await call('POST', '/v1/route', { key, body }, isolate);
      expect(await routed.json()).toMatchObject({ sparsity: 1 / MODEL.blockCount });
      await mood(able, 'good');
    }
    const refused = await chat(key, { mask }, freshIsolate());
    expect(await errorCode(refused)).toBe('400 surrogates_mismatch');
  });

  it('to serve the same weights as another, a tenant with a ceiling may write masks out all the same', async () => {
    const { tenant, key } = await newTenant();
    await admin('PATCH', `/tenants/${tenant}`, { sparsity_max: 0.5 });
    const ids = [await register(), await register()];
    await mood(ids[1]!, 'other-weights');
    const body = { ...CHAT, mask: { skipFfn: [0] } };
    const routed = await call('POST', '/v1/route', { key, body }, freshIsolate());
    expect(routed.headers.get(HEADERS.mask)).toBe('custom');
    expect(await routed.json()).toMatchObject({ sparsity: 1 / MODEL.blockCount });
  });

  it('and nobody else lists its model, requests are still counted as that model’s', async () => {
    const { tenant, key } = await newTenant();
    const [id, other] = [await register(), await register()];
    await mood(other, 'no-models');
    const isolate = freshIsolate();
    await (await chat(key, {}, isolate)).text();
    await mood(id, 'gateway-502');
    later(MODELS.fresh_ms + SECOND_ms);
    await soon(async () => {
      const listed = await call('GET', '/v1/models', { key }, isolate);
      expect(await listed.json()).toMatchObject({ data: [] });
    });
    expect(await errorCode(chat(key, {}, isolate))).toBe('503 backend_unreachable');
    await soon(async () => {
      const usage = await admin('GET', `/usage?tenant=${tenant}&group=model`);
      const { data } = await usage.json<{ data: object[] }>();
      expect(data).toMatchObject([{ model: MODEL.id, requests: 2, errors: 1 }]);
    });
  });

  it('and is back while it is asked again, the client sees nothing of what was in between', async () => {
    const { key } = await newTenant();
    const id = await register();
    await mood(id, 'gateway-530');
    const response = await onceAsked(key, freshIsolate(), () => mood(id, 'good'));
    expect(response.status).toBe(200);
  });

  it.each(['gateway-400', 'gateway-500', 'gateway-519', 'gateway-531', 'bad-error'])(
    'with a page that says nothing of being reached (%s), it is asked once',
    async (how) => {
      const { key } = await newTenant();
      await mood(await register(), how);
      const response = await chat(key, {}, freshIsolate());
      expect(await askedOf(response)).toHaveLength(1);
      expect(await errorCode(response)).toBe('502 backend_error');
    },
  );

  it('by leading elsewhere, it is not followed, and the log says which one it is, and where to', async () => {
    const { key } = await newTenant();
    const id = await register();
    await mood(id, 'gateway-301');
    const logged = vi.spyOn(console, 'error').mockImplementation(() => {});
    expect(await errorCode(chat(key, {}, freshIsolate()))).toBe('502 backend_error');
    const lines = logged.mock.calls.map(([line]) => String(line));
    logged.mockRestore();
    const line = lines.find((one) => one.includes('"backend_error"'));
    expect(line).toContain(`/at/${id}/`);
    expect(line).toContain('a redirect to https://elsewhere.test/');
  });

  it('in silence, a stream goes to the next one', async () => {
    const { key } = await newTenant();
    const ids = [await register(), await register()];
    await mood((await homeOf(key, {}))!, 'hang');
    const response = await chat(key, { stream: true }, freshIsolate({ BACKEND_SILENCE_MS: '100' }));
    expect(await response.text()).toContain('data: [DONE]');
    expect(await askedOf(response)).toEqual(expect.arrayContaining(ids));
  });

  it('in silence, once a comment was sent, nobody else is asked, and the stream says so', async () => {
    const { key } = await newTenant();
    for (const id of [await register(), await register()]) await mood(id, 'hang');
    const isolate = freshIsolate({ STREAM_KEEPALIVE_MS: '50', BACKEND_SILENCE_MS: '400' });
    const response = await chat(key, { stream: true }, isolate);
    expect(await response.text()).toMatch(
      /^(: keepalive\n\n)+event: error\ndata: \{"error":\{.*backend_unreachable.*\n\n$/,
    );
    expect(await askedOf(response)).toHaveLength(1);
  });

  it('half-way through its error, the next one answers', async () => {
    const { key } = await newTenant();
    const ids = [await register(), await register()];
    for (const bad of ids) {
      await mood(bad, 'stall-error');
      const response = await chat(key, {}, freshIsolate({ BACKEND_STALL_MS: '200' }));
      expect([response.status, backendOf(response) === bad]).toEqual([200, false]);
      await mood(bad, 'good');
    }
  });

  it('half-way through telling its load, nothing is held for it', async () => {
    const { key } = await newTenant();
    for (const id of [await register(), await register()]) await mood(id, 'half-load');
    const held: Promise<unknown>[] = [];
    await (
      await chat(
        key,
        {},
        freshIsolate({}, (work) => held.push(work)),
      )
    ).text();
    const all = Promise.all(held).then(() => 'let go');
    const late = new Promise((resolve) => setTimeout(resolve, 3 * LOAD_PROBE.timeout_ms, 'held'));
    expect(await Promise.race([all, late])).toBe('let go');
  });

  it('with an error of the request, nobody else is asked', async () => {
    const { key } = await newTenant();
    await register();
    await register();
    const response = await chat(key, { model: 'made-up' }, freshIsolate());
    expect(await askedOf(response)).toHaveLength(1);
    expect(await errorCode(response)).toBe('404 model_not_found');
  });

  it('after the first byte, nobody else is asked', async () => {
    const { key } = await newTenant();
    await register();
    await register();
    const response = await chat(key, { user: 'half-event', stream: true }, freshIsolate());
    const text = await response.text();
    expect(text).toMatch(
      /^data: \{"choices":\[\]\}\n\nevent: error\ndata: \{"error":\{.*backend_error.*\n\n$/,
    );
    expect(await askedOf(response)).toHaveLength(1);
  });

  it('and all others too: 503 with Retry-After, and no retry storm', async () => {
    const { key } = await newTenant();
    const ids = [await register(), await register()];
    for (const id of ids) await mood(id, 'down');
    const started_ms = performance.now();
    const response = await chat(key, {}, freshIsolate());
    // Far below what a backend is given for an answer.
    expect(performance.now() - started_ms).toBeLessThan(15 * SECOND_ms);
    expect(response.headers.get('retry-after')).toBe('1');
    expect(await errorCode(response)).toBe('503 backend_unreachable');
  });

  it('again and again, and is only full in between, it is asked all the same', async () => {
    const { key } = await newTenant();
    const id = await register();
    const isolate = freshIsolate();
    for (const how of ['html', 'queue-full', 'html']) {
      await mood(id, how);
      const code = how === 'html' ? '502 backend_error' : '429 queue_full';
      for (let i = 0; i < 4; i++) expect(await errorCode(chat(key, {}, isolate))).toBe(code);
    }
  });

  it('again and again, it is left alone, and tried after a while', async () => {
    const { key } = await newTenant();
    const id = await register();
    const isolate = freshIsolate();
    await mood(id, 'html');
    for (let i = 0; i < 5; i++) expect(await errorCode(chat(key, {}, isolate))).toBe('502 backend_error');
    const refused = await chat(key, {}, isolate);
    expect(await askedOf(refused)).toBeUndefined();
    expect(Number(refused.headers.get('retry-after'))).toBeGreaterThan(20);
    expect(await errorCode(refused)).toBe('503 backend_unreachable');
    await mood(id, 'good');
    expect(await errorCode(chat(key, {}, isolate))).toBe('503 backend_unreachable');
    later(31 * SECOND_ms);
    for (let i = 0; i < 3; i++) expect((await chat(key, {}, isolate)).status).toBe(200);
  });

  it.each(['down', 'gateway-502'])(
    'and comes back (from %s), it is found by asking for its load, long before the breaker would',
    async (how) => {
      const { key } = await newTenant();
      const id = await register();
      const isolate = freshIsolate();
      await mood(id, how);
      await Promise.all(Array.from({ length: 5 }, () => chat(key, {}, isolate)));
      expect(await askedOf(await chat(key, {}, isolate))).toBeUndefined();
      await mood(id, 'good');
      await soon(async () => expect((await chat(key, {}, isolate)).status).toBe(200));
    },
  );

  it('one bad request does not open a breaker', async () => {
    const { key } = await newTenant();
    await register();
    const isolate = freshIsolate();
    expect(await errorCode(chat(key, { user: 'die' }, isolate))).toBe('503 backend_unreachable');
    expect((await chat(key, {}, isolate)).status).toBe(200);
  });
});

describe('the encoder of the backends', () => {
  const routed = async () => {
    const { tenant, key } = await newTenant();
    await goLive('compass', tenant);
    const id = await register();
    return { key, id, isolate: freshIsolate({ ENCODER: 'backend' }) };
  };

  it('that has stopped costs requests their mask, and nothing else', async () => {
    const { key, isolate } = await routed();
    const answers = await Promise.all(
      Array.from({ length: 8 }, (_, i) => chat(key, say(`!fail ${i}`), isolate)),
    );
    for (const response of answers) {
      expect([response.status, response.headers.get(HEADERS.fallback)]).toEqual([200, 'encoder_failed']);
    }
  });

  it('that works does not hide that completions do not', async () => {
    const { key, id, isolate } = await routed();
    await mood(id, 'html');
    for (let i = 0; i < 5; i++)
      expect(await errorCode(chat(key, say(`north ${i}`), isolate))).toBe('502 backend_error');
    const refused = await chat(key, say('north 6'), isolate);
    expect(await askedOf(refused)).toBeUndefined();
    expect(await errorCode(refused)).toBe('503 backend_unreachable');
  });
});

describe('time', () => {
  it('is passed on, and a client may shorten it', async () => {
    const { key } = await newTenant();
    const send = (headers: Record<string, string>) =>
      freshIsolate()(
        new Request(`${EDGE_URL}/v1/chat/completions`, {
          method: 'POST',
          headers: { 'content-type': 'application/json', authorization: `Bearer ${key}`, ...headers },
          body: JSON.stringify(CHAT),
        }),
      );
    const left = async (response: Response) =>
      Number((await recorded(idOf(response)))!.headers[BACKEND_HEADERS.deadline]);
    expect(await left(await send({}))).toBeGreaterThan(110_000);
    const short = await left(await send({ [BACKEND_HEADERS.deadline]: '1500' }));
    expect(short).toBeLessThanOrEqual(1500);
    expect(short).toBeGreaterThan(500);
    expect(await errorCode(send({ [BACKEND_HEADERS.deadline]: 'soon' }))).toBe('400 invalid_request');
  });

  const hurried = (
    key: string,
    deadline_ms: number,
    body: object,
    isolate: ReturnType<typeof freshIsolate>,
  ) =>
    call(
      'POST',
      '/v1/chat/completions',
      { key, body: { ...CHAT, ...body }, headers: { [BACKEND_HEADERS.deadline]: String(deadline_ms) } },
      isolate,
    );

  it.each([false, true])(
    'that a client made too short is no fault of the backend (stream: %s)',
    async (stream) => {
      const [one, other] = [await newTenant(), await newTenant()];
      await register();
      const isolate = freshIsolate();
      for (let i = 0; i < 6; i++) {
        const answer = await hurried(one.key, 1, { user: 'hang', stream }, isolate);
        expect(await errorCode(answer)).toBe('504 deadline_exceeded');
      }
      expect((await chat(other.key, {}, isolate)).status).toBe(200);
    },
  );

  it('that whole answers take is no fault of a backend that tells its load meanwhile', async () => {
    const { key } = await newTenant();
    await register();
    const isolate = freshIsolate({ BACKEND_TIMEOUT_MS: '250' });
    for (let i = 0; i < 6; i++) {
      expect(await errorCode(chat(key, { user: 'hang' }, isolate))).toBe('504 deadline_exceeded');
    }
    expect((await chat(key, {}, isolate)).status).toBe(200);
  });

  it.each([false, true])(
    'is wasted on a backend that says nothing at all, for a while (stream: %s)',
    async (stream) => {
      const { key } = await newTenant();
      await mood(await register(), 'mute');
      const isolate = freshIsolate({ BACKEND_TIMEOUT_MS: '50', BACKEND_SILENCE_MS: stream ? '40' : '15000' });
      hurry();
      for (let i = 0; i < 5; i++) await chat(key, { stream }, isolate);
      await vi.waitFor(async () => {
        const refused = await chat(key, { stream }, isolate);
        expect(Number(refused.headers.get('retry-after'))).toBeGreaterThan(20);
      }, 5 * SECOND_ms);
    },
  );

  it('is lost on a backend that hangs only until it leaves a load probe unanswered', async () => {
    const { key } = await newTenant();
    const mute = await register();
    const well = await register();
    await mood(mute, 'mute');
    // The first request waits for longer than its load probe, so that the next one knows of the silence.
    const isolate = freshIsolate({ BACKEND_TIMEOUT_MS: String(LOAD_PROBE.timeout_ms + 300) });
    let body = say('');
    for (let i = 0; (await homeOf(key, body, isolate)) !== mute; i++) body = say(`conversation ${i}`);
    hurry();
    expect(await errorCode(chat(key, body, isolate))).toBe('504 deadline_exceeded');
    await vi.waitFor(async () => {
      const { headers } = await chat(key, body, isolate);
      expect(headers.get(BACKEND_HEADERS.backend)).toBe(well);
      expect(headers.get(BACKEND_HEADERS.affinity)).toBe('failover');
    }, 6 * SECOND_ms);
  });

  it('without a token: comments keep a stream open, and the answer follows', async () => {
    const { key } = await newTenant();
    const isolate = freshIsolate({ STREAM_KEEPALIVE_MS: '50' });
    const response = await chat(key, { stream: true, user: 'slow-first' }, isolate);
    expect(Object.fromEntries(response.headers)).toMatchObject(EVENT_STREAM_HEADERS);
    const text = await response.text();
    expect(text).toMatch(/^(: keepalive\n\n){3,}data: /);
    expect(text.endsWith('data: [DONE]\n\n')).toBe(true);
  });

  it('without a byte of an answer that has begun ends it, and the backend is called off', async () => {
    const { key } = await newTenant();
    const isolate = freshIsolate({ STREAM_KEEPALIVE_MS: '400', BACKEND_STALL_MS: '1000' });
    const response = await chat(key, { stream: true, user: 'stall-mid-stream' }, isolate);
    const text = await response.text();
    expect(text).toMatch(/^(data: \{.*\n\n){3}(: keepalive\n\n){2,}event: error\ndata: .*\n\n$/);
    expect(text).toContain('"code":"backend_error"');
    await soon(async () => expect((await recorded(idOf(response)))!.hungUp).toBe(true));
    expect(await errorCode(chat(key, { user: 'stall-whole' }, isolate))).toBe('502 backend_error');
  });

  it('inside an event that is too long to be held brings no comment, and its error is an event of its own', async () => {
    const { key } = await newTenant();
    const isolate = freshIsolate({ STREAM_KEEPALIVE_MS: '100', BACKEND_STALL_MS: '1000' });
    const response = await chat(key, { stream: true, user: 'long-event' }, isolate);
    const [begun, error, ...more] = (await response.text()).split('\n\n');
    expect(begun).toMatch(/^data: \{"x":"x{1000000,}$/);
    expect(error).toMatch(/^event: error\ndata: \{.*"code":"backend_error"/);
    expect(more).toEqual(['']);
  });

  it('in an event that is too long to be held changes no byte of it', async () => {
    const { key } = await newTenant();
    const response = await chat(key, { stream: true, user: 'long-whole-event' }, freshIsolate());
    // A difference of megabytes is nothing to print.
    expect((await response.text()) === LONG_WHOLE_EVENT).toBe(true);
  });

  it('with comments of the backend is no end', async () => {
    const { key } = await newTenant();
    const isolate = freshIsolate({ STREAM_KEEPALIVE_MS: '600000', BACKEND_STALL_MS: '30000' });
    vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout', 'Date'] });
    const response = await chat(key, { stream: true, user: 'slow-tokens' }, isolate);
    const reader = response.body!.getReader();
    let text = '';
    for (let piece = await reader.read(); !piece.done; ) {
      text += new TextDecoder().decode(piece.value);
      const next = reader.read();
      // Time to begin its wait for the next one.
      await scheduler.wait(20);
      // By this clock each comment comes in time, however long it takes, and all of them together do not.
      vi.advanceTimersByTime(20 * SECOND_ms);
      piece = await next;
    }
    expect(text).toMatch(/^(: keepalive\n\n){3,}data: .*data: \[DONE\]\n\n$/s);
  });

  it('that a client takes to read is no silence of the backend', async () => {
    const { key } = await newTenant();
    const isolate = freshIsolate({ BACKEND_STALL_MS: '30000' });
    vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout', 'Date'] });
    const response = await chat(key, { stream: true }, isolate);
    const reader = response.body!.getReader();
    let text = '';
    for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
      text += new TextDecoder().decode(piece.value);
      vi.advanceTimersByTime(60 * SECOND_ms);
    }
    expect(text.endsWith('data: [DONE]\n\n')).toBe(true);
  });

  it.each([
    ['slow-refusal', 'model_not_found'],
    ['hang', 'deadline_exceeded'],
  ])('after a comment, %s is an error event', async (user, code) => {
    const { key } = await newTenant();
    const isolate = freshIsolate({ STREAM_KEEPALIVE_MS: '50', BACKEND_TIMEOUT_MS: '600' });
    const response = await chat(key, { stream: true, user }, isolate);
    expect(response.status).toBe(200);
    const last = (await response.text()).trim().split('\n\n').at(-1)!;
    expect(last.startsWith('event: error\ndata: ')).toBe(true);
    expect(JSON.parse(last.slice('event: error\ndata: '.length))).toMatchObject({ error: { code } });
    expect(await askedOf(response)).toHaveLength(1);
  });

  it('after a comment, an answer that is no stream is passed on, and ends', async () => {
    const { key } = await newTenant();
    const response = await chat(
      key,
      { stream: true, user: 'slow-whole' },
      freshIsolate({ STREAM_KEEPALIVE_MS: '50' }),
    );
    const [, whole] = /^(?:: keepalive\n\n)+(\{.*\})$/.exec(await response.text())!;
    expect(JSON.parse(whole!)).toHaveProperty('maskroute');
  });

  it('a second backend that cannot use the mask is not asked where hedging is on', async () => {
    const { tenant, key } = await newTenant();
    await goLive('hedged', tenant);
    const ids = [await register(), await register()];
    for (const other of ids) {
      await mood(other, 'other-weights');
      const isolate = freshIsolate({ BACKEND_HEDGE_MS: '50' });
      const response = await chat(key, { ...say('north'), user: 'slow-first' }, isolate);
      expect(response.headers.get(HEADERS.fallback)).toBeNull();
      expect(await askedOf(response)).toEqual(ids.filter((id) => id !== other));
      await mood(other, 'good');
    }
  });

  it('a second backend is asked for a silent one where hedging is on', async () => {
    const { key } = await newTenant();
    const ids = [await register(), await register()];
    for (const silent of ids) {
      await mood(silent, 'hang');
      const response = await chat(key, {}, freshIsolate({ BACKEND_HEDGE_MS: '50' }));
      expect(response.status).toBe(200);
      expect(backendOf(response)).not.toBe(silent);
      await mood(silent, 'good');
    }
  });
});

describe('a token', () => {
  it('is for one backend and one attempt', async () => {
    const { key } = await newTenant();
    const ids = [await register(), await register()];
    const claimsOf = async (response: Response) => {
      const { headers } = (await recorded(idOf(response)))!;
      const token = headers.authorization!.slice('Bearer '.length);
      return await createVerifier([BACKEND_KEY], 'backend')(token, Date.now() / 1000);
    };
    for (const down of ids) {
      await mood(down, 'sick');
      const response = await chat(key, {}, freshIsolate());
      const { audience } = await claimsOf(response);
      expect(audience).toBe(`${env.BACKEND_URL}/at/${backendOf(response)}`);
      await mood(down, 'good');
    }
  });
});
