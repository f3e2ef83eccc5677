/** One request's way through the edge: what the backend is told, what the client is told, what goes wrong. */
import { env } from 'cloudflare:workers';
import fc from 'fast-check';
import { AzureOpenAI } from 'openai';
import { describe, expect, it, vi } from 'vitest';
import { DENSE_MASK_ID, denseMask, maskBits } from '../../../shared/mask/mask.ts';
import { BACKEND_HEADERS } from '../../../shared/wire/backend-load.ts';
import { EVENT_STREAM_HEADERS } from '../../../shared/wire/protocol.ts';
import { createVerifier } from '../../../shared/wire/service-token.ts';
import { forwardedBody } from '../../../workers/requests/forward.ts';
import {
  BACKEND_KEY,
  EDGE_URL,
  MODEL,
  STREAM_PAUSE_ms,
  UNKNOWN_MASK_ms,
} from '../../support/edge/constants.ts';
import { idOf } from '../support/backends.ts';
import {
  activate,
  admin,
  badD1,
  CHAT,
  call,
  chat,
  created,
  errorCode,
  freshIsolate,
  goLive,
  makeMaskSet,
  newTenant,
  recorded,
  say,
  upload,
} from '../support/edge.ts';

describe('a routed completion', () => {
  it('runs dense where its cluster leaves nothing out, and is routed all the same', async () => {
    const { tenant, key } = await newTenant();
    const set = makeMaskSet('sizes');
    const lighter = { ...set.clusters[0]!, bits: maskBits(denseMask(MODEL.blockCount)), mask: DENSE_MASK_ID };
    const { version } = await upload({ ...set, clusters: [lighter, ...set.clusters.slice(1)] }, tenant);
    await activate(version, { tenant });
    const response = await chat(key, say('north it is'));
    expect((await recorded(idOf(response)))!.body).toMatchObject({ mask: DENSE_MASK_ID });
    expect(Object.fromEntries(response.headers)).toMatchObject({
      'x-maskroute-version': version,
      'x-maskroute-cluster': '0',
      'x-maskroute-mask': DENSE_MASK_ID,
      'x-maskroute-sparsity': '0',
    });
    expect(response.headers.get('x-maskroute-fallback')).toBeNull();
    const answer = await response.json<{ maskroute: object }>();
    expect(answer.maskroute).toMatchObject({ cluster: 0, mask: DENSE_MASK_ID, fallback: null });
  });

  it('reaches the backend with the mask of the nearest cluster and the decision', async () => {
    const { tenant, key } = await newTenant();
    const { set, version } = await goLive('compass', tenant);
    for (const [cluster, word] of ['north', 'east', 'south'].entries()) {
      const response = await chat(key, { ...say(`${word} it is`), seed: 7, metadata: { x: '1' } });
      expect(response.status).toBe(200);
      const { mask } = set.clusters[cluster]!;
      const { body, path } = (await recorded(idOf(response)))!;
      expect(path).toBe('/v1/chat/completions');
      const echo = {
        mask_set: 'compass',
        version,
        cluster,
        experiment: 'none',
        variant: 'live',
        region: expect.any(String),
        fallback: null,
      };
      expect(body).toMatchObject({ mask, seed: 7, metadata: { x: '1' }, maskroute: echo });
      const answer = await response.json<{ maskroute: object }>();
      expect(answer.maskroute).toMatchObject(echo);
      expect(Object.fromEntries(response.headers)).toMatchObject({
        'content-type': 'application/json',
        'x-maskroute-mask-set': 'compass',
        'x-maskroute-version': version,
        'x-maskroute-cluster': String(cluster),
        'x-maskroute-mask': mask,
        'x-maskroute-sparsity': String(2 / 12),
        'x-maskroute-experiment': 'none',
        'x-maskroute-variant': 'live',
        'x-maskroute-region': expect.stringMatching(/^(local|[A-Z0-9]+(\/[A-Z0-9]+)*)$/),
        'server-timing': expect.stringMatching(
          /^assign;dur=[\d.]+, embed;dur=[\d.]+, route;dur=[\d.]+, backend;dur=[\d.]+$/,
        ),
      });
      expect(response.headers.get('x-maskroute-fallback')).toBeNull();
    }
  });

  it('is signed for the backend, and the client key stays here', async () => {
    const { tenant, key } = await newTenant();
    const response = await chat(key, {});
    const { headers } = (await recorded(idOf(response)))!;
    const token = headers.authorization!.slice('Bearer '.length);
    const claims = await createVerifier([BACKEND_KEY], 'backend')(token, Date.now() / 1000);
    expect(claims).toMatchObject({ tenant, edge: EDGE_URL });
    expect(JSON.stringify(headers)).not.toContain(key);
    const again = (await recorded(idOf(await chat(key, {}))))!;
    expect(again.headers.authorization).not.toBe(headers.authorization);
  });

  it('names the address that the edge was given, and none that a client names', async () => {
    const { key } = await newTenant();
    const edgeOf = async (EDGE_URL: string | undefined) => {
      const isolate = freshIsolate({ EDGE_URL: EDGE_URL ?? '' });
      // What a client writes as its Host is what the worker sees as the address.
      const response = await isolate(
        new Request('http://localhost:6666/v1/chat/completions', {
          method: 'POST',
          headers: {
            authorization: `Bearer ${key}`,
            'content-type': 'application/json',
            'x-forwarded-host': 'localhost:6666',
            origin: 'http://localhost:6666',
          },
          body: JSON.stringify({ ...CHAT, mask: makeMaskSet('any').clusters[0]!.mask }),
        }),
      );
      expect(response.status).toBe(200);
      const { headers } = (await recorded(idOf(response)))!;
      const token = headers.authorization!.slice('Bearer '.length);
      return (await createVerifier([BACKEND_KEY], 'backend')(token, Date.now() / 1000)).edge;
    };
    expect(await edgeOf('https://edge.example.com/')).toBe('https://edge.example.com');
    const warned = vi.spyOn(console, 'warn').mockImplementation(() => {});
    expect(await edgeOf(undefined)).toBe('');
    expect(warned.mock.calls.join('\n')).toContain('edge_url_missing');
    warned.mockRestore();
  });

  it('keeps a well-formed request id and replaces any other', async () => {
    const { key } = await newTenant();
    const send = (id: string) =>
      call('POST', '/v1/chat/completions', { key, body: CHAT, headers: { 'x-request-id': id } });
    const kept = await send('my:id-1.2_3');
    expect(idOf(kept)).toBe('my:id-1.2_3');
    expect((await recorded('my:id-1.2_3'))?.path).toBe('/v1/chat/completions');
    for (const bad of ['a b', 'x'.repeat(129), 'ä']) expect(idOf(await send(bad))).toMatch(/^req_/);
  });

  it('takes legacy completions too', async () => {
    const { tenant, key } = await newTenant();
    const { set } = await goLive('compass', tenant);
    const body = { model: MODEL.id, prompt: 'east is east', max_tokens: 0, echo: true, logprobs: 1 };
    const response = await call('POST', '/v1/completions', { key, body });
    const seen = (await recorded(idOf(response)))!;
    expect(seen.path).toBe('/v1/completions');
    expect(seen.body).toMatchObject({ ...body, mask: set.clusters[1]!.mask });
  });

  it('follows the routing policy of the tenant', async () => {
    await created(admin('POST', '/tenants', { id: 'last', name: 'x', routing_policy: 'last_user' }));
    const { key } = await created<{ key: string }>(admin('POST', '/keys', { tenant: 'last', name: 'x' }));
    await goLive('compass', 'last');
    const messages = ['north', 'south'].map((content) => ({ role: 'user', content }));
    const response = await chat(key, { messages });
    expect(response.headers.get('x-maskroute-cluster')).toBe('2');
  });
});

describe("the client of OpenAI's package for Azure", () => {
  const asking = async (options: object = {}) => {
    const { key } = await newTenant();
    const fetch = (url: string | URL | Request, init?: RequestInit) =>
      freshIsolate()(new Request(url as string, init));
    return new AzureOpenAI({
      endpoint: EDGE_URL,
      apiVersion: '2024-10-21',
      apiKey: key,
      maxRetries: 0,
      fetch,
      ...options,
    });
  };

  it('gets what others get, whole and streamed: its deployment is the model', async () => {
    const ask = { ...CHAT, messages: [{ role: 'user' as const, content: 'north is cold' }] };
    for (const [options, model] of [
      [{}, MODEL.id],
      [{ deployment: `${MODEL.id}:dense` }, 'gpt-4o'],
    ] as const) {
      const client = await asking(options);
      const whole = await client.chat.completions.create({ ...ask, model });
      expect(whole.choices[0]!.message.content).toMatch(/\w/);
      expect(whole.model).toBe('deployment' in options ? options.deployment : MODEL.id);
      const contents: string[] = [];
      for await (const { choices } of await client.chat.completions.create({ ...ask, model, stream: true }))
        contents.push(choices[0]?.delta.content ?? '');
      expect(contents.join('')).toBe(whole.choices[0]!.message.content);
      const plain = await client.completions.create({ model, prompt: 'north' });
      expect(plain.choices).toHaveLength(1);
    }
  });

  it('gets responses and models, where the path has a version, too', async () => {
    const client = await asking();
    expect((await client.responses.create({ model: MODEL.id, input: 'north' })).object).toBe('response');
    const newer = await asking({ endpoint: undefined, baseURL: `${EDGE_URL}/openai/v1` });
    expect((await newer.responses.create({ model: MODEL.id, input: 'north' })).object).toBe('response');
    for (const { models } of [client, newer])
      expect((await models.list()).data.map(({ id }) => id)).toContain(MODEL.id);
  });

  it('gets its own errors', async () => {
    const wrong = await asking({ apiKey: 'wrong' });
    const ask = { ...CHAT, messages: [{ role: 'user' as const, content: 'north' }] };
    await expect(wrong.chat.completions.create(ask)).rejects.toMatchObject({ code: 'invalid_api_key' });
    const client = await asking({ deployment: 'none' });
    await expect(client.chat.completions.create(ask)).rejects.toMatchObject({
      code: 'model_not_found',
      param: 'model',
    });
    await expect(client.embeddings.create({ model: 'x', input: 'x' })).rejects.toMatchObject({ status: 404 });
    const path = `/openai/deployments/${MODEL.id}/chat/completions?api-version=1`;
    for (const body of ['[]', 'null', '{}', '5'])
      expect(await errorCode(call('POST', path, { key: (await newTenant()).key, body }))).toBe(
        '400 invalid_request',
      );
  });
});

describe('dense, and why', () => {
  /** No backend serves it. */
  const STRANGE = 'another-model';
  const fallbackOf = async (key: string, body: object, fetch?: Parameters<typeof chat>[2]) => {
    const response = await chat(key, body, fetch);
    expect(response.status).toBe('model' in body && body.model === STRANGE ? 404 : 200);
    const seen = (await recorded(idOf(response)))!;
    expect(seen.body).toMatchObject({ mask: 'dense' });
    expect(response.headers.get('x-maskroute-mask')).toBe('dense');
    expect(response.headers.get('x-maskroute-sparsity')).toBe('0');
    const reason = response.headers.get('x-maskroute-fallback');
    expect(seen.body).toMatchObject({ maskroute: { fallback: reason } });
    return reason;
  };

  it('is said in the header and in the body', async () => {
    const { tenant, key } = await newTenant();
    expect(await fallbackOf(key, {})).toBe('no_mask_set');
    await goLive('compass', tenant);
    expect(await fallbackOf(key, { model: `${MODEL.id}:dense` })).toBe('requested');
    expect(await fallbackOf(key, { mask: 'dense' })).toBe('requested');
    expect(await fallbackOf(key, { model: STRANGE })).toBe('model_mismatch');
    expect(await fallbackOf(key, say('  '))).toBe('empty_prompt');
    expect(await fallbackOf(key, { messages: [{ role: 'system', content: 'x' }] })).toBe('empty_prompt');
    expect(await fallbackOf(key, say('!fail'))).toBe('encoder_failed');
    expect(await fallbackOf(key, say('!short'))).toBe('encoder_failed');
    const response = await call('POST', '/v1/completions', {
      key,
      body: { model: MODEL.id, prompt: [1, 2] },
    });
    expect(response.headers.get('x-maskroute-fallback')).toBe('token_prompt');
  });

  it('says so when the encoder is slow, and does not wait for it', async () => {
    const { tenant, key } = await newTenant();
    await goLive('compass', tenant);
    const isolate = freshIsolate({ EMBED_TIMEOUT_MS: '50' });
    await chat(key, {}, isolate);
    const started = performance.now();
    expect(await fallbackOf(key, say('!hang'), isolate)).toBe('encoder_timeout');
    // The encoder is silent for ever.
    expect(performance.now() - started).toBeLessThan(10_000);
  });

  it('says so when the edge embeds with another encoder, or the similarity is too low', async () => {
    const { tenant, key } = await newTenant();
    await goLive('compass', tenant);
    expect(await fallbackOf(key, {}, freshIsolate({ HF_REVISION: 'r2' }))).toBe('encoder_mismatch');
    expect(await fallbackOf(key, {}, freshIsolate({ HF_DIMENSIONS: '8' }))).toBe('encoder_failed');
    const strict = freshIsolate({ SIMILARITY_MIN: '0.5' });
    expect(await fallbackOf(key, say('west'), strict)).toBe('low_similarity');
    expect((await chat(key, say('north'), strict)).headers.get('x-maskroute-cluster')).toBe('0');
  });

  it('says so when the backend cannot use the mask that routing chose, not when the client chose it', async () => {
    const { tenant, key } = await newTenant();
    const { set, version } = await goLive('compass', tenant);
    expect(await fallbackOf(key, { user: 'masks-unknown' })).toBe('unknown_mask');
    const response = await chat(key, { user: 'masks-unknown' });
    expect(response.headers.get('x-maskroute-version')).toBe(version);
    const body = await response.json();
    expect(body).toMatchObject({ maskroute: { fallback: 'unknown_mask', version } });
    const asked = chat(key, { user: 'masks-unknown', mask: set.clusters[0]!.mask });
    expect(await errorCode(asked)).toBe('400 unknown_mask');
  });

  it('asks again, where the backend cannot use the mask, in the time that is left', async () => {
    const { tenant, key } = await newTenant();
    await goLive('compass', tenant);
    const headers = { [BACKEND_HEADERS.deadline]: '2000' };
    const body = { ...CHAT, ...say('south'), user: 'masks-unknown' };
    const response = await call('POST', '/v1/chat/completions', { key, body, headers });
    expect(response.headers.get('x-maskroute-fallback')).toBe('unknown_mask');
    const left_ms = Number((await recorded(idOf(response)))!.headers[BACKEND_HEADERS.deadline]);
    expect(left_ms).toBeLessThanOrEqual(2000 - UNKNOWN_MASK_ms + 10);
  });

  it('asks again in no more time than that when the clock is set back meanwhile', async () => {
    const { tenant, key } = await newTenant();
    await goLive('compass', tenant);
    const headers = { [BACKEND_HEADERS.deadline]: '2000' };
    const { now } = Date;
    let back_ms = 0;
    // In Workers both are the system's clock.
    for (const clock of [Date, performance]) vi.spyOn(clock, 'now').mockImplementation(() => now() - back_ms);
    try {
      const body = { ...CHAT, ...say('south'), user: 'masks-unknown' };
      const asked = call('POST', '/v1/chat/completions', { key, body, headers });
      setTimeout(() => {
        back_ms = 3_600_000;
      }, UNKNOWN_MASK_ms / 2);
      const response = await asked;
      expect(response.headers.get('server-timing')).not.toContain('-');
      const left_ms = Number((await recorded(idOf(response)))!.headers[BACKEND_HEADERS.deadline]);
      expect(left_ms).toBeLessThanOrEqual(2000);
    } finally {
      vi.restoreAllMocks();
    }
  });

  it('passes the mask of a client through as it is', async () => {
    const { tenant, key } = await newTenant();
    const { set } = await goLive('compass', tenant);
    const id = set.clusters[2]!.mask;
    const byId = await chat(key, { mask: id });
    expect((await recorded(idOf(byId)))!.body).toMatchObject({ mask: id });
    expect(byId.headers.get('x-maskroute-mask')).toBe(id);
    expect(byId.headers.get('x-maskroute-sparsity')).toBe(String(2 / 12));
    const layers = { skipAttention: [3], skipFfn: [2] };
    const byLayers = await chat(key, { mask: layers });
    expect((await recorded(idOf(byLayers)))!.body).toMatchObject({ mask: layers });
    expect(byLayers.headers.get('x-maskroute-mask')).toBe(id);
    expect(byLayers.headers.get('x-maskroute-fallback')).toBeNull();
  });
});

describe('D1 on a bad day', () => {
  it.each(['failing', 'stalled'] as const)(
    '%s: the last good version is served, and only the first request waits',
    async (mood) => {
      const { tenant, key } = await newTenant();
      const { version } = await goLive('compass', tenant);
      const d1 = badD1();
      const isolate = freshIsolate({ DB: d1.DB });
      const first = await chat(key, {}, isolate);
      expect(first.headers.get('x-maskroute-version')).toBe(version);
      d1.be(mood);
      vi.useFakeTimers({ toFake: ['Date'], now: Date.now() + 4_000 });
      // The first may wait; ten more would wait for a second each.
      for (const [requests, wait_ms] of [
        [1, 8_000],
        [10, 8_000],
      ] as const) {
        const started = performance.now();
        for (let i = 0; i < requests; i++) {
          const response = await chat(key, {}, isolate);
          expect(response.headers.get('x-maskroute-version')).toBe(version);
          expect(response.headers.get('x-maskroute-cluster')).toBe('0');
        }
        expect(performance.now() - started).toBeLessThan(wait_ms);
      }
      vi.useRealTimers();
    },
  );

  it('goes dense in bounded time when nothing is known yet', async () => {
    const { tenant, key } = await newTenant();
    await goLive('compass', tenant);
    const d1 = badD1();
    const isolate = freshIsolate({ DB: d1.DB });
    await call('GET', '/v1/models', { key }, isolate);
    d1.be('stalled');
    const started = performance.now();
    const response = await chat(key, {}, isolate);
    // D1 itself would be silent for ever.
    expect(performance.now() - started).toBeLessThan(8_000);
    expect(response.headers.get('x-maskroute-fallback')).toBe('mask_set_unavailable');
    d1.be('good');
    await vi.waitFor(
      async () => expect((await chat(key, {}, isolate)).headers.get('x-maskroute-cluster')).toBe('0'),
      8_000,
    );
  });
});

describe('a stream', () => {
  it('comes through as it is made', async () => {
    const { tenant, key } = await newTenant();
    await goLive('compass', tenant);
    const started = performance.now();
    const response = await chat(key, { stream: true });
    expect(Object.fromEntries(response.headers)).toMatchObject(EVENT_STREAM_HEADERS);
    expect(response.headers.get('x-maskroute-cluster')).toBe('0');
    const times: number[] = [];
    let text = '';
    for await (const chunk of response.body!.pipeThrough(new TextDecoderStream())) {
      times.push(performance.now() - started);
      text += chunk;
    }
    // Its role, three tokens, its end, and the stream's.
    expect(text.match(/data: /g)).toHaveLength(6);
    expect(text.endsWith('data: [DONE]\n\n')).toBe(true);
    expect(times.at(-1)! - times[0]!).toBeGreaterThan(STREAM_PAUSE_ms);
  });

  it('that breaks off ends in an error event, after whole events only', async () => {
    const { key } = await newTenant();
    const response = await chat(key, { stream: true, user: 'die-mid-stream' });
    expect(response.status).toBe(200);
    const events = (await response.text()).split('\n\n');
    // The answer's role, and two tokens.
    expect(events).toHaveLength(5);
    for (const event of events.slice(0, 3))
      expect(JSON.parse(event.slice('data: '.length))).toBeTypeOf('object');
    expect(events[3]).toMatch(/^event: error\ndata: \{.*"code":"backend_error"/);
  });

  it('of the newer wire has errors of that wire: numbered, and of a type', async () => {
    const { key } = await newTenant();
    const ask = async (user: string) => {
      const body = { model: MODEL.id, input: 'north is cold', stream: true, user };
      const isolate = freshIsolate({ STREAM_KEEPALIVE_MS: '50' });
      const text = await (await call('POST', '/v1/responses', { key, body }, isolate)).text();
      return text.split('\n\n').flatMap((event) => {
        const at = event.indexOf('data: ');
        return at === -1 ? [] : [JSON.parse(event.slice(at + 'data: '.length))];
      });
    };
    // Begun, in progress, an item, its part, and two tokens.
    const events = await ask('die-mid-stream');
    expect(events.map(({ sequence_number }) => sequence_number)).toEqual([0, 1, 2, 3, 4, 5, 6]);
    const { error, ...fields } = events.at(-1);
    expect(fields).toMatchObject({
      type: 'error',
      code: 'backend_error',
      message: error.message,
      param: null,
    });
    expect(error).toMatchObject({ type: 'server_error', code: 'backend_error' });
    // Its status was sent before the backend refused it.
    const [late, ...others] = await ask('slow-refusal');
    expect(late).toMatchObject({ type: 'error', sequence_number: 0, code: 'model_not_found' });
    expect(others).toEqual([]);
  });
});

describe('a backend in trouble', () => {
  it.each([
    ['die', '503 backend_unreachable'],
    ['html', '502 backend_error'],
    ['empty', '502 backend_error'],
    ['bad-error', '502 backend_error'],
    ['half-whole', '502 backend_error'],
    ['unauthorized', '502 backend_error'],
    ['redirect', '502 backend_error'],
  ])('%s → %s, with the headers', async (user, expected) => {
    const { tenant, key } = await newTenant();
    await goLive('compass', tenant);
    // An isolate of its own: failures add up, and this is about one.
    const response = await chat(key, { user }, freshIsolate());
    expect(response.headers.get('x-maskroute-cluster')).toBe('0');
    expect(response.headers.get('retry-after')).toBe(expected.startsWith('503') ? '1' : null);
    expect(await errorCode(response)).toBe(expected);
  });

  it('that is not there is 503 with Retry-After', async () => {
    const { key } = await newTenant();
    const response = await chat(key, {}, freshIsolate({ BACKEND_URL: 'http://127.0.0.1:1' }));
    expect(response.headers.get('retry-after')).toBe('1');
    expect(await errorCode(response)).toBe('503 backend_unreachable');
  });

  it('that never answers is given up', async () => {
    const { key } = await newTenant();
    const response = await chat(key, { user: 'hang' }, freshIsolate({ BACKEND_TIMEOUT_MS: '100' }));
    expect(response.headers.get('x-should-retry')).toBe('false');
    expect([response.status, await response.json()]).toEqual([
      504,
      {
        error: expect.objectContaining({
          code: 'deadline_exceeded',
          message: 'No answer came within 100 ms. Stream an answer that takes longer.',
        }),
      },
    ]);
    // It stops by itself: it was told how long anybody waits.
    const { headers } = (await recorded(idOf(response)))!;
    expect(Number(headers[BACKEND_HEADERS.deadline])).toBeLessThanOrEqual(100);
  });

  it('that says why it refuses is passed on', async () => {
    const { key } = await newTenant();
    const full = await chat(key, { user: 'queue-full' });
    expect(full.headers.get('retry-after')).toBe('7');
    expect(await errorCode(full)).toBe('429 queue_full');
    expect(await errorCode(chat(key, { model: 'made-up' }))).toBe('404 model_not_found');
    const late = await chat(key, { user: 'deadline' }, freshIsolate());
    expect(late.headers.get('x-should-retry')).toBe('false');
    expect(await errorCode(late)).toBe('504 deadline_exceeded');
  });
});

describe('bad bodies', () => {
  const bytes = (...values: number[]) => new Uint8Array(values);

  it('leave nothing behind for the next one, which may begin with a byte order mark', async () => {
    const { key } = await newTenant();
    const cut = bytes(0x22, 0xf0, 0x9f);
    const text = JSON.stringify({ ...CHAT, messages: [{ role: 'user', content: 'Grüße 🙂' }] });
    const whole = new TextEncoder().encode(`\ufeff${text}`);
    const body = (sent: Uint8Array) => call('POST', '/v1/chat/completions', { key, body: sent });
    for (let i = 0; i < 2; i++) {
      expect((await body(cut)).status).toBe(400);
      const response = await body(whole);
      expect(response.status).toBe(200);
      const { messages } = (await recorded(idOf(response)))!.body as { messages: { content: string }[] };
      expect(messages[0]!.content).toBe('Grüße 🙂');
    }
  });

  const big = new Uint8Array(10 * 1024 * 1024).fill(0x20);
  const nested = `${'['.repeat(100_000)}${']'.repeat(100_000)}`;
  const fields = Object.fromEntries(Array.from({ length: 60_000 }, (_, i) => [`f${i}`, 'x']));

  it.each<[string, unknown, string]>([
    ['nothing', '', '400 invalid_json'],
    ['not JSON', '{"model": no}', '400 invalid_json'],
    ['a number that JSON does not have', '{"model": NaN}', '400 invalid_request'],
    ['invalid UTF-8', bytes(0x7b, 0x22, 0xff, 0xfe, 0x22, 0x7d), '400 invalid_json'],
    ['a surrogate cut in half', bytes(0x22, 0xf0, 0x9f), '400 invalid_json'],
    ['10 MB', big, '413 body_too_large'],
    ['deep nesting', `{"model":"m","metadata":${nested}}`, '400 invalid_json'],
    ['60,000 fields', { ...CHAT, metadata: fields }, '413 body_too_large'],
    ['60,000 empty objects', { ...CHAT, metadata: Array(60_000).fill({}) }, '413 body_too_large'],
    ['an array', [], '400 invalid_request'],
    ['null', 'null', '400 invalid_request'],
    ['no messages', { model: 'm' }, '400 invalid_request'],
    ['empty messages', { ...CHAT, messages: [] }, '400 invalid_request'],
    ['messages of the wrong type', { ...CHAT, messages: 'hi' }, '400 invalid_request'],
    ['a role that is none', { ...CHAT, messages: [{ role: 'king', content: 'x' }] }, '400 invalid_request'],
    ['a negative max_tokens', { ...CHAT, max_tokens: -1 }, '400 invalid_request'],
    ['a max_tokens of text', { ...CHAT, max_tokens: '5' }, '400 invalid_request'],
    [
      'an infinite temperature',
      '{"model":"m","messages":[{"role":"user"}],"temperature":1e999}',
      '400 invalid_request',
    ],
    ['a temperature of text', { ...CHAT, temperature: 'NaN' }, '400 invalid_request'],
    ['a mask that is none', { ...CHAT, mask: 'm_xyz' }, '400 invalid_request'],
    ['tools', { ...CHAT, tools: [{}] }, '400 invalid_request'],
  ])('%s', async (_what, body, expected) => {
    const { key } = await newTenant();
    const response = await call('POST', '/v1/chat/completions', { key, body });
    expect(response.headers.get('x-request-id')).toMatch(/^req_/);
    expect(await errorCode(response)).toBe(expected);
  });

  it('name the field', async () => {
    const { key } = await newTenant();
    const response = await chat(key, { messages: [{ role: 'user', content: 5 }] });
    expect(await response.json()).toMatchObject({ error: { param: 'messages[0].content' } });
  });

  it('of 10 MB are refused without a length too', async () => {
    const { key } = await newTenant();
    const body = new Blob([big]).stream();
    expect(await errorCode(call('POST', '/v1/chat/completions', { key, body }))).toBe('413 body_too_large');
  });

  it('in another media type are refused', async () => {
    const { key } = await newTenant();
    const headers = { 'content-type': 'application/x-www-form-urlencoded' };
    const answer = call('POST', '/v1/chat/completions', { key, body: 'model=m', headers });
    expect(await errorCode(answer)).toBe('415 unsupported_media_type');
  });

  it('that are compressed are refused', async () => {
    const { key } = await newTenant();
    const packed = new Blob([JSON.stringify(CHAT)]).stream().pipeThrough(new CompressionStream('gzip'));
    const body = new Uint8Array(await new Response(packed).arrayBuffer());
    const headers = { 'content-encoding': 'gzip' };
    // The second one only says that it is compressed.
    for (const sent of [body, CHAT]) {
      const answer = call('POST', '/v1/chat/completions', { key, body: sent, headers });
      expect(await errorCode(answer)).toBe('415 unsupported_media_type');
    }
  });

  it('with 100,000 words are routed by their beginning', async () => {
    const { tenant, key } = await newTenant();
    await goLive('compass', tenant);
    const response = await chat(key, say(`east ${'word '.repeat(100_000)}`));
    expect(response.headers.get('x-maskroute-cluster')).toBe('1');
  });
});

it('answers wrong paths and methods with a reason', async () => {
  expect(await errorCode(call('GET', '/v1/nothing'))).toBe('404 not_found');
  const wrong = await call('GET', '/v1/chat/completions');
  expect(wrong.headers.get('allow')).toBe('POST');
  expect(await errorCode(wrong)).toBe('405 method_not_allowed');
});

it('a worker without its secrets answers 503 and does not say what is missing', async () => {
  const isolate = freshIsolate({ BACKEND_KEY: 'short' });
  const response = await chat('mr_live_any', {}, isolate);
  const text = await response.clone().text();
  expect(text).not.toContain('BACKEND_KEY');
  expect(await errorCode(response)).toBe('503 configuration_unavailable');
  expect((await call('GET', '/readyz', {}, isolate)).status).toBe(503);
  expect((await call('GET', '/healthz', {}, isolate)).status).toBe(200);
  expect(env.BACKEND_KEY).toBe(BACKEND_KEY);
});

describe('what a backend is sent says the same as the client’s body and what was added, of', () => {
  const ADDED = { mask: 'm_1', maskroute: { cluster: 3, label: '"}' } };
  const plainly = (value: object) => JSON.parse(JSON.stringify({ ...value, ...ADDED }));
  const forwarded = (text: string) => JSON.parse(forwardedBody({ value: JSON.parse(text), text }, ADDED));

  it.each([
    '{"model":"a"}',
    ' {\n "model" : "a" , "x" : {} } \n\t',
    '{"model":"a","model":"b","content":"}} {\\"mask\\": 1"}',
    '{"model":"a","mask":null,"maskroute":{"cluster":9}}',
    '{"mask":"m_2","model":"a","mask":"m_3"}',
    '{"model":"\\ud800 🙂","__proto__":{"mask":1},"n":1e3}',
  ])('%s', (text) => {
    expect(forwarded(text)).toEqual(plainly(JSON.parse(text)));
  });

  it('any other', () => {
    fc.assert(
      fc.property(fc.dictionary(fc.string(), fc.jsonValue(), { minKeys: 1 }), fc.nat(4), (value, indent) => {
        const text = JSON.stringify(value, null, indent);
        expect(forwarded(text)).toEqual(plainly(JSON.parse(text)));
      }),
    );
  });
});
