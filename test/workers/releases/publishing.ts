/** Making a mask set live, taking it back, and what readers see meanwhile. */
import { env } from 'cloudflare:workers';
import { describe, expect, it, vi } from 'vitest';
import type {
  LivePublication,
  MaskSetSummary,
  Publication,
  PublicationInUse,
} from '../../../shared/admin/publication-wire.ts';
import { publicationSchema } from '../../../shared/admin/publication-wire.ts';
import {
  type ModelHash,
  maskFromBits,
  maskId,
  type SurrogatesId,
  withSurrogates,
} from '../../../shared/mask/mask.ts';
import { maskSetVersion } from '../../../shared/mask/mask-set.ts';
import type { Env } from '../../../workers/env.ts';
import { ADMIN_KEY } from '../../support/edge/constants.ts';
import { mood } from '../support/backends.ts';
import {
  activate,
  admin,
  badD1,
  call,
  chat,
  created,
  errorCode,
  freshIsolate,
  goLive,
  later,
  makeMaskSet,
  newKey,
  newTenant,
  soon,
  upload,
} from '../support/edge.ts';

const versionSeen = async (key: string, fetch?: Parameters<typeof chat>[2]) =>
  (await chat(key, {}, fetch)).headers.get('x-maskroute-version');

const rollback = (tenant: string, more: object = {}) =>
  admin('POST', '/publications/rollback', { tenant, ...more });

describe('a mask set', () => {
  it('is named by its content, kept once, and read back as it was', async () => {
    const set = makeMaskSet('kept');
    const first = await admin('POST', '/mask-sets', set);
    expect(first.status).toBe(201);
    const summary = await first.json<MaskSetSummary>();
    expect(summary).toMatchObject({
      version: maskSetVersion(set),
      tenant: '',
      name: 'kept',
      clusters: 3,
      reached_sparsity: set.reachedSparsity,
    });
    const again = await admin('POST', '/mask-sets', Object.fromEntries(Object.entries(set).reverse()));
    expect(again.status).toBe(200);
    expect(await again.json()).toEqual(summary);
    expect(await (await admin('GET', `/mask-sets/${summary.version}`)).json()).toEqual(set);
    const { data } = await (await admin('GET', '/mask-sets')).json<{ data: MaskSetSummary[] }>();
    expect(data.filter(({ version }) => version === summary.version)).toEqual([summary]);
    expect(await errorCode(admin('GET', '/mask-sets/v_0'))).toBe('404 not_found');
  });

  it('that contradicts itself is refused with the place', async () => {
    const set = makeMaskSet('bad');
    const [first, ...rest] = set.clusters;
    const wrong: [unknown, RegExp][] = [
      [{ ...set, clusters: [{ ...first, mask: `m_${'0'.repeat(24)}` }, ...rest] }, /its bits say/],
      [{ ...set, clusters: [{ ...first, centroid: [1, 2] }, ...rest] }, /clusters\[0\]: .*2 dimensions/],
      [
        { ...set, clusters: [{ ...first, centroid: ['x', 0, 0, 0] }, ...rest] },
        /clusters\[0\]\.centroid\[0\]/,
      ],
      // Infinite once it is packed into 32 bits: nothing would be near it.
      [
        { ...set, clusters: [{ ...first, centroid: [1e39, 0, 0, 0] }, ...rest] },
        /clusters\[0\]\.centroid\[0\]/,
      ],
      [
        { ...set, clusters: [{ ...first, centroid: [0, -1e39, 0, 0] }, ...rest] },
        /clusters\[0\]\.centroid\[1\]/,
      ],
      [{ ...set, clusters: [] }, /clusters/],
      [{ ...set, format: 'v0' }, /format/],
      [{ ...set, model: { ...set.model, blockCount: 13 } }, /block count/],
      [{ ...set, extra: 1 }, /extra/],
      [[], /expected an object/],
    ];
    for (const [body, message] of wrong) {
      const response = await admin('POST', '/mask-sets', body);
      const text = await response.clone().text();
      expect(text).toMatch(message);
      expect(await errorCode(response)).toBe('400 invalid_mask_set');
    }
  });

  it('that does not fit into a row is refused', async () => {
    const set = makeMaskSet('large', { learned: { notes: 'x'.repeat(1_900_000) } });
    expect(await errorCode(admin('POST', '/mask-sets', set))).toBe('400 invalid_mask_set');
  });

  it('of many clusters is stored whole: D1 takes 100 parameters a statement', async () => {
    const base = makeMaskSet('many');
    const clusters = Array.from({ length: 256 }, (_, i) => ({
      ...base.clusters[i % 3]!,
      centroid: [i, 1, 0, 0],
    }));
    expect((await upload({ ...base, clusters })).clusters).toBe(256);
  });
});

describe('publishing', () => {
  it('is seen at once in the isolate that did it, and within 5 s in every other', async () => {
    const { tenant, key } = await newTenant();
    const other = freshIsolate();
    const { version: one } = await goLive('one', tenant);
    expect(await versionSeen(key)).toBe(one);
    expect(await versionSeen(key, other)).toBe(one);
    const { version: two } = await goLive('two', tenant);
    expect(await versionSeen(key)).toBe(two);
    later(5_000);
    expect(await versionSeen(key, other)).toBe(two);
  });

  it('is seen by the first request of an isolate that was idle for long', async () => {
    const { tenant, key } = await newTenant();
    const idle = freshIsolate();
    const { version: one } = await goLive('one', tenant);
    expect(await versionSeen(key, idle)).toBe(one);
    const { version: two } = await goLive('two', tenant);
    later(3_600_000);
    expect(await versionSeen(key, idle)).toBe(two);
    vi.useRealTimers();
  });

  it('is seen by such a request, too, when D1 takes 400 ms', async () => {
    const { tenant, key } = await newTenant();
    const d1 = badD1();
    const idle = freshIsolate({ DB: d1.DB });
    const { version: one } = await goLive('one', tenant);
    expect(await versionSeen(key, idle)).toBe(one);
    const { version: two } = await goLive('two', tenant);
    d1.be('slow');
    later(3_600_000);
    expect(await versionSeen(key, idle)).toBe(two);
    vi.useRealTimers();
  });

  it("serves the default set to tenants without one of their own, and a tenant's own to it alone", async () => {
    const [a, b] = [await newTenant(), await newTenant()];
    const { version: shared } = await goLive('shared-by-all');
    const { version: own } = await goLive('own', a.tenant);
    expect(await versionSeen(a.key)).toBe(own);
    expect(await versionSeen(b.key)).toBe(shared);
    const { key: tenantAdmin } = await newKey({ tenant: b.tenant, kind: 'tenant_admin' });
    expect(await errorCode(admin('GET', `/mask-sets/${own}`, undefined, tenantAdmin))).toBe('404 not_found');
    const steal = admin('POST', '/publications', { version: own }, tenantAdmin);
    expect(await errorCode(steal)).toBe('404 not_found');
    const borrow = await created<Publication>(
      admin('POST', '/publications', { version: shared }, tenantAdmin),
    );
    expect(borrow).toMatchObject({ tenant: b.tenant, version: shared });
  });

  it('says by what a tenant is routed, its own set or the default one, and to the tenant itself, too', async () => {
    const inUse = async (tenant: string, key?: string) => {
      const response = await admin('GET', `/publications/in-use?tenant=${tenant}`, undefined, key);
      expect(response.status).toBe(200);
      return await response.json<PublicationInUse>();
    };
    const { version: shared } = await goLive('for-everybody');
    const { tenant, key } = await newTenant();
    const { key: tenantAdmin } = await newKey({ tenant, kind: 'tenant_admin' });
    const expectInUse = async (owner: string, version: string) => {
      expect(await versionSeen(key)).toBe(version);
      for (const adminKey of [undefined, tenantAdmin]) {
        const found = await inUse(tenant, adminKey);
        const parts = [{ tenant: owner, version, share: 1 }];
        expect(found).toEqual({ tenant: owner, version, activate_at: expect.any(String), parts });
      }
      const set = await admin('GET', `/mask-sets/${version}`, undefined, tenantAdmin);
      expect(set.status).toBe(200);
    };
    await expectInUse('', shared);
    const { version: own } = await upload(makeMaskSet('own'), tenant);
    const activate_at = new Date(Date.now() + 3_600_000).toISOString();
    await activate(own, { tenant, activate_at });
    await expectInUse('', shared);
    await activate(own, { tenant });
    await expectInUse(tenant, own);
    const { version: next } = await upload(makeMaskSet('next'), tenant);
    await activate(next, { tenant, activate_at });
    await expectInUse(tenant, own);
    await activate(next, { tenant, rollout: [{ share: 0.5, duration_s: 3600 }] });
    expect(await inUse(tenant)).toMatchObject({ version: next });
    const other = await newTenant();
    const foreign = admin('GET', `/publications/in-use?tenant=${other.tenant}`, undefined, tenantAdmin);
    expect(await errorCode(foreign)).toBe('403 forbidden');
    // It cannot take back what is not its own.
    const { key: otherAdmin } = await newKey({ tenant: other.tenant, kind: 'tenant_admin' });
    expect(await errorCode(admin('POST', '/publications/rollback', {}, otherAdmin))).toBe('409 conflict');
    expect(await inUse('')).toMatchObject({ version: shared });
  });

  it('refuses sets that the edge or the backend cannot use', async () => {
    const make = async (change: object) => (await upload({ ...makeMaskSet('refused'), ...change })).version;
    const encoder = { ...makeMaskSet('x').encoder, revision: 'r2' };
    const otherEncoder = await admin('POST', '/publications', { version: await make({ encoder }) });
    expect(await otherEncoder.clone().text()).toMatch(/revision r2.*revision r1/);
    expect(await errorCode(otherEncoder)).toBe('400 encoder_mismatch');

    const dense = [{ centroid: [1, 0, 0, 0], bits: 'fff', mask: 'dense', share: 1 }];
    const model = { name: 'test-model', hash: 'b'.repeat(64), blockCount: 12 };
    const otherModel = admin('POST', '/publications', { version: await make({ model, clusters: dense }) });
    expect(await errorCode(otherModel)).toBe('400 mask_model_mismatch');

    expect(await errorCode(admin('POST', '/publications', { version: `v_${'0'.repeat(24)}` }))).toBe(
      '404 not_found',
    );
    for (const body of [
      {},
      { version: 'v1' },
      { version: 5 },
      { version: `v_${'0'.repeat(24)}`, tenant: 'A b' },
    ]) {
      expect(await errorCode(admin('POST', '/publications', body))).toBe('400 invalid_request');
    }
    const unknown = { version: `v_${'0'.repeat(24)}`, tenant: 'nobody' };
    expect(await errorCode(admin('POST', '/publications', unknown))).toBe('404 not_found');
  });

  it('is refused while the encoder or every backend is missing, so that the set cannot be checked', async () => {
    const { version } = await upload(makeMaskSet('unchecked'));
    const ask = (overrides: Partial<Env>) =>
      call('POST', '/admin/v1/publications', { key: ADMIN_KEY, body: { version } }, freshIsolate(overrides));
    const noEncoder = { ENCODER: 'static', ASSETS: { fetch: async () => new Response('') } as never };
    expect(await errorCode(ask(noEncoder))).toBe('503 not_ready');
    await mood('never-publishes', 'down');
    const gone = await ask({ BACKEND_URL: `${env.BACKEND_URL}/at/never-publishes` });
    expect(gone.headers.get('retry-after')).not.toBeNull();
    expect(await errorCode(gone)).toBe('503 backend_unreachable');
  });

  it('can be checked without being done', async () => {
    const { tenant } = await newTenant();
    const { version } = await upload(makeMaskSet('checked'));
    const response = await admin('POST', '/publications', { tenant, version, activate: false });
    expect(await response.json()).toEqual({ activated: false, version });
    expect(await errorCode(admin('GET', `/publications/live?tenant=${tenant}`))).toBe('404 not_found');
  });

  it('by two at once: one wins, the other gets 409, and the history has one more entry', async () => {
    const { tenant } = await newTenant();
    await goLive('base', tenant);
    const versions = await Promise.all(
      ['left', 'right', 'middle'].map(async (name) => (await upload(makeMaskSet(name))).version),
    );
    const live = await (await admin('GET', `/publications/live?tenant=${tenant}`)).json<LivePublication>();
    const answers = await Promise.all(
      versions.map((version) =>
        admin('POST', '/publications', { tenant, version, expected_version: live.version }),
      ),
    );
    expect(answers.map(({ status }) => status).sort()).toEqual([201, 409, 409]);
    const winner = await answers.find(({ status }) => status === 201)!.json<Publication>();
    for (const loser of answers.filter(({ status }) => status === 409)) {
      expect(await errorCode(loser)).toBe('409 conflict');
    }
    const now = await (await admin('GET', `/publications/live?tenant=${tenant}`)).json();
    const settled = { share: 1, base_version: null, paused_at: null, next_step_at: null };
    expect(now).toEqual({ ...winner, ...settled, previous_version: live.version });
    const { data } = await (await admin('GET', `/publications?tenant=${tenant}`)).json<{ data: unknown[] }>();
    expect(data).toEqual([winner, publicationSchema.parse(live)]);
  });

  it('with a wrong expectation is 409', async () => {
    const { tenant } = await newTenant();
    const { version } = await goLive('base', tenant);
    for (const expected_version of [null, `v_${'0'.repeat(24)}`]) {
      const body = { tenant, version, expected_version };
      expect(await errorCode(admin('POST', '/publications', body))).toBe('409 conflict');
      expect(await errorCode(rollback(tenant, { expected_version }))).toBe('409 conflict');
    }
  });
});

describe('rolling back', () => {
  it('changes only the publication that was seen: the same version may have been published again', async () => {
    const { tenant } = await newTenant();
    const { version } = await goLive('seen', tenant);
    const { version: next } = await goLive('seen-next', tenant);
    const live = async () =>
      await (await admin('GET', `/publications/live?tenant=${tenant}`)).json<LivePublication>();
    const seen = { expected_version: next, expected_publication: (await live()).id };
    await activate(version, { tenant });
    await activate(next, { tenant });
    expect(await errorCode(rollback(tenant, seen))).toBe('409 conflict');
    expect(await errorCode(admin('POST', '/publications/pause', { tenant, ...seen }))).toBe('409 conflict');
    const expected_publication = (await live()).id;
    const back = rollback(tenant, { ...seen, expected_publication });
    expect(await created<Publication>(back)).toMatchObject({ version, replaced_version: next });
  });

  it('goes back one publication at a time, and says when nothing came before', async () => {
    const { tenant, key } = await newTenant();
    const versions: string[] = [];
    for (const name of ['one', 'two', 'three']) versions.push((await goLive(name, tenant)).version);
    for (const expected of [versions[1], versions[0]]) {
      const back = await created<Publication>(rollback(tenant));
      expect(back).toMatchObject({ action: 'rollback', version: expected, actor: 'root' });
      expect(await versionSeen(key)).toBe(expected);
    }
    expect(await errorCode(rollback(tenant))).toBe('409 conflict');
    await activate(versions[2]!, { tenant });
    expect(await versionSeen(key)).toBe(versions[2]);
    await created(rollback(tenant));
    expect(await versionSeen(key)).toBe(versions[0]);
    const { data } = await (await admin('GET', `/publications?tenant=${tenant}`)).json<{
      data: Publication[];
    }>();
    expect(data.map(({ action }) => action).reverse()).toEqual([
      ...['activate', 'activate', 'activate'],
      ...['rollback', 'rollback', 'activate', 'rollback'],
    ]);
    data.slice(0, -1).forEach((entry, i) => {
      expect(entry.replaced_version).toBe(data[i + 1]!.version);
    });
    const [, two, three] = versions;
    const about = await admin('GET', `/publications?tenant=${tenant}&version=${two}`);
    const isAbout = ({ version, replaced_version }: Publication) =>
      [version, replaced_version].includes(two!);
    expect(await about.json()).toMatchObject({ data: data.filter(isAbout), has_more: false });
    expect(data.filter(isAbout)).toHaveLength(4);
    const first = await admin('GET', `/publications?tenant=${tenant}&version=${three}&limit=1`);
    expect(await first.json()).toMatchObject({ data: [data[0]], has_more: true });
    expect(await errorCode(admin('GET', '/publications?version=two'))).toBe('400 invalid_request');
  });

  it('goes where the live publication says, whatever was passed over or taken back before', async () => {
    const { tenant } = await newTenant();
    const previous = async () => {
      const response = await admin('GET', `/publications/live?tenant=${tenant}`);
      return (await response.json<LivePublication>()).previous_version;
    };
    const [a, b, c] = await Promise.all(
      ['a', 'b', 'c'].map(async (name) => (await upload(makeMaskSet(name), tenant)).version),
    );
    const gradual = { tenant, rollout: [{ share: 0.5, duration_s: 3600 }] };
    await activate(a!, gradual);
    expect(await previous()).toBeNull();
    await activate(a!, { tenant });
    // The first one was passed over before everyone saw it: nothing to go back to.
    expect(await previous()).toBeNull();
    await activate(b!, gradual);
    expect(await previous()).toBe(a);
    await activate(c!, { tenant });
    expect(await previous()).toBe(a);
    await activate(b!, { tenant });
    expect(await previous()).toBe(c);
    for (const expected of [c, a]) {
      expect(await created<Publication>(rollback(tenant))).toMatchObject({ version: expected });
    }
    expect(await previous()).toBeNull();
    expect(await errorCode(rollback(tenant))).toBe('409 conflict');
  });

  it('of a tenant that published nothing is 409', async () => {
    const { tenant } = await newTenant();
    expect(await errorCode(rollback(tenant))).toBe('409 conflict');
  });
});

it('readers see the old version or the new one while publications go on, never a mixture', async () => {
  const { tenant, key } = await newTenant();
  const sets = [await goLive('b', tenant), await goLive('a', tenant)];
  const maskOf = new Map(sets.map(({ version, set }) => [version, set.clusters[0]!.mask]));
  let publishing = true;
  let answers = 0;
  const publisher = (async () => {
    for (let i = 0; i < 20; i++) {
      await activate(sets[i % 2]!.version, { tenant });
      const enough = answers + 4;
      await soon(() => expect(answers).toBeGreaterThanOrEqual(enough));
    }
    publishing = false;
  })();
  const seen = new Set<string>();
  const reader = async () => {
    while (publishing) {
      const response = await chat(key);
      const version = response.headers.get('x-maskroute-version')!;
      const { maskroute } = await response.json<{ maskroute: { version: string } }>();
      expect(response.status).toBe(200);
      expect(maskroute.version).toBe(version);
      expect(response.headers.get('x-maskroute-mask')).toBe(maskOf.get(version));
      seen.add(version);
      answers++;
    }
  };
  await Promise.all([publisher, ...Array.from({ length: 4 }, reader)]);
  expect(seen.size).toBe(2);
});

describe('what a tenant asks of its mask sets', () => {
  it('is kept by publications and experiments: sparsity, agreement, figures at all', async () => {
    const { tenant } = await newTenant();
    const limits = { sparsity_max: 0.1, agreement_min: 0.95 };
    expect((await admin('PATCH', `/tenants/${tenant}`, limits)).status).toBe(200);
    const publishing = (version: string) => admin('POST', '/publications', { tenant, version });
    const { version } = await upload(makeMaskSet('plain'), tenant);
    expect(await errorCode(publishing(version))).toBe('403 sparsity_over_ceiling');
    await admin('PATCH', `/tenants/${tenant}`, { sparsity_max: 0.2 });
    const refused = await publishing(version);
    expect(await refused.clone().text()).toMatch(/90 % of held-out tokens; .* asks for 95 %/);
    expect(await errorCode(refused)).toBe('400 quality_below_floor');
    const better = makeMaskSet('better', { heldOut: { learned: { agreement: 0.96 } } });
    expect((await publishing((await upload(better, tenant)).version)).status).toBe(201);
    const silent = makeMaskSet('silent', { heldOut: { dense: { perplexity: 20 } } });
    expect(await errorCode(publishing((await upload(silent, tenant)).version))).toBe('400 quality_unknown');
    const variants = ['a', 'b'].map((name) => ({ name, weight: 1, mask_set: version }));
    await created(admin('POST', '/experiments', { id: 'under-floor', tenant, variants }));
    expect(await errorCode(admin('POST', '/experiments/under-floor/start'))).toBe('400 quality_below_floor');
  });

  it('with surrogates goes live only where a backend serves their table', async () => {
    const base = makeMaskSet('stand-ins');
    const surrogates = `s_${'0'.repeat(24)}` as SurrogatesId;
    const clusters = base.clusters.map((cluster) => ({
      ...cluster,
      mask: maskId(
        base.model.hash as ModelHash,
        withSurrogates(maskFromBits(base.model.blockCount, cluster.bits), surrogates),
      ),
    }));
    const { version } = await upload({ ...base, surrogate: true, surrogates, clusters });
    expect(await errorCode(admin('POST', '/publications', { version }))).toBe('400 surrogates_mismatch');
  });
});
