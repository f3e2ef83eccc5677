/** What an isolate reads of mask sets: each once, however many there are, and one after the other. */
import { env } from 'cloudflare:workers';
import { describe, expect, it, vi } from 'vitest';
import { createTenantSchema } from '../../../shared/admin/admin-wire.ts';
import { openDatabase } from '../../../workers/db/d1.ts';
import { listStarted } from '../../../workers/db/experiment-rows.ts';
import { findMaskSet, insertMaskSet, writeMaskSet } from '../../../workers/db/mask-set-rows.ts';
import { findLive, flipLive } from '../../../workers/db/publication-rows.ts';
import { insertTenant } from '../../../workers/db/tenant-rows.ts';
import { createRunningExperiments } from '../../../workers/routing/assignment.ts';
import { createRoutingTable } from '../../../workers/routing/live-sets.ts';
import { activate, admin, created, goLive, makeMaskSet, newTenant, upload } from '../support/edge.ts';

const db = openDatabase(env.DB);
const hold = (work: Promise<unknown>) => void work;

/** The table over the real database, and what it asked for. */
function counted(bounds?: Parameters<typeof createRoutingTable>[2]) {
  const reads = { live: 0, count: 0, underWay: 0, underWayMax: 0, isDown: false };
  const table = createRoutingTable(
    {
      async findLive(tenant) {
        if (reads.isDown) throw new Error('D1 is down');
        reads.live++;
        return await findLive(db, tenant);
      },
      async findMaskSet(owner, version) {
        reads.count++;
        reads.underWayMax = Math.max(reads.underWayMax, ++reads.underWay);
        try {
          return await findMaskSet(db, owner, version);
        } finally {
          reads.underWay--;
        }
      },
    },
    undefined,
    bounds,
  );
  return { table, reads };
}

type Own = { readonly tenant: string; readonly version: string };
let names = 0;

/** Tenants with a live set of their own. Their rows are written as the admin API writes them, and nothing else is. */
const tenantsWithSets = (count: number): Promise<Own[]> =>
  Promise.all(
    Array.from({ length: count }, async () => {
      const tenant = `own-${++names}`;
      await insertTenant(db, createTenantSchema.parse({ id: tenant, name: tenant }), Date.now());
      const written = writeMaskSet(makeMaskSet(tenant));
      const { summary } = await insertMaskSet(db, tenant, written, Date.now());
      const { version } = summary;
      const first = {
        action: 'activate',
        actor: 'test',
        createdAt_ms: Date.now(),
        activateAt_ms: null,
      } as const;
      const plain = {
        rollout: [],
        autoRollback: null,
        reason: null,
        rolloutId: null,
        pausedAt_ms: null,
        replacedVersion: null,
        previousId: null,
      };
      await flipLive(db, { id: tenant, tenant, owner: tenant, version, ...first, ...plain }, null);
      return { tenant, version };
    }),
  );

/** Room for about this many of the sets that tests make. */
const roomFor = (sets: number): number => sets * (3 * 500 + 3 * 4 * 4);

describe('live sets', () => {
  it('of more than 64 tenants are read once each', async () => {
    const tenants = await tenantsWithSets(66);
    // One that has room for all of them, and one that has not.
    for (const { table, reads } of [counted(), counted({ decodedMax_bytes: roomFor(20) })]) {
      for (let refreshes = 0; refreshes < 3; refreshes++) {
        for (const { tenant } of tenants) await table.refresh(tenant, hold);
      }
      expect(reads.count).toBe(66);
    }
  }, 60_000);

  it('of both sides of a gradual publication are read once each', async () => {
    const { tenant } = await newTenant();
    await goLive('old', tenant);
    const { version } = await upload(makeMaskSet('new'), tenant);
    await activate(version, { tenant, rollout: [{ share: 0.5, duration_s: 3600 }] });
    const { table, reads } = counted({ decodedMax_bytes: roomFor(1) });
    for (let refreshes = 0; refreshes < 3; refreshes++) await table.refresh(tenant, hold);
    expect(reads.count).toBe(2);
  });

  it('are held up to a bound: tenants used longest ago are let go, and read again as new ones', async () => {
    const own = await tenantsWithSets(12);
    const shared = (await upload(makeMaskSet('of-many'))).version;
    const sharers = await Promise.all(Array.from({ length: 4 }, async () => (await newTenant()).tenant));
    for (const tenant of sharers) await activate(shared, { tenant });
    await goLive('default');
    const { table, reads } = counted({ liveMax_bytes: roomFor(6) });
    const held = (tenants: { tenant: string }[]) =>
      tenants.filter(({ tenant }) => table.age_ms(tenant) !== undefined).length;
    await table.refresh('', hold);
    for (const tenant of sharers) await table.refresh(tenant, hold);
    for (const { tenant, version } of own) {
      expect((await table.liveFor(tenant, () => '', hold))?.version).toBe(version);
      for (const sharer of sharers) {
        expect((await table.liveFor(sharer, () => '', hold))?.version).toBe(shared);
      }
    }
    // Of the six, the default set is one, that of the four tenants is one.
    expect(held(own)).toBe(4);
    expect(held(own.slice(-4))).toBe(4);
    expect(held([{ tenant: '' }])).toBe(1);
    const [first, second] = own;
    expect((await table.liveFor(first!.tenant, () => '', hold))?.version).toBe(first!.version);
    await activate(shared, { tenant: second!.tenant });
    expect((await table.liveFor(second!.tenant, () => '', hold))?.version).toBe(shared);
    expect(reads.live).toBe(1 + 4 + 12 + 2);
  });

  it('of both sides of a gradual publication count, and nobody who is held is let go while D1 is down', async () => {
    await goLive('another-default');
    const tenants = await tenantsWithSets(3);
    const [a, b, c] = tenants.map(({ tenant }) => tenant) as [string, string, string];
    const { version } = await upload(makeMaskSet('new'), c);
    await activate(version, { tenant: c, rollout: [{ share: 0.5, duration_s: 3600 }] });
    const { table, reads } = counted({ liveMax_bytes: roomFor(4) });
    for (const tenant of [a, b, '', c]) await table.refresh(tenant, hold);
    const seen = async (tenant: string) => (await table.liveFor(tenant, () => '', hold))?.version;
    expect(table.age_ms(a)).toBeUndefined();
    expect(await seen(b)).toBe(tenants[1]!.version);
    expect([version, tenants[2]!.version]).toContain(await seen(c));
    reads.isDown = true;
    vi.useFakeTimers({ toFake: ['Date'], now: Date.now() + 60_000 });
    await expect(table.liveFor(a, () => '', hold)).rejects.toThrow('D1 is down');
    expect((await table.liveFor(b, () => '', hold))?.version).toBe(tenants[1]!.version);
    vi.useRealTimers();
  });

  it('that everyone saw are seen though the clock is set back to before their rollout', async () => {
    const [{ tenant, version: before }] = (await tenantsWithSets(1)) as [Own];
    const { version } = await upload(makeMaskSet('new'), tenant);
    await activate(version, { tenant, rollout: [{ share: 0.01, duration_s: 60 }] });
    const { table } = counted();
    const started_ms = Date.now();
    vi.useFakeTimers({ toFake: ['Date'], now: started_ms + 61_000 });
    expect((await table.liveFor(tenant, () => '', hold))?.version).toBe(version);
    vi.setSystemTime(started_ms - 3_600_000);
    expect((await table.liveFor(tenant, () => '', hold))?.version).toBe(version);
    // When it is read again, the clock alone says who sees it.
    await table.refresh(tenant, hold);
    expect((await table.liveFor(tenant, () => '', hold))?.version).toBe(before);
    vi.useRealTimers();
  });

  it('that were used last are kept', async () => {
    const { tenant } = await newTenant();
    const versions: string[] = [];
    for (const name of ['a', 'b', 'c']) versions.push((await upload(makeMaskSet(name), tenant)).version);
    const [a, b, c] = versions as [string, string, string];
    const { table, reads } = counted({ decodedMax_bytes: roomFor(2) });
    for (const version of [a, b, a, c]) await table.versionOf(tenant, version);
    expect(reads.count).toBe(3);
    await table.versionOf(tenant, a);
    expect(reads.count).toBe(3);
    await table.versionOf(tenant, b);
    expect(reads.count).toBe(4);
  });
});

it('the sets of experiments are read once each, and one after the other', async () => {
  const { tenant } = await newTenant();
  for (let id = 0; id < 2; id++) {
    const variants = [];
    for (let arm = 0; arm < 4; arm++) {
      const { version } = await upload(makeMaskSet(`arm-${id}-${arm}`), tenant);
      variants.push({ name: `arm-${arm}`, weight: 1, mask_set: version });
    }
    const regions = [{ country: `B${id}` }];
    await created(admin('POST', '/experiments', { id: `read-${id}`, tenant, variants, regions }));
    expect((await admin('POST', `/experiments/read-${id}/start`)).status).toBe(200);
  }
  const { table, reads } = counted({ decodedMax_bytes: roomFor(1) });
  const running = createRunningExperiments(
    async () => (await listStarted(db, Date.now())).experiments,
    table,
  );
  for (let refreshes = 0; refreshes < 3; refreshes++) await running.refresh(hold);
  expect((await running.list(hold)).map(({ arms }) => arms.length)).toEqual([4, 4]);
  expect(reads).toMatchObject({ count: 8, underWayMax: 1 });
});
