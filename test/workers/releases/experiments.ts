/** Experiments: who takes part, in which variant, from when to when, and what two of them may not do. */
import { env } from 'cloudflare:workers';
import { afterEach, describe, expect, it, vi } from 'vitest';
import { listSchema } from '../../../shared/admin/admin-wire.ts';
import {
  type Experiment,
  experimentResultsSchema,
  experimentSchema,
} from '../../../shared/admin/experiment-wire.ts';
import { EDGE_URL, MODEL } from '../../support/edge/constants.ts';
import {
  admin,
  badD1,
  CHAT,
  chat,
  created,
  errorCode,
  freshIsolate,
  goLive,
  makeMaskSet,
  newKey,
  newTenant,
  recorded,
  say,
  soon,
  upload,
} from '../support/edge.ts';

type Fetch = ReturnType<typeof freshIsolate>;
let count = 0;

async function draft(change: object = {}, key?: string): Promise<Experiment> {
  const number = ++count;
  const { version } = await upload(makeMaskSet(`arm-${number}`));
  const variants = [
    { name: 'control', weight: 1, mask_set: 'dense' },
    { name: 'masked', weight: 1, mask_set: version },
  ];
  const id = `experiment-${number}`;
  return await created(admin('POST', '/experiments', { id, variants, ...change }, key));
}
const act = (id: string, what: 'start' | 'stop', key?: string) =>
  admin('POST', `/experiments/${id}/${what}`, undefined, key);
async function start(id: string): Promise<Experiment> {
  const response = await act(id, 'start');
  expect(response.status, await response.clone().text()).toBe(200);
  return experimentSchema.parse(await response.json());
}
async function assigned(key: string, text: string, fetch?: Fetch, body: object = {}) {
  const response = await chat(key, { ...say(text), ...body }, fetch);
  expect(response.status).toBe(200);
  const header = (name: string) => response.headers.get(`x-maskroute-${name}`);
  return {
    experiment: header('experiment'),
    variant: header('variant'),
    version: header('version'),
    mask: header('mask'),
    fallback: header('fallback'),
  };
}
const texts = Array.from({ length: 60 }, (_, i) => `north ${i}`);

describe('an experiment', () => {
  it('gives each conversation one variant, the same in every isolate, and says so truly', async () => {
    const { tenant, key } = await newTenant();
    const { version: live } = await goLive('live', tenant);
    const { id, variants, state } = await draft({ tenants: [tenant] });
    expect(state).toBe('draft');
    expect(await assigned(key, 'north')).toMatchObject({
      experiment: 'none',
      variant: 'live',
      version: live,
    });
    expect(await start(id)).toMatchObject({ state: 'running', tenants: [tenant] });
    const all = await Promise.all(texts.map((text) => assigned(key, text)));
    for (const seen of all) {
      expect(seen.experiment).toBe(id);
      if (seen.variant === 'control') {
        expect(seen).toMatchObject({ version: 'none', mask: 'dense', fallback: 'experiment' });
      } else {
        expect(seen).toMatchObject({ variant: 'masked', version: variants[1]!.mask_set, fallback: null });
        expect(seen.mask).toMatch(/^m_/);
      }
    }
    const masked = all.filter(({ variant }) => variant === 'masked').length;
    expect(masked).toBeGreaterThan(15);
    expect(masked).toBeLessThan(45);
    const other = freshIsolate();
    expect(await Promise.all(texts.map((text) => assigned(key, text, other)))).toEqual(all);
    const response = await chat(key, say('north 1'));
    const body = (await recorded(response.headers.get('x-request-id')!))!.body!.maskroute;
    expect(body).toMatchObject({ experiment: id, variant: all[1]!.variant });
  });

  it('leaves alone who names a mask, other tenants, and other models', async () => {
    const [{ tenant, key }, other] = [await newTenant(), await newTenant()];
    await goLive('live', tenant);
    await goLive('live', other.tenant);
    const { id } = await draft({ tenants: [tenant], models: [MODEL.id] });
    await start(id);
    const none = { experiment: 'none', variant: 'live' };
    expect(await assigned(key, 'x', undefined, { mask: 'dense' })).toMatchObject(none);
    expect(await assigned(key, 'x', undefined, { model: `${MODEL.id}:dense` })).toMatchObject(none);
    expect(await assigned(other.key, 'x')).toMatchObject(none);
    expect(await assigned(key, 'x')).toMatchObject({ experiment: id });
    const elsewhere = await newTenant();
    const { id: otherModel } = await draft({ tenants: [elsewhere.tenant], models: ['another'] });
    await start(otherModel);
    expect(await assigned(elsewhere.key, 'x')).toMatchObject(none);
  });

  it('is limited to its regions', async () => {
    const { tenant, key } = await newTenant();
    const { id } = await draft({ tenants: [tenant], regions: [{ country: 'DE' }, { continent: 'SA' }] });
    await start(id);
    const from = async (cf: object) => {
      const isolate = freshIsolate();
      const response = await isolate(
        new Request(`${EDGE_URL}/v1/chat/completions`, {
          method: 'POST',
          headers: { 'content-type': 'application/json', authorization: `Bearer ${key}` },
          body: JSON.stringify(CHAT),
          cf,
        } as RequestInit),
      );
      return response.headers.get('x-maskroute-experiment');
    };
    expect(await from({ continent: 'EU', country: 'DE', colo: 'FRA' })).toBe(id);
    expect(await from({ continent: 'EU', country: 'FR', colo: 'CDG' })).toBe('none');
    expect(await from({ continent: 'SA', country: 'BR' })).toBe(id);
    // Saudi Arabia is a country that has the code of a continent.
    expect(await from({ continent: 'AS', country: 'SA' })).toBe('none');
    expect(await from({})).toBe('none');
  });

  it('with one variant gives its set to all requests, and compares nothing', async () => {
    const { tenant, key } = await newTenant();
    const { version } = await upload(makeMaskSet('only'));
    const variants = [{ name: 'only', weight: 1, mask_set: version }];
    const { id } = await draft({ tenants: [tenant], variants });
    await start(id);
    for (const text of texts.slice(0, 12))
      expect(await assigned(key, text)).toMatchObject({ experiment: id, variant: 'only', version });
    const response = await admin('GET', `/experiments/${id}/results`);
    expect(experimentResultsSchema.parse(await response.json())).toMatchObject({
      variants: [{ name: 'only' }],
      comparisons: [],
    });
  });

  it('starts and ends on time, also while D1 is down', async () => {
    const { tenant, key } = await newTenant();
    const { version: live } = await goLive('live', tenant);
    const d1 = badD1();
    const isolate = freshIsolate({ DB: d1.DB });
    const begin_ms = Date.now() + 1_500;
    const [starts_at, ends_at] = [begin_ms, begin_ms + 1_500].map((at) => new Date(at).toISOString());
    const { id } = await draft({ tenants: [tenant], starts_at, ends_at });
    expect(await start(id)).toMatchObject({ state: 'scheduled', started_at: starts_at });
    const experimentOf = async () => (await assigned(key, 'north', isolate)).experiment;
    expect(await experimentOf()).toBe('none');
    d1.be('failing');
    await soon(async () => expect(await experimentOf()).toBe(id));
    expect(Date.now()).toBeGreaterThanOrEqual(begin_ms);
    await soon(async () => expect(await experimentOf()).toBe('none'));
    expect(Date.now()).toBeGreaterThanOrEqual(begin_ms + 1_500);
    expect((await assigned(key, 'north', isolate)).version).toBe(live);
    const ended = await (await admin('GET', `/experiments/${id}`)).json();
    expect(ended).toMatchObject({ state: 'ended', stopped_at: null });
    // A page that was loaded before its end may still offer to stop it.
    expect(await (await act(id, 'stop')).json()).toEqual(ended);
  });

  it('that is stopped takes in nobody more, within 5 s everywhere', async () => {
    const { tenant, key } = await newTenant();
    const { id } = await draft({ tenants: [tenant] });
    await start(id);
    const other = freshIsolate();
    expect(await assigned(key, 'x', other)).toMatchObject({ experiment: id });
    const stopped = await (await act(id, 'stop')).json<Experiment>();
    expect(stopped.state).toBe('stopped');
    expect(await (await act(id, 'stop')).json()).toEqual(stopped);
    expect(await assigned(key, 'x')).toMatchObject({ experiment: 'none' });
    await vi.waitFor(
      async () => expect(await assigned(key, 'x', other)).toMatchObject({ experiment: 'none' }),
      5_000,
    );
  });

  it('whose variants no backend or encoder fits does not start', async () => {
    const encoder = { ...makeMaskSet('x').encoder, revision: 'r2' };
    const { version } = await upload(makeMaskSet('odd', { encoder }));
    const { id, variants } = await draft();
    const answer = await admin('PATCH', `/experiments/${id}`, {
      variants: [variants[0], { ...variants[1], mask_set: version }],
    });
    expect(answer.status).toBe(200);
    expect(await errorCode(act(id, 'start'))).toBe('400 encoder_mismatch');
    const missing = { ...variants[1], mask_set: `v_${'0'.repeat(24)}` };
    await admin('PATCH', `/experiments/${id}`, { variants: [variants[0], missing] });
    expect(await errorCode(act(id, 'start'))).toBe('404 not_found');
  });

  it('whose mask set is damaged in the database does not run, and the others do', async () => {
    const [damaged, other] = [await newTenant(), await newTenant()];
    const { id, variants } = await draft({ tenants: [damaged.tenant] });
    const { id: good } = await draft({ tenants: [other.tenant] });
    for (const one of [id, good]) await start(one);
    for (const content of ['{', '{}']) {
      await env.DB.prepare('UPDATE mask_sets SET content = ? WHERE version = ?')
        .bind(content, variants[1]!.mask_set)
        .run();
      const isolate = freshIsolate();
      expect((await assigned(damaged.key, 'x', isolate)).experiment).toBe('none');
      expect((await assigned(other.key, 'x', isolate)).experiment).toBe(good);
    }
    for (const one of [id, good]) expect((await act(one, 'stop')).status).toBe(200);
  });

  it('that would be over before it starts is not started, and a draft is not stopped', async () => {
    const ends_at = new Date(Date.now() - 1).toISOString();
    const { id } = await draft({ ends_at });
    const late = await act(id, 'start');
    expect(await late.clone().json()).toMatchObject({ error: { param: 'ends_at' } });
    expect(await errorCode(late)).toBe('409 conflict');
    expect(await errorCode(act(id, 'stop'))).toBe('409 conflict');
    expect(await (await admin('GET', `/experiments/${id}`)).json()).toMatchObject({ state: 'draft' });
  });

  it('may be changed and deleted as a draft, and not once it was started', async () => {
    const { tenant } = await newTenant();
    const { id } = await draft({ tenants: [tenant] });
    const change = { description: 'why', models: ['m'], sticky: 'user' };
    const changed = await (await admin('PATCH', `/experiments/${id}`, change)).json<Experiment>();
    expect(changed).toMatchObject({ ...change, tenants: [tenant], state: 'draft' });
    await admin('PATCH', `/experiments/${id}`, { models: null });
    expect(await (await admin('GET', `/experiments/${id}`)).json()).toMatchObject({ models: [] });
    for (const name of ['made_up', 'constructor'])
      expect(await errorCode(admin('PATCH', `/experiments/${id}`, { [name]: null }))).toBe(
        '400 invalid_request',
      );
    await start(id);
    expect(await errorCode(admin('PATCH', `/experiments/${id}`, change))).toBe('409 conflict');
    expect(await errorCode(admin('DELETE', `/experiments/${id}`))).toBe('409 conflict');
    expect(await errorCode(act(id, 'start'))).toBe('409 conflict');
    const { id: another } = await draft();
    expect((await admin('DELETE', `/experiments/${another}`)).status).toBe(200);
    expect(await errorCode(admin('GET', `/experiments/${another}`))).toBe('404 not_found');
  });

  it('that two change at once loses neither change, or tells one of them', async () => {
    const { id } = await draft();
    const changes = [{ description: 'mine' }, { alpha: 0.1 }];
    const answers = await Promise.all(changes.map((change) => admin('PATCH', `/experiments/${id}`, change)));
    const found = await (await admin('GET', `/experiments/${id}`)).json();
    for (const [index, answer] of answers.entries()) {
      if (answer.status === 200) expect(found).toMatchObject(changes[index]!);
      else expect(await errorCode(answer)).toBe('409 conflict');
    }
  });
});

describe('two experiments', () => {
  it('that could meet in one request are refused, naming the other', async () => {
    const { tenant } = await newTenant();
    const { id } = await draft({ tenants: [tenant], regions: [{ country: 'DE' }] });
    await start(id);
    const overlapping = await draft({ tenants: [tenant], regions: [{ continent: 'EU' }] });
    const refused = await act(overlapping.id, 'start');
    expect(await refused.clone().text()).toContain(id);
    expect(await errorCode(refused)).toBe('409 conflict');
    const elsewhere = await draft({ tenants: [tenant], regions: [{ country: 'FR' }] });
    await start(elsewhere.id);
    await act(id, 'stop');
    await act(elsewhere.id, 'stop');
    await start(overlapping.id);
  });

  it('started at the same moment do not both start', async () => {
    const { tenant } = await newTenant();
    const drafts = [];
    for (let i = 0; i < 4; i++) drafts.push(await draft({ tenants: [tenant] }));
    const answers = await Promise.all(drafts.map(({ id }) => act(id, 'start')));
    expect(answers.map(({ status }) => status).sort()).toEqual([200, 409, 409, 409]);
  });

  it('of two tenants are theirs alone', async () => {
    const [a, b] = [await newTenant(), await newTenant()];
    const { key } = await newKey({ tenant: a.tenant, kind: 'tenant_admin' });
    const { key: otherKey } = await newKey({ tenant: b.tenant, kind: 'tenant_admin' });
    const own = await draft({}, key);
    expect(own.tenant).toBe(a.tenant);
    for (const [method, path] of [
      ['GET', ''],
      ['PATCH', ''],
      ['DELETE', ''],
      ['POST', '/start'],
      ['POST', '/stop'],
    ] as const) {
      const body = method === 'PATCH' ? { description: 'mine' } : undefined;
      const answer = admin(method, `/experiments/${own.id}${path}`, body, otherKey);
      expect(await errorCode(answer), method).toBe('404 not_found');
    }
    const list = listSchema(experimentSchema);
    const listed = list.parse(await (await admin('GET', '/experiments', undefined, otherKey)).json());
    expect(listed.data).toEqual([]);
    const spanning = { id: 'spanning', tenants: [b.tenant], variants: own.variants };
    expect(await errorCode(admin('POST', '/experiments', spanning, key))).toBe('400 invalid_request');
    await start(own.id);
    expect((await assigned(b.key, 'x')).experiment).toBe('none');
    expect((await assigned(a.key, 'x')).experiment).toBe(own.id);
    const platforms = await draft({ tenants: [b.tenant] });
    await start(platforms.id);
    const { id } = await draft({}, otherKey);
    const refused = await act(id, 'start', otherKey);
    expect(refused.status).toBe(409);
    const text = await refused.text();
    expect(text).toContain('an experiment of the platform');
    expect(text).not.toContain(platforms.id);
  });
});

describe('the edge has room', () => {
  /** Experiments that begin tomorrow, with `id`'s definition; `variants`: the mask sets of each. */
  const fill = async (id: string, count: number, variants: (index: string) => [string, string]) => {
    const [first, second] = variants('value');
    await env.DB.prepare(
      `insert into experiments select 'filler', 'filler-' || value,
      json_set(definition, '$.variants[0].mask_set', ${first}, '$.variants[1].mask_set', ${second}),
      created_at_ms, ?, null, null, revision, actor from experiments, json_each(?) where experiments.id = ?`,
    )
      .bind(Date.now() + 86_400_000, JSON.stringify(Array.from({ length: count }, (_, i) => i)), id)
      .run();
  };
  afterEach(async () => {
    await env.DB.exec("delete from experiments where owner = 'filler'");
  });
  const refusal = async (id: string) => {
    const response = await act(id, 'start');
    return `${response.status} ${await response.text()}`;
  };

  it('for a hundred experiments', async () => {
    const { id } = await draft({ tenants: [(await newTenant()).tenant] });
    await fill(id, 100, () => ["'dense'", "'dense'"]);
    expect(await refusal(id)).toMatch(/^409 .*100 experiments run already/);
    await env.DB.exec("delete from experiments where owner = 'filler'");
    await start(id);
  });

  it('for 64 mask sets in them', async () => {
    const { id } = await draft({ tenants: [(await newTenant()).tenant] });
    await fill(id, 32, (index) => [`printf('v_%024d', 2 * ${index})`, `printf('v_%024d', 2 * ${index} + 1)`]);
    expect(await refusal(id)).toMatch(/^409 .*at most 64 mask sets in all/);
  });
});

describe('an id of an experiment', () => {
  const variantsOf = (...versions: string[]) =>
    versions.map((mask_set, i) => ({ name: `v${i}`, weight: 1, mask_set }));

  async function administered() {
    const { tenant, key } = await newTenant();
    const { key: adminKey } = await newKey({ tenant, kind: 'tenant_admin' });
    return { tenant, key, adminKey };
  }

  it('belongs to its tenant: others take the same one, and neither learns of the other', async () => {
    const [a, b] = [await administered(), await administered()];
    const make = (description: string, key: string) =>
      admin('POST', '/experiments', { id: 'same', description, variants: variantsOf('dense', 'dense') }, key);
    await created(make("a's", a.adminKey));
    await created(make("b's", b.adminKey));
    expect(await errorCode(make('again', b.adminKey))).toBe('409 conflict');
    const of = async (key: string, query = '') =>
      (await admin('GET', `/experiments/same${query}`, undefined, key)).json<Experiment>();
    expect((await of(a.adminKey)).description).toBe("a's");
    expect((await of(b.adminKey)).description).toBe("b's");
    await admin('PATCH', '/experiments/same', { description: 'changed' }, a.adminKey);
    expect((await of(b.adminKey)).description).toBe("b's");

    for (const { adminKey } of [a, b]) expect((await act('same', 'start', adminKey)).status).toBe(200);
    for (const { key } of [a, b]) expect(await assigned(key, 'x')).toMatchObject({ experiment: 'same' });
    expect((await act('same', 'stop', a.adminKey)).status).toBe(200);
    expect((await of(b.adminKey)).state).toBe('running');
    expect((await assigned(a.key, 'x')).experiment).toBe('none');
    expect((await assigned(b.key, 'x')).experiment).toBe('same');
  });

  it('means the one of the tenant that is named, else the one of nobody, else the only one', async () => {
    const [a, b] = [await administered(), await administered()];
    const make = (tenant: string, description: string) =>
      created(
        admin('POST', '/experiments', {
          id: 'x-1',
          tenant,
          description,
          variants: variantsOf('dense', 'dense'),
        }),
      );
    const asked = async (query = '') => await admin('GET', `/experiments/x-1${query}`);
    const described = async (query = '') => (await (await asked(query)).json<Experiment>()).description;
    await make(a.tenant, 'of a');
    expect(await described()).toBe('of a');
    expect(await errorCode(asked('?tenant='))).toBe('404 not_found');
    await make(b.tenant, 'of b');
    const several = await asked();
    expect(await several.clone().text()).toContain('?tenant=');
    expect(await errorCode(several)).toBe('409 conflict');
    expect(await described(`?tenant=${b.tenant}`)).toBe('of b');
    await make('', 'of nobody');
    expect(await described()).toBe('of nobody');
    expect(await described('?tenant=')).toBe('of nobody');
    expect((await admin('DELETE', `/experiments/x-1?tenant=${a.tenant}`)).status).toBe(200);
    expect(await described(`?tenant=${b.tenant}`)).toBe('of b');
    expect(await errorCode(asked(`?tenant=${a.tenant}`))).toBe('404 not_found');
    expect(await errorCode(admin('GET', `/experiments/x-1?tenant=${b.tenant}`, undefined, a.adminKey))).toBe(
      '403 forbidden',
    );
  });

  it('keeps what is counted of two tenants apart, times and ratings too', async () => {
    const both = [await administered(), await administered()];
    for (const [i, { key, adminKey }] of both.entries()) {
      const body = { id: 'counted', sticky: 'api_key', variants: variantsOf('dense', 'dense') };
      await created(admin('POST', '/experiments', body, adminKey));
      expect((await act('counted', 'start', adminKey)).status).toBe(200);
      for (let n = 0; n <= i; n++) await (await chat(key, { ...say('x'), stream: true })).text();
    }
    await vi.waitFor(
      async () => {
        for (const [i, { tenant, adminKey }] of both.entries()) {
          const results = await admin('GET', '/experiments/counted/results', undefined, adminKey);
          const { variants } = experimentResultsSchema.parse(await results.json());
          const used = variants.filter(({ figures }) => figures.requests > 0);
          expect(used.map(({ figures }) => figures.requests)).toEqual([i + 1]);
          expect(used[0]!.figures.ttft_quantiles_ms).not.toBeNull();
          const byAdmin = await admin('GET', `/experiments/counted/results?tenant=${tenant}`);
          expect(await byAdmin.json()).toMatchObject({ variants });
        }
      },
      { timeout: 12_000, interval: 300 },
    );
  });
});

it('a tenant starts ten of its own, and leaves the other places to others', async () => {
  const { tenant } = await newTenant();
  const { key } = await newKey({ tenant, kind: 'tenant_admin' });
  const variants = ['a', 'b'].map((name) => ({ name, weight: 1, mask_set: 'dense' }));
  const ids = Array.from({ length: 11 }, (_, i) => `${tenant}-in-${i}`);
  const answers: number[] = [];
  for (const [i, id] of ids.entries()) {
    const regions = [{ country: `A${String.fromCharCode(65 + i)}` }];
    await created(admin('POST', '/experiments', { id, variants, regions }, key));
    answers.push((await act(id, 'start', key)).status);
  }
  expect(answers).toEqual([...Array(10).fill(200), 409]);
  const other = await newTenant();
  const { key: otherKey } = await newKey({ tenant: other.tenant, kind: 'tenant_admin' });
  await created(admin('POST', '/experiments', { id: 'other', variants }, otherKey));
  expect((await act('other', 'start', otherKey)).status).toBe(200);
  await act(ids[0]!, 'stop', key);
  expect((await act(ids[10]!, 'start', key)).status).toBe(200);
});

it('a tenant has ten mask sets in experiments that run, however it spreads them', async () => {
  const { tenant } = await newTenant();
  const { key } = await newKey({ tenant, kind: 'tenant_admin' });
  const versions: string[] = [];
  for (let i = 0; i < 11; i++) versions.push((await upload(makeMaskSet(`spread-${i}`), tenant)).version);
  const begin = async (id: string, country: string, sets: readonly string[]) => {
    const variants = sets.map((mask_set, i) => ({ name: `v${i}`, weight: 1, mask_set }));
    await created(admin('POST', '/experiments', { id, variants, regions: [{ country }] }, key));
    return await act(id, 'start', key);
  };
  expect((await begin('sets-a', 'AA', versions.slice(0, 6))).status).toBe(200);
  expect((await begin('sets-b', 'AB', ['dense', ...versions.slice(4, 10)])).status).toBe(200);
  expect((await begin('sets-c', 'AC', [versions[0]!, versions[9]!, 'dense'])).status).toBe(200);
  const refused = await begin('sets-d', 'AD', ['dense', versions[10]!]);
  expect(await refused.clone().text()).toContain('at most 10 mask sets');
  expect(await errorCode(refused)).toBe('409 conflict');
  await act('sets-b', 'stop', key);
  expect((await act('sets-d', 'start', key)).status).toBe(200);
});

it('a malformed experiment is refused with the place', async () => {
  const variants = [
    { name: 'a', weight: 1, mask_set: 'dense' },
    { name: 'b', weight: 1, mask_set: 'dense' },
  ];
  const wrong: [object, string][] = [
    [{ id: 'none', variants }, 'id'],
    [{ id: 'A b', variants }, 'id'],
    [{ id: 'x' }, 'variants'],
    [{ id: 'x', variants: [] }, 'variants'],
    [{ id: 'x', variants: [variants[0], variants[0]] }, 'variants'],
    [{ id: 'x', variants: [variants[0], { ...variants[1], weight: 0 }] }, 'variants[1].weight'],
    [{ id: 'x', variants: [variants[0], { ...variants[1], mask_set: 'm' }] }, 'variants[1].mask_set'],
    [{ id: 'x', variants, regions: [{ country: 'de' }] }, 'regions[0]'],
    [{ id: 'x', variants, shadow_share: 1 }, 'shadow_share'],
    [{ id: 'x', variants, starts_at: '2030-01-02T00:00:00Z', ends_at: '2030-01-01T00:00:00Z' }, 'ends_at'],
    [{ id: 'x', variants, more: 1 }, 'more'],
  ];
  for (const [body, param] of wrong) {
    const response = await admin('POST', '/experiments', body);
    const { error } = await response.clone().json<{ error: { param: string | null } }>();
    expect(await errorCode(response)).toBe('400 invalid_request');
    expect(error.param ?? '').toContain(param);
  }
  expect(await errorCode(admin('POST', '/experiments', { id: 'x', variants, tenants: ['nobody'] }))).toBe(
    '404 not_found',
  );
});
