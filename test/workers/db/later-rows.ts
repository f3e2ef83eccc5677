/**
 * Rows that a later version of the edge wrote, after a return to this one: what it does not know stops only what the row is
 * about, and the administrator sees it.
 */
import { env } from 'cloudflare:workers';
import { afterEach, expect, it, vi } from 'vitest';
import type { AuditEntry, Tenant } from '../../../shared/admin/admin-wire.ts';
import type { Experiment } from '../../../shared/admin/experiment-wire.ts';
import type { LivePublication, Publication } from '../../../shared/admin/publication-wire.ts';
import type { BackendEntry } from '../../../shared/wire/backend-load.ts';
import type { WireError } from '../../../shared/wire/errors.ts';
import {
  activate,
  admin,
  call,
  chat,
  created,
  errorCode,
  freshIsolate,
  goLive,
  makeMaskSet,
  newKey,
  newTenant,
  say,
  soon,
  upload,
} from '../support/edge.ts';

const write = (statement: string, ...values: (string | number)[]) =>
  env.DB.prepare(statement)
    .bind(...values)
    .run();

/** What of a request's answer tells how it was routed. */
async function routed(key: string, fetch: ReturnType<typeof freshIsolate>) {
  const response = await chat(key, say('north'), fetch);
  expect(response.status).toBe(200);
  const header = (name: string) => response.headers.get(`x-maskroute-${name}`);
  return { version: header('version'), fallback: header('fallback'), experiment: header('experiment') };
}

/** The lines of the log with this event that were written meanwhile. */
function logged(event: string): () => object[] {
  const spy = vi.spyOn(console, 'error').mockImplementation(() => {});
  return () =>
    spy.mock.calls
      .map(([line]) => JSON.parse(line) as { event: string })
      .filter((line) => line.event === event);
}

afterEach(() => void vi.restoreAllMocks());

it('an experiment that cannot be read stops alone, and can be stopped', async () => {
  const own = await newTenant();
  const other = await newTenant();
  const { version } = await upload(makeMaskSet('experimental'));
  const variants = [{ name: 'A', weight: 1, mask_set: version }];
  const draft = (id: string, tenant: string) =>
    created(admin('POST', '/experiments', { id, tenants: [tenant], variants }));
  for (const [id, tenant] of [
    ['of-later', own.tenant],
    ['of-now', other.tenant],
  ] as const) {
    await draft(id, tenant);
    expect((await admin('POST', `/experiments/${id}/start`)).status).toBe(200);
  }
  await write(
    `update experiments set definition = json_set(definition, '$.variants[0].when', 'at night') where id = ?`,
    'of-later',
  );
  const isolate = freshIsolate();
  const lines = logged('experiment_unusable');
  expect((await routed(own.key, isolate)).experiment).toBe('none');
  expect((await routed(other.key, isolate)).experiment).toBe('of-now');
  expect(lines()[0]).toMatchObject({ experiment: 'of-later', reason: expect.stringContaining('when') });

  const { data } = await (await admin('GET', '/experiments')).json<{ data: Experiment[] }>();
  const shown = data.find(({ id }) => id === 'of-later')!;
  expect(shown).toMatchObject({ state: 'running', tenants: [own.tenant], variants: [] });
  expect(shown.unreadable).toContain('when');
  expect(data.find(({ id }) => id === 'of-now')!.unreadable).toBeUndefined();
  expect(await errorCode(admin('GET', '/experiments/of-later/results'))).toBe('409 conflict');
  // The next version would find two of them for one request.
  await draft('overlapping', own.tenant);
  expect(await errorCode(admin('POST', '/experiments/overlapping/start'))).toBe('409 conflict');
  const stopped = await (await admin('POST', '/experiments/of-later/stop')).json();
  expect(stopped).toMatchObject({ state: 'stopped', unreadable: shown.unreadable });
  expect((await admin('POST', '/experiments/overlapping/start')).status).toBe(200);
});

it('a draft that cannot be read can only be deleted', async () => {
  const variants = [{ name: 'A', weight: 1, mask_set: 'dense' }];
  await created(admin('POST', '/experiments', { id: 'draft-of-later', variants }));
  await write(`update experiments set definition = '["a list"]' where id = ?`, 'draft-of-later');
  const path = '/experiments/draft-of-later';
  expect(await errorCode(admin('PATCH', path, { description: 'x' }))).toBe('409 conflict');
  expect(await errorCode(admin('POST', `${path}/start`))).toBe('409 conflict');
  expect((await admin('DELETE', path)).status).toBe(200);
});

it('a mask set that cannot be read is missed by those who see it, and by nobody else', async () => {
  const [own, other] = [await newTenant(), await newTenant()];
  const { version } = await goLive('of-later', own.tenant);
  const { version: others } = await goLive('of-now', other.tenant);
  await write(
    `update mask_sets set content = json_set(content, '$.format', 'maskroute-mask-set-v9') where owner = ?`,
    own.tenant,
  );
  const isolate = freshIsolate();
  const lines = logged('mask_set_unreadable');
  expect(await routed(own.key, isolate)).toMatchObject({ fallback: 'mask_set_unavailable' });
  expect(lines()).toMatchObject([{ owner: own.tenant, version, reason: expect.stringContaining('format') }]);
  expect(await routed(other.key, isolate)).toMatchObject({ version: others, fallback: null });
  const again = admin('POST', '/publications', { version, tenant: own.tenant });
  expect(await errorCode(again)).toBe('400 invalid_mask_set');

  // Conversations that still see the version before it keep that one.
  const { version: before } = await goLive('before', own.tenant);
  const { version: next } = await upload(makeMaskSet('next'), own.tenant);
  await activate(next, { tenant: own.tenant, rollout: [{ share: 0.001, duration_s: 3600 }] });
  await write(`update mask_sets set content = '{}' where version = ? and owner = ?`, next, own.tenant);
  expect(await routed(own.key, freshIsolate())).toMatchObject({ version: before, fallback: null });
});

it('a rollout that cannot be read is seen by nobody, and can be rolled back', async () => {
  const { tenant, key } = await newTenant();
  const { version: before } = await goLive('before', tenant);
  const { version } = await upload(makeMaskSet('rolled-out'), tenant);
  const { id } = await activate(version, { tenant, rollout: [{ share: 0.9, duration_s: 3600 }] });
  await write(`update publications set rollout = '[{"share": 0.9, "until": "noon"}]' where id = ?`, id);
  const lines = logged('publication_unreadable');
  expect(await routed(key, freshIsolate())).toMatchObject({ version: before, fallback: null });
  expect(lines()[0]).toMatchObject({ tenant, publication: id, reason: expect.stringContaining('until') });
  const live = await (await admin('GET', `/publications/live?tenant=${tenant}`)).json<LivePublication>();
  expect(live).toMatchObject({ share: 0, base_version: before, rollout: [] });
  expect(live.unreadable).toContain('until');
  for (const what of ['pause', 'resume']) {
    expect(await errorCode(admin('POST', `/publications/${what}`, { tenant }))).toBe('409 conflict');
  }
  const back = await created<Publication>(admin('POST', '/publications/rollback', { tenant }));
  expect(back).toMatchObject({ version: before });
});

it('bounds that cannot be read bring nothing back, and the version serves on', async () => {
  const { tenant, key } = await newTenant();
  const { version } = await upload(makeMaskSet('bounded'), tenant);
  const { id } = await activate(version, { tenant, auto_rollback: { error_rate_max: 0.5, requests_min: 1 } });
  await write(
    `update publications set auto_rollback = '{"error_rate_max": 0.5, "minutes": 3}' where id = ?`,
    id,
  );
  const lines = logged('auto_rollback_failed');
  expect(await routed(key, freshIsolate())).toMatchObject({ version, fallback: null });
  const live = await (await admin('GET', `/publications/live?tenant=${tenant}`)).json<LivePublication>();
  expect(live).toMatchObject({ version, share: 1, auto_rollback: null });
  expect(live.unreadable).toContain('minutes');
  await soon(() => expect(lines()).not.toEqual([]));
  expect(lines()[0]).toMatchObject({ publication: id, reason: expect.stringContaining('minutes') });
});

it('a tenant whose limits cannot be read is refused, is shown with the reason, and can be mended', async () => {
  const [own, other] = [await newTenant(), await newTenant()];
  const path = `/tenants/${own.tenant}`;
  const { version } = await upload(makeMaskSet('limited'), own.tenant);
  for (const [column, value, name] of [
    ['models', '{"any_of": ["m"]}', 'models'],
    ['models', 'not JSON', 'models'],
    ['sparsity_max', 'half', 'sparsity_max'],
    ['tokens_per_day', 'a lot', 'tokens_per_day'],
    ['requests_per_minute', '-5', 'requests_per_minute'],
  ] as const) {
    await write(`update tenants set ${column} = ? where id = ?`, value, own.tenant);
    const isolate = freshIsolate();
    const lines = logged('tenant_unreadable');
    expect(await errorCode(chat(own.key, say('x'), isolate)), value).toBe('503 configuration_unavailable');
    expect(lines().at(-1)).toMatchObject({ tenant: own.tenant, reason: expect.stringContaining(name) });
    expect((await chat(other.key, say('x'), isolate)).status, value).toBe(200);
    const { data } = await (await admin('GET', '/tenants')).json<{ data: Tenant[] }>();
    expect(data.find(({ id }) => id === other.tenant)).not.toHaveProperty('unreadable');
    const shown = data.find(({ id }) => id === own.tenant)!;
    expect(shown).toMatchObject({ [name]: null, unreadable: expect.stringContaining(name) });
    const publishing = admin('POST', '/publications', { version, tenant: own.tenant });
    expect(await errorCode(publishing), value).toBe('409 conflict');
    const mended = await (await admin('PATCH', path, { [name]: null })).json<Tenant>();
    expect(mended.unreadable).toBeUndefined();
    expect((await chat(own.key, say('x'), freshIsolate())).status, value).toBe(200);
  }
});

it('a backend that cannot be read gets no requests, and the others go on', async () => {
  const url = 'http://backend.invalid';
  await created(admin('POST', '/backends', { id: 'of-now', url: env.BACKEND_URL }));
  await created(admin('POST', '/backends', { id: 'of-later', url }));
  const shownAs = async (id: string) =>
    (await (await admin('GET', `/backends/${id}`)).json<BackendEntry>()).unreadable;
  const { key } = await newTenant();
  try {
    for (const [column, value] of [
      ['regions', '{"near": "DE"}'],
      ['regions', 'EU'],
      ['weight', 'heavy'],
      ['url', 'backend.invalid'],
    ] as const) {
      await write(`update backends set ${column} = ? where id = 'of-later'`, value);
      const lines = logged('backend_unreadable');
      const answer = await chat(key, say('x'), freshIsolate());
      expect(answer.status, value).toBe(200);
      expect(answer.headers.get('x-maskroute-backend')).toBe('of-now');
      expect(lines().at(-1)).toMatchObject({ backend: 'of-later', reason: expect.stringContaining(column) });
      expect(await shownAs('of-later')).toContain(column);
      expect(await shownAs('of-now')).toBeUndefined();
      const change = { url, regions: ['*'], weight: 1 };
      expect((await admin('PATCH', '/backends/of-later', change)).status).toBe(200);
      expect(await shownAs('of-later')).toBeUndefined();
    }
  } finally {
    for (const id of ['of-now', 'of-later']) await admin('DELETE', `/backends/${id}`);
  }
});

it('an evaluation that cannot be read is named as such, and can be replaced', async () => {
  const { version } = await upload(makeMaskSet('evaluated'));
  const path = `/mask-sets/${version}/evaluation`;
  const row = { method: 'learned', matched: 'count', maskSet: version, sparsity: 0.5, surrogate: false };
  const figures = { rows: [{ ...row, kl: 0.1, agreement: 0.9, perplexity: 9, msPerToken: 5 }] };
  for (const content of ['{"rows": []}', '[{"method": "learned"}]', 'not JSON']) {
    expect((await admin('PUT', path, figures)).status).toBe(200);
    await write('update evaluations set content = ? where version = ?', content, version);
    const refused = await admin('GET', path);
    expect(refused.status, content).toBe(409);
    expect((await refused.json<WireError>()).error.message).toContain(version);
  }
  expect((await admin('PUT', path, figures)).status).toBe(200);
  expect(await (await admin('GET', path)).json()).toMatchObject({ data: figures.rows });
});

it('text that is not JSON stops no more than JSON of a later version', async () => {
  const [own, other] = [await newTenant(), await newTenant()];
  const { version } = await upload(makeMaskSet('written-by-hand'));
  const variants = [{ name: 'A', weight: 1, mask_set: version }];
  for (const [id, { tenant }] of [
    ['by-hand', own],
    ['by-the-edge', other],
  ] as const) {
    await created(admin('POST', '/experiments', { id, tenants: [tenant], variants }));
    expect((await admin('POST', `/experiments/${id}/start`)).status).toBe(200);
  }
  await write(`update experiments set definition = 'tenants: acme' where id = 'by-hand'`);
  const before = await goLive('before-a-hand', own.tenant);
  const { version: next } = await upload(makeMaskSet('after-a-hand'), own.tenant);
  const { id } = await activate(next, { tenant: own.tenant, rollout: [{ share: 0.9, duration_s: 3600 }] });
  await write(`update publications set rollout = 'half', auto_rollback = 'soon' where id = ?`, id);
  const isolate = freshIsolate();
  expect(await routed(own.key, isolate)).toMatchObject({ version: before.version, experiment: 'none' });
  expect((await routed(other.key, isolate)).experiment).toBe('by-the-edge');
  const { data } = await (await admin('GET', '/experiments')).json<{ data: Experiment[] }>();
  expect(data.find(({ id }) => id === 'by-hand')!.unreadable).toBeDefined();
  for (const started of ['by-hand', 'by-the-edge']) await admin('POST', `/experiments/${started}/stop`);
});

it('a change in the audit log that cannot be read is shown as it is stored, and the others as ever', async () => {
  const { tenant } = await newTenant();
  const path = `/tenants/${tenant}`;
  for (const name of ['first', 'second', 'third']) await admin('PATCH', path, { name });
  const list = async () =>
    (await (await admin('GET', `/audit?q=${path}`)).json<{ data: AuditEntry[] }>()).data;
  const [third, second, first] = await list();
  await write(
    'update audit_log set before = ?, after = ? where sequence = ?',
    'a name',
    '["later"]',
    second!.id,
  );
  await write('update audit_log set created_at_ms = ? where sequence = ?', 'noon', first!.id);
  const shown = { ...second, before: 'a name', after: ['later'] };
  const [after, ...before] = await list();
  expect([after, ...before]).toEqual([third, shown, { ...first, created_at: 'noon' }]);
  expect(await (await admin('GET', `/audit/${second!.id}`)).json()).toEqual(shown);
  const exported = await (await admin('GET', '/audit/export')).text();
  expect(exported).toContain(JSON.stringify(shown));
  expect(exported).toContain(JSON.stringify(third));
});

it('a traffic sample that cannot be read is left out of the map and of drift', async () => {
  const { tenant } = await newTenant();
  const { version } = await upload(makeMaskSet('sampled'), tenant);
  const insert = (distances: string, cluster = '0', at = '1') =>
    write(
      'insert into traffic_samples (tenant, version, cluster, distances, created_at_ms) values (?, ?, ?, ?, ?)',
      ...[tenant, version, cluster, distances, at],
    );
  await insert('[1, 2]');
  for (const distances of ['near', '{"north": 1}', '[1, "far"]']) await insert(distances);
  await insert('[1, 2]', 'north');
  await insert('[1, 2]', '0', 'noon');
  const query = `?tenant=${tenant}&version=${version}`;
  const traffic = await admin('GET', `/traffic${query}`);
  expect(await traffic.json()).toMatchObject({ data: [{ cluster: 0, distances: [1, 2] }] });
  expect((await admin('GET', `/drift${query}`)).status).toBe(200);
});

it('an unknown routing policy is the usual one, is named, and can be mended', async () => {
  const { tenant, key } = await newTenant();
  const { version } = await goLive('usual', tenant);
  await write(`update tenants set routing_policy = 'last_tool' where id = ?`, tenant);
  expect(await routed(key, freshIsolate())).toMatchObject({ version, fallback: null });
  const usual = { routing_policy: 'first_user', unknown_policy: 'last_tool' };
  expect(await (await admin('GET', `/tenants/${tenant}`)).json()).toMatchObject(usual);
  const renamed = await admin('PATCH', `/tenants/${tenant}`, { name: 'renamed' });
  expect(await renamed.json()).toMatchObject(usual);
  const mended = await admin('PATCH', `/tenants/${tenant}`, { routing_policy: 'first_user' });
  expect((await mended.json<Tenant>()).unknown_policy).toBeUndefined();
});

it('a kind of key that is unknown has no rights', async () => {
  const unknown = await newKey({ kind: 'viewer' });
  await write(`update api_keys set kind = 'auditor' where id = ?`, unknown.id);
  for (const method of ['GET', 'POST']) {
    const body = method === 'POST' ? { id: 'made-by-auditor', name: 'x' } : undefined;
    const answer = call(method, '/admin/v1/tenants', { key: unknown.key, body }, freshIsolate());
    expect(await errorCode(answer), method).toBe('403 forbidden');
  }
});
