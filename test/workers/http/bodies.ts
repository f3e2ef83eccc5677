/** What of a body is refused, and with which words, at the edge; `test/gpu-backend/api/bodies.test.ts` has the backend. */
import { beforeAll, describe, expect, it } from 'vitest';
import { z } from 'zod';
import { GROUPS } from '../../../shared/openapi/endpoints.ts';
import { HEADERS } from '../../../shared/wire/protocol.ts';
import { BAD_BODIES, CLIENT_BODIES, fieldsOf, wrongAllOver } from '../../support/bad-bodies.ts';
import { EDGE_URL, MODEL } from '../../support/edge/constants.ts';
import {
  admin,
  call,
  chat,
  created,
  freshIsolate,
  makeMaskSet,
  newKey,
  newTenant,
  recorded,
  upload,
} from '../support/edge.ts';
import { limitedTenant } from '../support/limits.ts';

let key: string;
beforeAll(async () => {
  ({ key } = await newTenant());
});
const isolate = freshIsolate();
const post = (path: string, body: unknown) => call('POST', path, { key, body }, isolate);

describe('a bad body', () => {
  it.each(BAD_BODIES)('$path $param: $message', async ({ path, body, param, message }) => {
    for (const at of [path, '/v1/route']) {
      // A dry run takes a body without messages for a completion.
      if (at === '/v1/route' && (typeof body !== 'object' || !('messages' in (body as object)))) continue;
      const response = await post(at, body);
      expect(response.status).toBe(400);
      const { error } = await response.json<{
        error: { param: string | null; message: string; code: string };
      }>();
      expect(error).toMatchObject({ param, type: 'invalid_request_error' });
      expect(error.code).toMatch(/^invalid_(request|json)$/);
      if (typeof message === 'string') expect(error.message).toBe(message);
      else expect(error.message).toMatch(message);
    }
  });

  it('of the admin API names every field, too', async () => {
    const response = await admin('POST', '/tenants', { id: 'A b', nam: 'x', enabled: 1 });
    const { error } = await response.json<{ error: { message: string } }>();
    expect(error.message).toBe(
      'id: expected lower-case letters, digits and dashes, at most 63; name: it is missing, expected a string; ' +
        `enabled: expected true or false, got 1; nam: ${error.message.split('nam: ')[1]}`,
    );
    expect(error.message).toMatch(/nam: there is no such field here, only id, name, routing_policy, /);
  });

  it('of a rating names every field, too', async () => {
    const response = await post('/v1/feedback', { id: 'chatcmpl-1', rating: 5, comments: 'x' });
    expect(await response.json()).toMatchObject({
      error: {
        param: 'rating',
        message:
          'rating: expected 1 or -1, got 5; comments: there is no such field here, only id, rating, comment.',
      },
    });
  });
});

describe('a body that is wrong all over names several fields', () => {
  const endpoints = GROUPS.flatMap(({ caller, endpoints }) =>
    endpoints.flatMap(({ method, path, body }) =>
      typeof body === 'object' ? [{ caller, method, path, body }] : [],
    ),
  );
  let version: string;
  beforeAll(async () => {
    ({ version } = await upload(makeMaskSet('wrong')));
    const variants = ['a', 'b'].map((name) => ({ name, weight: 1, mask_set: 'dense' }));
    await created(admin('POST', '/experiments', { id: 'wrong', variants }));
  });
  it.each(endpoints)('$method $path', async ({ caller, method, path, body }) => {
    const { names, sent } = wrongAllOver(body);
    const at = path
      .replace('{id}', path.includes('experiments') ? 'wrong' : 'default')
      .replace('{version}', version);
    const headers = { origin: EDGE_URL };
    const response =
      caller === 'tenant'
        ? await call(method, at, { key, body: sent, headers }, isolate)
        : caller === 'admin'
          ? await admin(method, at.replace('/admin/v1', ''), sent)
          : await call(method, at, { body: sent, headers }, isolate);
    const { error } = await response.json<{ error: { message: string; param: string } }>();
    expect(response.status, error.message).toBe(400);
    // Beyond ten fields a message says how many more there are.
    for (const name of names.slice(0, 5)) expect(error.message).toMatch(new RegExp(`(^|; )${name}\\b`));
    // What was measured of a set may have more fields than are kept.
    const isOpen = path.endsWith('/evaluation');
    if (names.length < 10 && !isOpen) expect(error.message).toContain('nobody: there is no such field');
    expect(error.param).toMatch(new RegExp(`^${names[0]}`));
  });

  it('of a tenant that may change some of it only', async () => {
    const { tenant } = await newTenant();
    const own = await newKey({ tenant, kind: 'tenant_admin' });
    const change = { name: 'x', tokens_per_day: 5, models: null };
    const response = await admin('PATCH', `/tenants/${tenant}`, change, own.key);
    expect(response.status).toBe(403);
    expect(await response.json()).toMatchObject({
      error: {
        param: 'models',
        message:
          "A tenant's own administrator changes name, routing_policy, texts_kept_days, and not models, tokens_per_day.",
      },
    });
  });
});

describe('a question that is wrong all over names every parameter', () => {
  const questions = GROUPS.flatMap(({ endpoints }) =>
    endpoints.flatMap(({ method, path, query }) => {
      const names = fieldsOf(query ?? z.object({}))
        .filter(([, schema]) => !schema.safeParse('?!').success)
        .map(([name]) => name);
      return names.length === 0 || method !== 'GET' || path.includes('{') ? [] : [{ path, names }];
    }),
  );
  it.each(questions)('$path', async ({ path, names }) => {
    const query = new URLSearchParams(names.map((name) => [name, '?!']));
    const response = await admin('GET', `${path.replace('/admin/v1', '')}?${query}`);
    const { error } = await response.json<{ error: { message: string; param: string } }>();
    expect(response.status, error.message).toBe(400);
    for (const name of names) expect(error.message).toMatch(new RegExp(`(^|; )${name}(\\[0\\])?: expected`));
    expect(error.param).toBe(names[0]);
  });
});

describe('a body as clients send it', () => {
  it.each(CLIENT_BODIES)('$client', async ({ path, body, ignored }) => {
    const response = await post(path, { model: MODEL.id, ...body });
    expect(response.status, await response.clone().text()).toBe(200);
    expect(response.headers.get(HEADERS.ignored)).toBe(ignored);
    await response.text();
  });

  it('reaches the backend as it came, and says in an error, too, what was ignored', async () => {
    const response = await chat(key, { metadata: { a: 'b' } });
    const sent = (await recorded(response.headers.get(HEADERS.requestId)!))!;
    expect(sent.body).toMatchObject({ metadata: { a: 'b' } });
    const other = await limitedTenant({ models: ['another'] });
    const refused = await chat(other.key, { metadata: { a: 'b' } });
    expect(refused.status).toBe(403);
    expect(refused.headers.get(HEADERS.ignored)).toBe('metadata');
  });
});
