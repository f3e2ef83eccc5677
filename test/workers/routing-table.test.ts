/** What an isolate reads of mask sets: each once, however many there are, and one after the other. */
import { env } from 'cloudflare:workers';
import { describe, expect, it } from 'vitest';
import { openDatabase } from '../../workers/db/client.ts';
import { listStarted } from '../../workers/db/experiments.ts';
import { findMaskSet } from '../../workers/db/mask-sets.ts';
import { findLive } from '../../workers/db/publications.ts';
import { createRoutingTable } from '../../workers/services/routing-table.ts';
import { createRunningExperiments } from '../../workers/services/running-experiments.ts';
import { activate, admin, created, goLive, makeMaskSet, newTenant, upload } from './support/edge.ts';

const db = openDatabase(env.DB);
const hold = (work: Promise<unknown>) => void work;

/** The table over the real database, and what it asked for. */
function counted(decodedMax_bytes?: number) {
  const reads = { count: 0, underWay: 0, underWayMax: 0 };
  const table = createRoutingTable(
    {
      findLive: (tenant) => findLive(db, tenant),
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
    decodedMax_bytes,
  );
  return { table, reads };
}

/** Room for about this many of the sets that tests make. */
const roomFor = (sets: number): number => sets * (3 * 500 + 3 * 4 * 4);

describe('live sets', () => {
  it('of more than 64 tenants are read once each', async () => {
    const tenants: { tenant: string; version: string }[] = [];
    const add = async (i: number) => {
      const { tenant } = await newTenant();
      tenants.push({ tenant, version: (await goLive(`own-${i}`, tenant)).version });
    };
    while (tenants.length < 66) await Promise.all([0, 1, 2, 3, 4, 5].map((i) => add(tenants.length + i)));
    // One that has room for all of them, and one that has not.
    for (const { table, reads } of [counted(), counted(roomFor(20))]) {
      for (let refreshes = 0; refreshes < 3; refreshes++) {
        for (const { tenant, version } of tenants) {
          await table.refresh(tenant, hold);
          expect(table.fresh(tenant, () => '')?.version ?? version).toBe(version);
        }
      }
      expect(reads.count).toBe(66);
    }
  }, 60_000);

  it('of both sides of a gradual publication are read once each', async () => {
    const { tenant } = await newTenant();
    await goLive('old', tenant);
    const { version } = await upload(makeMaskSet('new'), tenant);
    await activate(version, { tenant, rollout: [{ share: 0.5, duration_s: 3600 }] });
    const { table, reads } = counted(roomFor(1));
    for (let refreshes = 0; refreshes < 3; refreshes++) await table.refresh(tenant, hold);
    expect(reads.count).toBe(2);
  });

  it('that were used last are kept', async () => {
    const { tenant } = await newTenant();
    const versions: string[] = [];
    for (const name of ['a', 'b', 'c']) versions.push((await upload(makeMaskSet(name), tenant)).version);
    const [a, b, c] = versions as [string, string, string];
    const { table, reads } = counted(roomFor(2));
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
  const { table, reads } = counted(roomFor(1));
  const running = createRunningExperiments(
    async () => (await listStarted(db, Date.now())).experiments,
    table,
  );
  for (let refreshes = 0; refreshes < 3; refreshes++) await running.refresh(hold);
  expect((await running.list(hold)).map(({ arms }) => arms.length)).toEqual([4, 4]);
  expect(reads).toMatchObject({ count: 8, underWayMax: 1 });
});
