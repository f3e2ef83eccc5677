/** The endpoints beside the completions. */
import { env } from 'cloudflare:workers';
import { afterEach, describe, expect, it, vi } from 'vitest';
import { GROUPS } from '../../../shared/openapi/endpoints.ts';
import { dryRunSchema } from '../../../shared/wire/openai.ts';
import { maskRecordSchema } from '../../../shared/wire/protocol.ts';
import {
  createSigner,
  importTokenKey,
  signToken,
  type TokenPurpose,
} from '../../../shared/wire/service-token.ts';
import { parseConfig } from '../../../workers/env.ts';
import { EVENTS } from '../../../workers/limits.ts';
import { ADMIN_KEY, BACKEND_KEY, EDGE_URL, ENCODER, MODEL } from '../../support/edge/constants.ts';
import { interceptedD1 } from '../../support/intercepted-d1.ts';
import {
  admin,
  badD1,
  CHAT,
  call,
  chat,
  errorCode,
  freshIsolate,
  goLive,
  later,
  newKey,
  newTenant,
  recorded,
  say,
  soon,
} from '../support/edge.ts';

const messageOf = async (answer: Promise<Response>) =>
  ((await (await answer).json()) as { error: { message: string } }).error.message;

type ReadyAnswer = { status: string; checks: Record<string, string>; routing_table_age_s: number | null };

afterEach(() => {
  vi.useRealTimers();
});

describe('the dry run', () => {
  it('tells the whole decision and asks no backend for an answer', async () => {
    const { tenant, key } = await newTenant();
    const { set, version } = await goLive('compass', tenant);
    const headers = { 'x-request-id': `dry-${tenant}` };
    const body = { ...CHAT, ...say('east of here') };
    const response = await call('POST', '/v1/route', { key, body, headers });
    expect(response.status).toBe(200);
    const decision = dryRunSchema.parse(await response.json());
    expect(decision).toMatchObject({
      object: 'maskroute.route',
      request_id: headers['x-request-id'],
      model: MODEL.id,
      mask: set.clusters[1]!.mask,
      skip: { attention: [2], ffn: [2] },
      label: 'east',
      distance: 0,
      encoder: ENCODER,
      maskroute: { mask_set: 'compass', version, cluster: 1, similarity: 1, fallback: null },
    });
    expect(decision.sparsity).toBeCloseTo(1 / 6);
    expect(response.headers.get('x-maskroute-cluster')).toBe('1');
    expect(response.headers.get('server-timing')).toMatch(/^assign;.*embed;.*route;dur=[\d.]+$/);
    expect(await recorded(headers['x-request-id'])).toBeNull();
  });

  it('decides as a completion does, for both bodies', async () => {
    const { tenant, key } = await newTenant();
    await goLive('compass', tenant);
    const route = async (body: object) =>
      dryRunSchema.parse(await (await call('POST', '/v1/route', { key, body })).json());
    expect((await route({ model: MODEL.id, prompt: 'south' })).maskroute.cluster).toBe(2);
    expect((await route({ model: MODEL.id, prompt: [[1, 2]] })).maskroute.fallback).toBe('token_prompt');
    const dense = await route({ ...CHAT, model: `${MODEL.id}:dense` });
    expect(dense).toMatchObject({ mask: 'dense', skip: { attention: [], ffn: [] }, encoder: null });
    const custom = await route({ ...CHAT, mask: { skipAttention: [1] } });
    expect(custom).toMatchObject({ mask: { skipAttention: [1], skipFfn: [] }, skip: { attention: [1] } });
    expect(await errorCode(call('POST', '/v1/route', { key, body: { model: 'm' } }))).toBe(
      '400 invalid_request',
    );
    expect(await errorCode(call('POST', '/v1/route', { body: CHAT }))).toBe('401 invalid_api_key');
  });
});

describe('the model list', () => {
  it('has each model and its dense name', async () => {
    const { key } = await newTenant();
    const list = await (await call('GET', '/v1/models', { key })).json<{ data: { id: string }[] }>();
    expect(list).toMatchObject({
      object: 'list',
      data: [
        { id: MODEL.id, maskroute: { dense: false, hash: MODEL.hash } },
        { id: `${MODEL.id}:dense`, maskroute: { dense: true } },
      ],
    });
    const one = await call('GET', `/v1/models/${MODEL.id}:dense`, { key });
    expect(await one.json()).toEqual(list.data[1]);
    const nothing = await call('GET', '/v1/models/nothing', { key });
    expect([nothing.status, await nothing.json()]).toEqual([
      404,
      // As a backend says it.
      { error: expect.objectContaining({ code: 'model_not_found', param: 'model' }) },
    ]);
  });

  it('is 503 when no backend can be asked and none ever was', async () => {
    const { key } = await newTenant();
    const isolate = freshIsolate({ BACKEND_URL: 'http://127.0.0.1:1' });
    for (const asked of [
      call('GET', '/v1/models', { key }, isolate),
      call('GET', '/admin/v1/models', { key: ADMIN_KEY }, isolate),
    ]) {
      expect(await errorCode(asked)).toBe('503 backend_unreachable');
    }
  });
});

describe('feedback', () => {
  it('is taken once a caller and completion', async () => {
    const { tenant, key } = await newTenant();
    const send = (body: unknown, by = key) => call('POST', '/v1/feedback', { key: by, body });
    const { id } = await (await chat(key)).json<{ id: string }>();
    const first = await send({ id, rating: 1, comment: 'good' });
    expect(first.status).toBe(201);
    expect(await errorCode(send({ id, rating: -1 }))).toBe('409 conflict');
    const { key: second } = await newKey({ tenant });
    expect((await send({ id, rating: -1 }, second)).status).toBe(201);
    const rows = await env.DB.prepare(
      'select rating, comment from feedback where tenant_id = ? order by rating',
    )
      .bind(tenant)
      .all();
    expect(rows.results).toEqual([
      { rating: -1, comment: null },
      { rating: 1, comment: 'good' },
    ]);
  });

  it("is for one's own completions only", async () => {
    const { key } = await newTenant();
    const { id } = await (await chat(key)).json<{ id: string }>();
    expect(id).toMatch(/^chatcmpl-[0-9a-f]{20}\.[0-9a-f]{16}$/);
    const { key: stranger } = await newTenant();
    const forged = id.replace(/.$/, (last) => (last === '0' ? '1' : '0'));
    const [by, other] = [key, stranger];
    for (const [who, what] of [
      [other, id],
      [by, forged],
      [by, 'chatcmpl-1'],
    ] as const) {
      const answer = call('POST', '/v1/feedback', { key: who, body: { id: what, rating: 1 } });
      expect(await errorCode(answer)).toBe('404 not_found');
    }
  });

  it('comes too late when what it would be counted under is forgotten', async () => {
    const { tenant, key } = await newTenant();
    const { id } = await (await chat(key)).json<{ id: string }>();
    const rate = () => call('POST', '/v1/feedback', { key, body: { id, rating: 1 } });
    later(EVENTS.counted_ms + 1_000);
    expect(await errorCode(rate())).toBe('404 not_found');
    vi.useRealTimers();
    const rows = await env.DB.prepare('select 1 from feedback where tenant_id = ?').bind(tenant).all();
    expect(rows.results).toEqual([]);
    expect((await rate()).status).toBe(201);
  });

  it('goes on without its client, until it is counted', async () => {
    const { key } = await newTenant();
    const { id } = await (await chat(key)).json<{ id: string }>();
    const d1 = badD1();
    const held: Promise<unknown>[] = [];
    const sent: unknown[] = [];
    const EVENTS = { sendBatch: async (messages: Iterable<unknown>) => sent.push(...messages) };
    const isolate = freshIsolate({ DB: d1.DB, EVENTS: EVENTS as never }, (work) => held.push(work));
    await call('GET', '/v1/models', { key }, isolate);
    held.length = 0;
    d1.be('slow');
    const asked = d1.asked();
    const answer = call('POST', '/v1/feedback', { key, body: { id, rating: 1 } }, isolate);
    await soon(() => expect(d1.asked()).toBeGreaterThan(asked));
    // The question to D1 is under way; were the client to leave now, this alone would go on.
    expect(held).toHaveLength(1);
    await Promise.all(held);
    expect(sent).toMatchObject([{ body: { kind: 'rating', rating: 1 } }]);
    expect((await answer).status).toBe(201);
  });

  it('of the wrong form is refused, and lost to nobody when D1 is down', async () => {
    const { key } = await newTenant();
    for (const body of [
      {},
      { id: 'x', rating: 0 },
      { id: 'x', rating: '1' },
      { id: '', rating: 1 },
      { id: 'a b', rating: 1 },
    ]) {
      expect(await errorCode(call('POST', '/v1/feedback', { key, body }))).toBe('400 invalid_request');
    }
    const d1 = badD1();
    const isolate = freshIsolate({ DB: d1.DB });
    const { id } = await (await chat(key, {}, isolate)).json<{ id: string }>();
    d1.be('failing');
    const answer = call('POST', '/v1/feedback', { key, body: { id, rating: 1 } }, isolate);
    expect(await errorCode(answer)).toBe('503 configuration_unavailable');
  });
});

describe('the mask endpoint for backends', () => {
  const sign = createSigner(BACKEND_KEY);
  /** As a backend signs it, but for what is changed. */
  const token = (change: Partial<TokenPurpose> = {}) =>
    sign({ tenant: '', edge: '', audience: EDGE_URL, scope: 'masks', ...change });
  const ask = async (id: string, key?: string, isolate?: ReturnType<typeof freshIsolate>) =>
    await call('GET', `/internal/v1/masks/${id}`, { key: key ?? (await token()) }, isolate);

  it('gives what a mask id means, to backends', async () => {
    const { set } = await goLive('compass');
    const { mask, bits } = set.clusters[0]!;
    const response = await ask(mask);
    expect(maskRecordSchema.parse(await response.json())).toEqual({
      id: mask,
      modelHash: MODEL.hash,
      blockCount: MODEL.blockCount,
      bits,
      surrogates: null,
    });
    expect(response.headers.get('cache-control')).toContain('immutable');
    for (const id of [`m_${'0'.repeat(24)}`, 'dense', 'm_1', '..%2f..']) {
      expect(await errorCode(ask(id)), id).toBe('404 not_found');
    }
    const { key } = await newTenant();
    expect(await errorCode(ask(mask, key))).toBe('401 invalid_api_key');
  });

  it('asks D1 for no mask whose id is none', async () => {
    const d1 = badD1();
    const isolate = freshIsolate({ DB: d1.DB });
    d1.be('failing');
    expect(await errorCode(ask('m_1', undefined, isolate))).toBe('404 not_found');
    expect(await errorCode(ask(`m_${'0'.repeat(24)}`, undefined, isolate))).toBe(
      '503 configuration_unavailable',
    );
  });

  it('takes a token for masks and for this edge alone, and never the key that signs it', async () => {
    const other = createSigner('another-backend-key-000000000');
    const now_s = Math.floor(Date.now() / 1000);
    const late = { issuedAt_s: now_s - 600, expiresAt_s: now_s - 540, nonce: 'nonce-of-a-late-one' };
    const claims = { tenant: '', edge: '', audience: EDGE_URL, scope: 'masks', ...late } as const;
    for (const [key, refused] of [
      [BACKEND_KEY, '401 invalid_api_key'],
      // What the edge signs for a backend's requests and jobs.
      [await token({ scope: undefined }), '401 invalid_api_key'],
      [await token({ scope: 'jobs' }), '401 invalid_api_key'],
      [await token({ audience: 'http://localhost:6666' }), '401 invalid_api_key'],
      [await token({ audience: `${EDGE_URL}.evil.test` }), '401 invalid_api_key'],
      [await token({ audience: undefined }), '401 invalid_api_key'],
      [await other(claims), '401 invalid_api_key'],
      [await signToken(await importTokenKey(BACKEND_KEY), claims), '401 expired_token'],
    ] as const) {
      expect(await errorCode(ask(`m_${'0'.repeat(24)}`, key)), refused).toBe(refused);
    }
    const spelled = await token({ audience: `${EDGE_URL.toUpperCase()}:443/` });
    expect(await errorCode(ask(`m_${'0'.repeat(24)}`, spelled))).toBe('404 not_found');
  });

  it('lets nobody in where nobody said what its own address is, whatever address it is asked at', async () => {
    const isolate = freshIsolate({ EDGE_URL: '' });
    const key = await token();
    expect(await errorCode(ask(`m_${'0'.repeat(24)}`, key, isolate))).toBe('503 configuration_unavailable');
    expect(await errorCode(ask(`m_${'0'.repeat(24)}`, BACKEND_KEY, isolate))).toBe('401 invalid_api_key');
  });

  it('answers for live sets while D1 is down, and says 503 for the rest', async () => {
    const { tenant, key } = await newTenant();
    const { set } = await goLive('compass', tenant);
    const d1 = badD1();
    const isolate = freshIsolate({ DB: d1.DB });
    await call('POST', '/v1/route', { key, body: CHAT }, isolate);
    d1.be('failing');
    expect((await ask(set.clusters[0]!.mask, undefined, isolate)).status).toBe(200);
    expect(await errorCode(ask(`m_${'0'.repeat(24)}`, undefined, isolate))).toBe(
      '503 configuration_unavailable',
    );
  });
});

describe('the id of a request', () => {
  it('is with every answer, whichever way it came', async () => {
    const { key } = await newTenant();
    const asked: [method: string, path: string, key: string | undefined, status: number][] = [
      ['POST', '/v1/chat/completions', key, 200],
      ['POST', '/v1/chat/completions', 'mr_wrong', 401],
      ['GET', '/v1/chat/completions', key, 405],
      ['GET', '/v1/models', key, 200],
      ['GET', '/healthz', undefined, 200],
      ['GET', '/readyz', undefined, 200],
      ['GET', '/v1/nothing', key, 404],
    ];
    for (const [method, path, of, status] of asked) {
      const id = crypto.randomUUID();
      const response = await call(method, path, {
        ...(of === undefined ? {} : { key: of }),
        ...(method === 'POST' ? { body: CHAT } : {}),
        headers: { 'x-request-id': id },
      });
      expect([path, response.status, response.headers.get('x-request-id')]).toEqual([path, status, id]);
      await response.arrayBuffer();
    }
  });
});

describe('health', () => {
  it('tells live from ready, with reasons', async () => {
    expect(await (await call('GET', '/healthz')).json()).toEqual({ status: 'live' });
    const ready = await call('GET', '/readyz');
    expect(ready.status).toBe(200);
    expect(await ready.json()).toMatchObject({ status: 'ready', checks: { backend: 'ok', encoder: 'ok' } });
    const checks = async (overrides: Parameters<typeof freshIsolate>[0]) => {
      const response = await call('GET', '/readyz', {}, freshIsolate(overrides));
      expect(response.status).toBe(503);
      return (await response.json<{ checks: Record<string, string> }>()).checks;
    };
    const d1 = badD1();
    d1.be('failing');
    expect((await checks({ DB: d1.DB })).routing_table).toMatch(/database/);
    expect((await checks({ BACKEND_URL: 'http://127.0.0.1:1' })).backend).toMatch(/no backend/);
    expect((await checks({ ENCODER: 'workers-ai' })).encoder).toMatch(/cannot be loaded/);
    expect((await checks({ ADMIN_KEY: '' })).configuration).toMatch(/variable/);
  });

  it('names in the log each variable that is missing or empty', () => {
    const configure = () => parseConfig({ ...env, BACKEND_URL: '', BACKEND_KEY: '', ADMIN_KEY: '' });
    const all = 'BACKEND_URL: it is missing; BACKEND_KEY: it is missing; ADMIN_KEY: it is missing';
    expect(configure).toThrow(expect.objectContaining({ cause: new Error(all) }));
  });

  it.each(['stalled', 'failing'] as const)(
    'names a database that is %s, stays ready with the table that it has, and not for ever',
    async (mood) => {
      const d1 = badD1();
      const isolate = freshIsolate({ DB: d1.DB });
      const ask = async () => {
        const asked_ms = performance.now();
        const response = await call('GET', '/readyz', {}, isolate);
        // The database may be silent for ever.
        expect(performance.now() - asked_ms).toBeLessThan(10_000);
        return { code: response.status, ...(await response.json<ReadyAnswer>()) };
      };
      const good = await ask();
      expect(good).toMatchObject({ code: 200, status: 'ready', checks: { database: 'ok' } });
      // A busy machine takes a second or two to answer.
      expect(good.routing_table_age_s).toBeLessThan(10);
      d1.be(mood);
      later(10_000);
      const lost_ms = Date.now();
      await ask();
      vi.setSystemTime(Date.now() + 20_000);
      const stale = await ask();
      expect(stale).toMatchObject({ code: 200, status: 'ready', checks: { routing_table: 'ok' } });
      expect(stale.routing_table_age_s).toBeGreaterThanOrEqual(30);
      const since = /^unreachable since (\S+)$/.exec(stale.checks.database!)![1]!;
      expect(Math.abs(Date.parse(since) - lost_ms)).toBeLessThan(2_000);

      vi.setSystemTime(Date.now() + 3_600_000);
      const tooOld = await ask();
      expect(tooOld).toMatchObject({ code: 503, status: 'not_ready' });
      expect(tooOld.checks.routing_table).toMatch(/older than 3600 s/);
      d1.be('good');
      vi.setSystemTime(Date.now() + 5_000);
      await vi.waitFor(async () => {
        vi.setSystemTime(Date.now() + 2_000);
        expect(await ask()).toMatchObject({ code: 200, checks: { database: 'ok', routing_table: 'ok' } });
      }, 10_000);
    },
  );
});

describe('a page of another origin', () => {
  const PAGE = 'https://app.example.com';
  const open = freshIsolate({ ALLOWED_ORIGINS: `${PAGE}, http://localhost:3000` });
  const exposed = (response: Response) =>
    response.headers.get('access-control-expose-headers')?.toLowerCase().split(',') ?? [];
  const preflight = (path: string, origin: string, isolate?: typeof open) =>
    call(
      'OPTIONS',
      path,
      {
        headers: {
          origin,
          'access-control-request-method': 'POST',
          'access-control-request-headers': 'authorization,content-type,x-stainless-lang,x-stainless-new',
        },
      },
      isolate,
    );

  it('may ask where it is allowed to, with any header and without cookies', async () => {
    const asked = await preflight('/v1/chat/completions', PAGE, open);
    expect(asked.status).toBe(204);
    const header = (name: string) => asked.headers.get(`access-control-${name}`);
    expect(header('allow-origin')).toBe(PAGE);
    expect(header('allow-headers')).toBe('authorization,content-type,x-stainless-lang,x-stainless-new');
    expect(header('allow-methods')).toContain('POST');
    expect(Number(header('max-age'))).toBeGreaterThan(0);
    expect(header('allow-credentials')).toBeNull();
    expect(asked.headers.get('vary')).toContain('Origin');
    const foreign = [
      'https://evil.test',
      'https://app.example.com.evil.test',
      'http://app.example.com',
      'null',
    ];
    for (const origin of foreign) {
      const refused = await preflight('/v1/chat/completions', origin, open);
      expect(refused.headers.get('access-control-allow-origin'), origin).toBeNull();
    }
  });

  it('reads answers, streams and errors, with their headers', async () => {
    const { tenant, key } = await newTenant();
    await goLive('cors', tenant);
    const ask = (path: string, body: object, bearer: string | undefined, method = 'POST') => {
      const headers = { origin: PAGE };
      const options = { ...(bearer && { key: bearer }), headers, ...(method === 'POST' && { body }) };
      return call(method, path, options, open);
    };
    const answers = [
      [200, await ask('/v1/chat/completions', CHAT, key)],
      [200, await ask('/v1/chat/completions', { ...CHAT, stream: true }, key)],
      [200, await ask('/v1/route', CHAT, key)],
      [200, await ask('/v1/models', {}, key, 'GET')],
      [400, await ask('/v1/chat/completions', { ...CHAT, messages: 'x' }, key)],
      [401, await ask('/v1/chat/completions', CHAT, 'mr_live_wrong')],
      [401, await ask('/v1/chat/completions', CHAT, undefined)],
      [404, await ask('/v1/nothing', CHAT, key)],
    ] as const;
    for (const [status, answer] of answers) {
      expect(answer.status).toBe(status);
      expect(answer.headers.get('access-control-allow-origin')).toBe(PAGE);
      expect(answer.headers.get('vary')).toContain('Origin');
      const readable = exposed(answer);
      // `x-accel-buffering` is for proxies.
      const ofInterest = /^(x-(?!accel-buffering)|server-timing|retry-after)/;
      const own = [...answer.headers.keys()].filter((name) => ofInterest.test(name));
      for (const name of own) expect(readable, name).toContain(name);
      await answer.arrayBuffer();
    }
    expect(exposed(answers[0][1])).toEqual(
      expect.arrayContaining(['x-request-id', 'x-maskroute-mask', 'server-timing', 'retry-after']),
    );
    expect(answers[0][1].headers.get('x-maskroute-mask')).toMatch(/^m_/);
  });

  it('never reaches the admin API, and nothing where no origin is named', async () => {
    for (const path of ['/admin/v1/tenants', '/dashboard/session', '/internal/v1/masks/x']) {
      const refused = await preflight(path, PAGE, open);
      expect(refused.headers.get('access-control-allow-origin'), path).toBeNull();
    }
    const off = await preflight('/v1/chat/completions', PAGE);
    expect(await errorCode(off)).toBe('405 method_not_allowed');
    const { key } = await newTenant();
    const answer = await call('GET', '/v1/models', { key, headers: { origin: PAGE } });
    const told = [...answer.headers.keys()].filter(
      (name) => name.startsWith('access-control') || name === 'vary',
    );
    expect(told).toEqual([]);
  });

  it('may be any, and a wrong list is named by /readyz', async () => {
    const any = await preflight('/v1/models', 'https://any.test', freshIsolate({ ALLOWED_ORIGINS: '*' }));
    expect(any.headers.get('access-control-allow-origin')).toBe('*');
    for (const wrong of ['app.example.com', `${PAGE}/`, `${PAGE}/path`, 'https://*.example.com', 'null']) {
      const answer = await call('GET', '/readyz', {}, freshIsolate({ ALLOWED_ORIGINS: wrong }));
      expect([wrong, answer.status]).toEqual([wrong, 503]);
    }
  });
});

describe('the admin API', () => {
  it('refuses bodies of the wrong form with the field', async () => {
    const wrong: [string, unknown][] = [
      ['/tenants', {}],
      ['/tenants', { id: 'UPPER', name: 'x' }],
      ['/tenants', { id: 'ok', name: '' }],
      ['/tenants', { id: 'ok', name: 'x', routing_policy: 'random' }],
      ['/tenants', { id: 'ok', name: 'x', more: 1 }],
      ['/keys', { name: 'x' }],
      ['/keys', { name: 'x', kind: 'admin', tenant: 'a' }],
      ['/keys', { name: 'x', tenant: 'a', expires_at: 'tomorrow' }],
      ['/keys', 'null'],
    ];
    for (const [path, body] of wrong) {
      expect(await errorCode(admin('POST', path, body)), JSON.stringify(body)).toBe('400 invalid_request');
    }
    expect(await errorCode(admin('POST', '/keys', { name: 'x', tenant: 'nobody' }))).toBe('404 not_found');
  });

  it.each([
    ['/publications', { version: `v_${'0'.repeat(24)}` }],
    ['/publications/rollback', {}],
    ['/publications/pause', {}],
    ['/publications/resume', {}],
    ['/experiments', { id: 'astray', variants: [] }],
    ['/keys', { kind: 'viewer', name: 'x' }],
    ['/backends/default/jobs/job_0123456789abcdef01234567/store', {}],
  ])('refuses a tenant in the query of %s, whose body names it', async (path, body) => {
    const response = await admin('POST', `${path}?tenant=acme`, body);
    expect(response.status).toBe(400);
    expect(await response.json()).toMatchObject({
      error: {
        param: 'tenant',
        message: 'tenant: this request takes no query; name the tenant in its body.',
      },
    });
  });

  const withoutQuery = GROUPS.flatMap(({ caller, endpoints }) =>
    endpoints.filter(({ query }) => caller === 'admin' && query === undefined),
  );
  it.each(withoutQuery)(
    'refuses a query at $method $path, which has none in the document',
    async (endpoint) => {
      const path = endpoint.path.replace('/admin/v1', '').replaceAll(/\{\w+\}/g, 'default');
      const hasBody = typeof endpoint.body === 'object';
      const response = await admin(endpoint.method, `${path}?nobody=1`, hasBody ? {} : undefined);
      const { error } = await response.json<{ error: { param: string; message: string } }>();
      expect([response.status, error.param]).toEqual([400, 'nobody']);
      expect(error.message).toMatch(/^nobody: this request takes no query/);
    },
  );

  it('says of a path or method that it lacks what it says without a query', async () => {
    expect(await errorCode(admin('GET', '/nothing?nobody=1'))).toBe('404 not_found');
    expect(await errorCode(admin('DELETE', '/tenants?nobody=1'))).toBe('405 method_not_allowed');
  });

  it('says of a wrong time, limit or cursor what it may be, and nothing else', async () => {
    const key = { name: 'x', tenant: 'a', expires_at: 'tomorrow' };
    expect(await messageOf(admin('POST', '/keys', key))).toBe(
      'expires_at: expected a time such as 2026-01-31T12:00:00Z.',
    );
    const asked = {
      '/usage?from=soon': 'from: expected a date such as 2026-01-31.',
      '/usage?from=2026-02-02&to=2026-02-01': 'from: must not be later than to.',
      '/usage?after=soon': 'after: expected the next of an earlier answer.',
      '/keys?limit=many': 'limit: expected a number, got other text.',
      '/requests?status=failed':
        'status: there is no such field here, only q, limit, before, tenant, sort, outcome, from.',
    };
    for (const [path, message] of Object.entries(asked)) {
      expect([path, await messageOf(admin('GET', path))]).toEqual([path, message]);
    }
  });

  it('names the methods of a path that is asked with another', async () => {
    const told = async (method: string, path: string) => {
      const answer = await call(method, path, { key: ADMIN_KEY, headers: { origin: EDGE_URL } });
      const { error } = (await answer.json()) as { error: { code: string } };
      return [path, answer.status, error.code, answer.headers.get('allow')];
    };
    for (const [method, path, allow] of [
      ['DELETE', '/admin/v1/tenants', 'GET, POST'],
      ['DELETE', '/admin/v1/tenants/nobody', 'GET, PATCH'],
      ['GET', '/admin/v1/publications/rollback', 'POST'],
      ['DELETE', '/v1/models/nobody', 'GET'],
      ['POST', '/healthz', 'GET'],
    ] as const) {
      expect(await told(method, path)).toEqual([path, 405, 'method_not_allowed', allow]);
    }
    expect(await told('GET', '/admin/v1/nothing')).toEqual(['/admin/v1/nothing', 404, 'not_found', null]);
  });

  it('guesses the path of a client whose base address lacks /v1', async () => {
    const { key } = await newTenant();
    expect(await messageOf(call('POST', '/chat/completions', { key, body: say('north') }))).toBe(
      'There is no POST /chat/completions; did you mean `/v1/chat/completions`?',
    );
    expect(await messageOf(call('GET', '/nothing', { key }))).toBe('There is no GET /nothing.');
  });

  it('refuses a tenant that is there already', async () => {
    const { tenant } = await newTenant();
    const again = admin('POST', '/tenants', { id: tenant, name: 'x' });
    expect(await errorCode(again)).toBe('409 conflict');
  });

  it('has no answer that a cache may keep, new keys, refusals and sessions included', async () => {
    const { tenant, keyId } = await newTenant();
    const asked: [method: string, path: string, status: number, body?: object][] = [
      ['POST', '/admin/v1/keys', 201, { name: 'x', kind: 'tenant', tenant }],
      ['POST', `/admin/v1/keys/${keyId}/rotate`, 201, {}],
      ['GET', '/admin/v1/keys', 200],
      ['GET', '/admin/v1/tenants/nobody', 404],
      ['GET', '/admin/v1/nothing', 404],
      ['POST', '/admin/v1/tenants', 400, {}],
      ['POST', '/dashboard/session', 200, { key: ADMIN_KEY }],
      ['POST', '/dashboard/session', 400, {}],
      ['DELETE', '/dashboard/session', 204],
      ['PUT', '/dashboard/session', 405],
      ['GET', '/readyz', 200],
    ];
    for (const [method, path, status, body] of asked) {
      const headers = { origin: EDGE_URL };
      const response = await call(method, path, { key: ADMIN_KEY, headers, ...(body && { body }) });
      const what = `${method} ${path}`;
      expect([what, response.status]).toEqual([what, status]);
      expect([what, response.headers.get('cache-control')]).toEqual([what, 'no-store']);
    }
    const refused = await call('GET', '/admin/v1/keys');
    expect([refused.status, refused.headers.get('cache-control')]).toEqual([401, 'no-store']);
  });

  it('has the time at which it answers, however long that took: the dashboard sets its clock by it', async () => {
    const DB = interceptedD1(env.DB, (question) => {
      vi.setSystemTime(Date.now() + 4_000);
      return question();
    });
    const started_ms = Math.floor(Date.now() / 1000) * 1000;
    vi.useFakeTimers({ toFake: ['Date'], now: started_ms });
    const response = await call('GET', '/admin/v1/tenants', { key: ADMIN_KEY }, freshIsolate({ DB }));
    expect(response.status).toBe(200);
    expect(Date.now()).toBeGreaterThan(started_ms);
    expect(response.headers.get('date')).toBe(new Date().toUTCString());
  });

  it('is closed to everyone without an admin key', async () => {
    for (const path of ['/tenants', '/keys', '/mask-sets', '/publications']) {
      expect(await errorCode(call('GET', `/admin/v1${path}`))).toBe('401 invalid_api_key');
      expect(await errorCode(admin('GET', path, undefined, BACKEND_KEY))).toBe('401 invalid_api_key');
    }
  });
});
