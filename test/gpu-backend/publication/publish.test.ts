/** Publishing to a real edge: workerd, the shipped encoder, a D1 in memory. */
import { once } from 'node:events';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createServer, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, test, vi } from 'vitest';
import { z } from 'zod';
import { parseSchedule } from '../../../gpu-backend/cli/publish-flags.ts';
import { type Edge, startEdge } from '../../../gpu-backend/dev/local-edge.ts';
import { ensureApiKey, ensurePreset, seed, storePreset } from '../../../gpu-backend/dev/seed.ts';
import { evaluationSchema } from '../../../gpu-backend/learning/evaluation/result.ts';
import {
  type AdminClient,
  createAdminClient,
  listAll,
} from '../../../gpu-backend/publication/admin-client.ts';
import {
  firstTry,
  livePublication,
  namesOfVersions,
  publicationHistory,
  publishMaskSet,
  readMaskSet,
  requireMayPublish,
  rollBack,
  storeMaskSet,
} from '../../../gpu-backend/publication/publish.ts';
import { createdKeySchema, listSchema } from '../../../shared/admin/admin-wire.ts';
import { maskSetSummarySchema, publicationSchema } from '../../../shared/admin/publication-wire.ts';
import { evaluatedRowSchema } from '../../../shared/admin/stats-wire.ts';
import { loadStaticEncoder } from '../../../shared/embedding/static-encoder.ts';
import { type ModelHash, maskBits, maskFromSkippedLayers, maskId } from '../../../shared/mask/mask.ts';
import { type MaskSet, maskSetVersion } from '../../../shared/mask/mask-set.ts';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { madeUpEvaluation } from '../../support/evaluation.ts';
import { saidInProcess } from '../cli/in-process.ts';

const ADMIN_KEY = 'admin-key-of-this-test-0123456789';
const MODEL = { name: 'tiny', hash: 'ab'.repeat(32) as ModelHash, blockCount: 8 };
const { spec } = loadStaticEncoder(readFileSync('workers/assets/encoder/static.bin'));

/** A valid set with one cluster that skips one attention block. */
function maskSet(name: string, skippedLayer = 0): MaskSet {
  const mask = maskFromSkippedLayers(MODEL.blockCount, { skipAttention: [skippedLayer], skipFfn: [] });
  const centroid = Array.from({ length: spec.dimensions }, (_, index) => (index === 0 ? 1 : 0));
  return {
    format: 'maskroute-mask-set-v1',
    name,
    model: MODEL,
    encoder: spec,
    clusters: [{ centroid, bits: maskBits(mask), mask: maskId(MODEL.hash, mask), share: 1 }],
    targetSparsity: 0.125,
    reachedSparsity: 0.125,
    surrogate: false,
    learned: {},
    heldOut: { learned: { agreement: 0.9 } },
    createdAt: '2026-01-01T00:00:00.000Z',
  };
}

/** The part of a backend that a publication needs: which models are served. */
const backend = createServer((_request, response) => {
  const maskroute = { hash: MODEL.hash, block_count: MODEL.blockCount, context_tokens: 64, dense: false };
  const entry = { id: MODEL.name, object: 'model', created: 0, owned_by: 'test', maskroute };
  response.writeHead(200, { 'content-type': 'application/json' });
  response.end(JSON.stringify({ object: 'list', data: [entry] }));
});

function forOtherModel(set: MaskSet): MaskSet {
  const model = { ...MODEL, hash: 'cd'.repeat(32) as ModelHash };
  return { ...set, model, clusters: [{ ...set.clusters[0]!, bits: 'ff', mask: 'dense' }] };
}

let edge: Edge;
let client: AdminClient;
beforeAll(async () => {
  await once(backend.listen(0, '127.0.0.1'), 'listening');
  const BACKEND_URL = `http://127.0.0.1:${(backend.address() as AddressInfo).port}`;
  const bindings = { BACKEND_URL, BACKEND_KEY: ADMIN_KEY, ADMIN_KEY };
  edge = await startEdge({ projectFolder: path.resolve('.'), stateFolder: undefined, port: 0, bindings });
  client = createAdminClient(`${edge.url}/`, ADMIN_KEY);
}, 60_000);
afterAll(async () => {
  await edge?.close();
  backend.close();
});

const liveVersion = async (tenant = '') => (await livePublication(client, tenant))?.version;
const rollBackNow = async (at: AdminClient) => rollBack(at, '', await livePublication(at, ''));
const DEFAULT = { tenant: '', activate: true };

/** A client that reads one item a page. `pages()`: how many it has read of the history; `refuse` may throw instead. */
function pagingClient(refuse: (path: string) => void = () => {}): AdminClient & { pages(): number } {
  let pages = 0;
  return {
    edge: client.edge,
    pages: () => pages,
    async request({ path, ...asked }, schema) {
      if (!path.startsWith('/publications?')) return client.request({ ...asked, path }, schema);
      refuse(path);
      pages++;
      return client.request({ ...asked, path: `${path}&limit=1` }, schema);
    },
  };
}

describe('a mask set', () => {
  test('is stored, goes live, goes live again, and is rolled back', async () => {
    const [first, second] = [maskSet('one', 0), maskSet('one', 1)];
    expect(await liveVersion()).toBeUndefined();
    expect(await publishMaskSet(client, first, { tenant: '', activate: false })).toMatchObject({
      state: 'stored',
    });
    expect(await liveVersion()).toBeUndefined();

    expect(await publishMaskSet(client, first, DEFAULT)).toMatchObject({
      state: 'activated',
      replacedVersion: null,
    });
    expect(await publishMaskSet(client, first, DEFAULT)).toMatchObject({ state: 'already_live' });
    const replaced = await publishMaskSet(client, second, DEFAULT);
    expect(replaced).toEqual({
      version: maskSetVersion(second),
      state: 'activated',
      replacedVersion: maskSetVersion(first),
    });
    expect(await rollBackNow(client)).toMatchObject({ version: maskSetVersion(first) });
    expect(await liveVersion()).toBe(maskSetVersion(first));

    const history = await publicationHistory(client, '');
    expect(history.map(({ version }) => version)).toEqual([first, second, first].map(maskSetVersion));
    expect(await listAll(client, '/publications?limit=1', publicationSchema)).toEqual(history);
    const request = vi.spyOn(client, 'request');
    const two = await listAll(client, '/publications?limit=1', publicationSchema, 2);
    expect(two).toEqual(history.slice(0, 2));
    expect(request).toHaveBeenCalledTimes(2);
    request.mockRestore();
  });

  test('is not rolled back where another one went live since its rollback was confirmed', async () => {
    const tenant = 'meanwhile';
    const path = '/tenants';
    await client.request({ method: 'POST', path, body: { id: tenant, name: tenant } }, z.unknown());
    for (const layer of [0, 1])
      await publishMaskSet(client, maskSet('steady', layer), { tenant, activate: true });
    const confirmed = await livePublication(client, tenant);
    await publishMaskSet(client, maskSet('sudden', 2), { tenant, activate: true });
    await expect(rollBack(client, tenant, confirmed)).rejects.toMatchObject({ code: 'conflict' });
    expect(await liveVersion(tenant)).toBe(maskSetVersion(maskSet('sudden', 2)));
    // The confirmed version again, but over another one.
    await publishMaskSet(client, maskSet('steady', 1), { tenant, activate: true });
    await expect(rollBack(client, tenant, confirmed)).rejects.toMatchObject({ code: 'conflict' });
    expect(await liveVersion(tenant)).toBe(confirmed!.version);
  });

  test('is named with one question, and one more where it is not among the newest', async () => {
    const [oldest, older, newest] = [maskSet('oldest', 1), maskSet('older', 2), maskSet('newest', 3)];
    for (const set of [oldest, older, newest]) await storeMaskSet(client, set, '');
    let requests = 0;
    /** One set a page. */
    const paging: AdminClient = {
      edge: client.edge,
      request({ path, ...asked }, schema) {
        requests++;
        return client.request({ ...asked, path: path === '/mask-sets' ? `${path}?limit=1` : path }, schema);
      },
    };
    const named = async (...sets: MaskSet[]) => {
      requests = 0;
      const names = await namesOfVersions(paging, '', sets.map(maskSetVersion));
      return { names: [...names.values()], requests };
    };
    expect(await named()).toEqual({ names: [], requests: 0 });
    expect(await named(newest)).toEqual({ names: ['newest'], requests: 1 });
    expect(await named(oldest)).toEqual({ names: ['oldest'], requests: 2 });
    expect(await named(newest, older)).toEqual({ names: ['newest', 'older'], requests: 2 });
  });

  test('goes live by a schedule, and for everyone when it is published again without one', async () => {
    const [before, after] = [maskSet('before'), maskSet('after', 2)];
    await publishMaskSet(client, before, DEFAULT);
    const schedule = parseSchedule({ rollout: '1%:10m, 10%:1h', maxErrorRate: 0.05, minRequests: 20 });
    const outcome = await publishMaskSet(client, after, { ...DEFAULT, schedule });
    expect(outcome).toMatchObject({ state: 'scheduled', replacedVersion: maskSetVersion(before) });
    expect(await livePublication(client, '')).toMatchObject({
      rollout: [
        { share: 0.01, duration_s: 600 },
        { share: 0.1, duration_s: 3600 },
      ],
      auto_rollback: { error_rate_max: 0.05, requests_min: 20 },
      share: 0.01,
      base_version: maskSetVersion(before),
    });
    // Its rollout does not begin again.
    const history = await publicationHistory(client, '');
    const again = await publishMaskSet(client, after, { ...DEFAULT, schedule });
    expect(again).toMatchObject({ state: 'already_scheduled', replacedVersion: null });
    expect(await publicationHistory(client, '')).toEqual(history);
    for (const flags of [{ rollout: '2%:10m' }, { rollout: '2%:10m', maxErrorRate: 0.01 }]) {
      const other = { ...DEFAULT, schedule: parseSchedule(flags) };
      expect(await publishMaskSet(client, after, other)).toMatchObject({ state: 'scheduled' });
    }
    expect(await publishMaskSet(client, after, DEFAULT)).toMatchObject({ state: 'activated' });
    expect(await livePublication(client, '')).toMatchObject({ share: 1, version: maskSetVersion(after) });
    expect(await publishMaskSet(client, after, DEFAULT)).toMatchObject({ state: 'already_live' });
  });

  describe('that is published again', () => {
    const folder = mkdtempSync(path.join(tmpdir(), 'maskroute-tries-'));
    afterAll(() => rmSync(folder, { recursive: true }));
    const [set, other] = [maskSet('again', 3), maskSet('again', 2)];
    const unlessRolledBack = true;
    /** Publishes one set after the other for a tenant of its own; null is a rollback. @returns what became of each. */
    async function statesOf(
      tenant: string,
      steps: readonly (readonly [MaskSet, Partial<Parameters<typeof publishMaskSet>[2]>?] | null)[],
    ): Promise<(string | null)[]> {
      const states: (string | null)[] = [];
      for (const step of steps) {
        if (step === null) await rollBack(client, tenant, await livePublication(client, tenant));
        const published =
          step && (await publishMaskSet(client, step[0], { tenant, activate: true, ...step[1] }));
        states.push(published?.state ?? null);
      }
      return states;
    }
    const newTenant = (id: string) =>
      client.request({ method: 'POST', path: '/tenants', body: { id, name: id } }, z.unknown());

    test('by a script that runs again goes live once for each file, also where it was rolled back before', async () => {
      const tenant = 'tries';
      await newTenant(tenant);
      const tryOf = (name: string) => firstTry(client, tenant, path.join(folder, name));
      expect(await tryOf('none.json')).toBeNull();
      await statesOf(tenant, [[other], [set], null]);
      const since = await tryOf('one.json');
      expect(await statesOf(tenant, [[set, { since }], [set, { since }], null])).toEqual([
        'activated',
        'published_before',
        null,
      ]);
      const history = await publicationHistory(client, tenant);
      const repeated = { since: await tryOf('one.json') };
      expect(await publishMaskSet(client, set, { tenant, activate: true, ...repeated })).toEqual({
        state: 'published_before',
        version: maskSetVersion(set),
        replacedVersion: null,
      });
      expect(await publicationHistory(client, tenant)).toEqual(history);
      expect(await statesOf(tenant, [[set, { since: await tryOf('none.json') }]])).toEqual([
        'published_before',
      ]);
      // The edge has lost that publication: its database was restored from a backup.
      expect(await statesOf(tenant, [[set, { since: 'p_lost' }]])).toEqual(['published_before']);
      expect(await statesOf(tenant, [[set, { since: await tryOf('another.json') }]])).toEqual(['activated']);
    });

    test('has a file in a folder that is made, and is told which file it cannot read', async () => {
      const file = path.join(folder, 'new', 'first-try.json');
      expect(await firstTry(client, '', file)).toBe((await publicationHistory(client, '', 1))[0]!.id);
      await expect(firstTry(client, '', path.dirname(file))).rejects.toMatchObject({
        code: 'invalid_argument',
        message: expect.stringContaining(`${path.dirname(file)} cannot be read`),
      });
    });

    test('with a file of something else is refused, and the file stays', async () => {
      const file = path.join(folder, 'mask-set.json');
      writeFileSync(file, JSON.stringify(set));
      await expect(firstTry(client, '', file)).rejects.toMatchObject({ code: 'invalid_argument' });
      expect(JSON.parse(readFileSync(file, 'utf8'))).toEqual(set);
    });

    test('unless it was rolled back goes live in place of others, and stays away where it was', async () => {
      await newTenant('returns');
      const steps = [
        [set],
        [other],
        [set],
        null,
        [set],
        [other, {}],
        [set],
        [set, {}],
        [other],
        [set],
      ] as const;
      const asked = steps.map((step) => step && ([step[0], step[1] ?? { unlessRolledBack }] as const));
      expect(await statesOf('returns', asked)).toEqual([
        'activated',
        'activated',
        'activated',
        null,
        'rolled_back',
        'already_live',
        'rolled_back',
        // A person may.
        'activated',
        'activated',
        'activated',
      ]);
    });

    test('unless it was rolled back asks the edge about this version, and an older edge for the whole history', async () => {
      const tenant = 'long';
      await newTenant(tenant);
      await statesOf(tenant, [[other], [set], null]);
      for (const layer of [0, 1, 0]) await statesOf(tenant, [[maskSet('again', layer)]]);
      const once = { tenant, activate: true, unlessRolledBack };
      const paging = pagingClient();
      expect((await publishMaskSet(paging, set, once)).state).toBe('rolled_back');
      expect(paging.pages()).toBe(1);

      const unknown = { method: 'GET', path: '/publications?unknown=1' } as const;
      await expect(client.request(unknown, z.unknown())).rejects.toMatchObject({
        code: 'invalid_request',
        param: 'unknown',
      });
      const old = pagingClient((path) => {
        if (path.includes('version='))
          throw new MaskrouteError('invalid_request', 'version: unknown field.', { param: 'version' });
      });
      expect((await publishMaskSet(old, set, once)).state).toBe('rolled_back');
      expect(old.pages()).toBe(4);
    });

    test('unless it was rolled back leaves the steps and the bounds of a live one as they are', async () => {
      await newTenant('kept');
      const [slow, fast] = ['1%:10m', '2%:10m'].map((rollout) =>
        parseSchedule({ rollout, maxErrorRate: 0.1 }),
      );
      const bounds = parseSchedule({ maxErrorRate: 0.2 });
      const states = await statesOf('kept', [
        [other],
        [set, { schedule: slow! }],
        [set, { schedule: fast!, unlessRolledBack }],
        [set, { schedule: bounds }],
        [set, { schedule: fast!, unlessRolledBack }],
      ]);
      expect(states).toEqual(['activated', 'scheduled', 'already_scheduled', 'activated', 'already_live']);
      expect(await livePublication(client, 'kept')).toMatchObject(bounds);
    });
  });

  test('is published by keys that may, which can be asked before there is one', async () => {
    await requireMayPublish(client, '');
    await expect(requireMayPublish(client, 'nobody')).rejects.toMatchObject({
      code: 'not_found',
      param: 'tenant',
    });
    const body = { kind: 'viewer', name: 'reads' };
    const { key } = await client.request({ method: 'POST', path: '/keys', body }, createdKeySchema);
    for (const [wrong, code] of [
      [key, 'forbidden'],
      ['wrong', 'invalid_api_key'],
    ] as const) {
      const other = createAdminClient(edge.url, wrong);
      await expect(requireMayPublish(other, '')).rejects.toMatchObject({ code });
    }
  });

  test('that is live already gets the bounds that come with it', async () => {
    const [before, now] = [maskSet('bounded', 0), maskSet('bounded', 1)];
    await publishMaskSet(client, before, DEFAULT);
    await publishMaskSet(client, now, DEFAULT);
    const bounds = { error_rate_max: 0.05, requests_min: 20 };
    const schedule = { auto_rollback: bounds, rollout: [{ share: 0.1, duration_s: 60 }] };
    expect(await publishMaskSet(client, now, { ...DEFAULT, schedule })).toEqual({
      version: maskSetVersion(now),
      state: 'bounds_changed',
      replacedVersion: null,
    });
    expect(await livePublication(client, '')).toMatchObject({
      version: maskSetVersion(now),
      share: 1,
      auto_rollback: bounds,
    });
    expect((await rollBackNow(client)).version).toBe(maskSetVersion(before));
  });

  test('made for another encoder is refused with the reason', async () => {
    const set = maskSet('other-encoder');
    const other = { ...set, encoder: { ...set.encoder, revision: 'another' } };
    await expect(publishMaskSet(client, other, DEFAULT)).rejects.toMatchObject({ code: 'encoder_mismatch' });
  });

  test('made for a model that nobody serves is refused with the reason', async () => {
    const other = forOtherModel(maskSet('other-model'));
    await expect(publishMaskSet(client, other, DEFAULT)).rejects.toMatchObject({
      code: 'mask_model_mismatch',
    });
  });

  test('that is refused is not stored either', async () => {
    const path = '/mask-sets';
    const stored = () => listAll(client, path, maskSetSummarySchema);
    const before = await stored();
    const unmeasured: MaskSet = { ...maskSet('unmeasured'), heldOut: {} };
    for (const activate of [true, false]) {
      await expect(publishMaskSet(client, unmeasured, { tenant: '', activate })).rejects.toMatchObject({
        code: 'quality_unknown',
      });
      const other = forOtherModel(maskSet('other-model'));
      await expect(publishMaskSet(client, other, { tenant: '', activate })).rejects.toMatchObject({
        code: 'mask_model_mismatch',
      });
    }
    expect(await stored()).toEqual(before);
  });

  test('of an unknown tenant is refused', async () => {
    await expect(
      publishMaskSet(client, maskSet('x'), { tenant: 'nobody', activate: true }),
    ).rejects.toMatchObject({
      code: 'not_found',
    });
  });
});

describe('the preset of a fresh start', () => {
  const [older, newer, own] = [maskSet('preset', 2), maskSet('preset', 3), maskSet('own', 2)];
  test('goes live once, replaces an older preset, and leaves people’s own choices', async () => {
    await publishMaskSet(client, older, DEFAULT);
    expect(await ensurePreset(client, newer)).toBe('published');
    expect(await ensurePreset(client, newer)).toBe('live');
    expect(await liveVersion()).toBe(maskSetVersion(newer));
    await rollBackNow(client);
    const paging = pagingClient();
    expect(await ensurePreset(paging, newer)).toBe('kept_other');
    expect(await liveVersion()).toBe(maskSetVersion(older));
    expect(await ensurePreset(paging, maskSet('preset', 0))).toBe('published');
    expect(paging.pages()).toBe(3);
    await publishMaskSet(client, own, DEFAULT);
    expect(await ensurePreset(client, maskSet('preset', 1))).toBe('kept_other');
    expect(await liveVersion()).toBe(maskSetVersion(own));
  });

  test('is neither live nor stored where other weights are served', async () => {
    const path = '/mask-sets';
    const stored = () => listAll(client, path, maskSetSummarySchema);
    const [before, live] = [await stored(), await liveVersion()];
    const said: string[] = [];
    const { port } = backend.address() as AddressInfo;
    const servers = { edge: edge.url, backend: `http://127.0.0.1:${port}` };
    const keys = { adminKey: ADMIN_KEY, backendKey: ADMIN_KEY };
    const apiKey = await seed(servers, keys, (line) => said.push(line));
    expect(await stored()).toEqual(before);
    expect(await liveVersion()).toBe(live);
    expect(apiKey).toMatch(/./);
    expect(said).toEqual([expect.stringContaining('other weights or surrogates')]);
  });

  test('comes with what was measured of it, where that lies beside it', async () => {
    const folder = mkdtempSync(path.join(tmpdir(), 'maskroute-preset-'));
    const set = maskSet('measured-preset', 2);
    const version = maskSetVersion(set);
    const file = path.join(folder, 'mask-set-25.json');
    const kept = async () =>
      (
        await client.request(
          { method: 'GET', path: `/mask-sets/${version}/evaluation` },
          listSchema(evaluatedRowSchema),
        )
      ).data;
    writeFileSync(file, JSON.stringify(set));
    await storePreset(client, file);
    expect(await kept()).toEqual([]);
    const evaluation = evaluationSchema.parse(madeUpEvaluation(version));
    writeFileSync(path.join(folder, 'evaluation-25.json'), JSON.stringify(evaluation));
    for (let start = 0; start < 2; start++) await storePreset(client, file);
    const rows = await kept();
    expect(rows.map(({ method }) => method)).toEqual(
      [...evaluation.rows, ...evaluation.equalTime].map(({ method }) => method),
    );
    expect(evaluation.rows[1]).toMatchObject(rows[1]!);
    writeFileSync(path.join(folder, 'evaluation-25.json'), JSON.stringify({ rows: [{ method: 'dense' }] }));
    await expect(storePreset(client, file)).rejects.toMatchObject({
      code: 'invalid_argument',
      message: expect.stringContaining('evaluation-25.json: rows[0].matched'),
    });
    rmSync(folder, { recursive: true });
  });

  test('comes with a set that is stored, again and again, and never made live', async () => {
    const before = await liveVersion();
    const stored = maskSet('sparser-preset', 1);
    await storeMaskSet(client, stored, '');
    await storeMaskSet(client, stored, '');
    const { data } = await client.request(
      { method: 'GET', path: '/mask-sets' },
      listSchema(maskSetSummarySchema),
    );
    expect(data.filter(({ name }) => name === stored.name)).toMatchObject([
      { version: maskSetVersion(stored) },
    ]);
    expect(await liveVersion()).toBe(before);
  });
});

test.each([
  [{ at: 'tomorrow' }, /--at/],
  [{ at: '2026-01-01T00:00:00' }, /--at/],
  [{ at: '2026-02-30T00:00:00Z' }, /--at/],
  [{ rollout: '10:1h' }, /--rollout/],
  [{ rollout: '10%' }, /--rollout/],
  [{ minRequests: 5 }, /--min-requests/],
])('a schedule that nobody can follow is refused: %j', (flags, reason) => {
  expect(() => parseSchedule(flags)).toThrow(reason);
});

test('a time is taken with its zone', () => {
  expect(parseSchedule({ at: '2026-01-01T01:00:00+01:00' })).toEqual({
    activate_at: '2026-01-01T00:00:00.000Z',
  });
});

describe('an edge that is not there', () => {
  const NOTHING_LIVE = { error: { message: 'Nothing is live.', code: 'not_found', param: null } };

  test('nobody listens', async () => {
    const nobody = createAdminClient('http://127.0.0.1:9', ADMIN_KEY);
    await expect(rollBackNow(nobody)).rejects.toMatchObject({ code: 'edge_unreachable' });
    const closed = createServer().listen(0);
    const { port } = closed.address() as AddressInfo;
    closed.close();
    const client = createAdminClient(`http://127.0.0.1:${port}`, ADMIN_KEY);
    await expect(rollBackNow(client)).rejects.toThrow(
      `No edge answers at http://127.0.0.1:${port}: connect ECONNREFUSED 127.0.0.1:${port}.`,
    );
  });

  test.each([
    ['takes too long', () => {}, /did not answer within 0\.5 s\. It may have done what it was asked/],
    [
      'cuts the connection',
      (response: ServerResponse) => response.destroy(),
      /No edge answers at .* It may have done what it was asked/,
    ],
  ])('what %s may have made the change', async (_what, answer, reason) => {
    const slow = createServer(({ method }, response) =>
      method === 'GET' ? response.writeHead(404).end(JSON.stringify(NOTHING_LIVE)) : answer(response),
    ).listen(0);
    const { port } = slow.address() as AddressInfo;
    const client = createAdminClient(`http://127.0.0.1:${port}`, ADMIN_KEY, 500);
    await expect(rollBackNow(client)).rejects.toMatchObject({
      code: 'edge_unreachable',
      message: expect.stringMatching(reason),
    });
    slow.closeAllConnections();
    slow.close();
  });

  test('what only asks has changed nothing', async () => {
    const slow = createServer(() => {}).listen(0);
    const { port } = slow.address() as AddressInfo;
    const asking = requireMayPublish(createAdminClient(`http://127.0.0.1:${port}`, ADMIN_KEY, 300), '');
    await expect(asking).rejects.toThrow(/did not answer within 0\.3 s\.$/);
    slow.closeAllConnections();
    slow.close();
  });

  test('is named where a kept API key is tried there', async () => {
    const nobody = createAdminClient('http://127.0.0.1:9', ADMIN_KEY);
    await expect(ensureApiKey(nobody, 'mr_live_kept')).rejects.toMatchObject({
      code: 'edge_unreachable',
      message: expect.stringMatching(/^No edge answers at http:\/\/127\.0\.0\.1:9: /),
    });
  });

  test('a wrong key', async () => {
    await expect(rollBackNow(createAdminClient(edge.url, 'wrong'))).rejects.toMatchObject({
      code: 'invalid_api_key',
    });
  });

  test('an answer that has no end', async () => {
    const dying = createServer((_request, response) => {
      response.writeHead(201, { 'content-type': 'application/json' });
      response.write('{"version": ', () => response.destroy());
    }).listen(0);
    const { port } = dying.address() as AddressInfo;
    const client = createAdminClient(`http://127.0.0.1:${port}`, ADMIN_KEY);
    await expect(rollBackNow(client)).rejects.toMatchObject({
      code: 'edge_unreachable',
      message: `The edge at http://127.0.0.1:${port} did not end its answer.`,
    });
    dying.close();
  });

  test.each([200, 404, 500])('something else listens and answers %i', async (status) => {
    const other = createServer((_request, response) => response.writeHead(status).end('<html>')).listen(0);
    const { port } = other.address() as AddressInfo;
    const stranger = createAdminClient(`http://127.0.0.1:${port}`, ADMIN_KEY);
    await expect(rollBackNow(stranger)).rejects.toMatchObject({ code: 'backend_error' });
    const keys = { adminKey: ADMIN_KEY, backendKey: ADMIN_KEY, apiKey: 'kept' };
    await expect(seed({ edge: stranger.edge, backend: stranger.edge }, keys, () => {})).rejects.toThrow(
      'like a Maskroute edge.',
    );
    other.close();
  });
});

describe('a mask set’s file', () => {
  const folder = mkdtempSync(path.join(tmpdir(), 'mask-set-'));
  afterAll(() => rmSync(folder, { recursive: true }));
  const written = (text: string): string => {
    writeFileSync(path.join(folder, 'set.json'), text);
    return path.join(folder, 'set.json');
  };

  test('is read as it is', async () => {
    expect(await readMaskSet(written(JSON.stringify(maskSet('x'))))).toEqual(maskSet('x'));
  });
  test.each([
    ['{', /is not JSON/],
    ['{}', /format/],
    [JSON.stringify({ ...maskSet('x'), model: { ...MODEL, hash: 'cd'.repeat(32) } }), /mask id/],
    [JSON.stringify({ ...maskSet('x'), reachedSparsity: 2 }), /reachedSparsity/],
  ])('is refused with the reason %#', async (text, reason) => {
    await expect(readMaskSet(written(text))).rejects.toThrow(reason);
  });
  test('that is missing, or a folder, is named', async () => {
    await expect(readMaskSet(path.join(folder, 'nowhere'))).rejects.toThrow(/nowhere cannot be read/);
    await expect(readMaskSet(folder)).rejects.toThrow(/is a folder, not a regular file/);
  });
});

describe('the command line at an edge', () => {
  const folder = mkdtempSync(path.join(tmpdir(), 'publish-cli-'));
  afterAll(() => rmSync(folder, { recursive: true }));
  const fileOf = (set: MaskSet): string => {
    const file = path.join(folder, `${set.name}.json`);
    writeFileSync(file, JSON.stringify(set));
    return file;
  };
  const run = (...args: string[]) =>
    saidInProcess({ MASKROUTE_HOME: folder, MASKROUTE_ADMIN_KEY: ADMIN_KEY }, args);
  /** The same edge by an address that is not this machine's own. */
  const elsewhere = () => edge.url.replace('localhost', '0.0.0.0');
  const tenant = 'cli';

  test('status and history say what is live, and in JSON the same', async () => {
    await client.request(
      { method: 'POST', path: '/tenants', body: { id: tenant, name: tenant } },
      z.unknown(),
    );
    const flags = ['--edge', edge.url, '--tenant', tenant];
    expect((await run('status', ...flags)).stdout).toMatch(/^Live {6}nothing/m);
    expect((await run('history', ...flags)).stdout).toBe(
      `Nothing was published for tenant ${tenant} at ${edge.url}.\n`,
    );
    const set = maskSet('told', 1);
    const published = await run('publish', fileOf(set), ...flags, '--activate', '--json');
    expect(JSON.parse(published.stdout)).toMatchObject({ version: maskSetVersion(set), state: 'activated' });
    const { stdout } = await run('status', ...flags);
    expect(stdout).toContain(`Live      told ${maskSetVersion(set)}, for everyone since`);
    expect(stdout).toMatch(/^Backend {3}default at http:\/\/127\.0\.0\.1:\d+: taking requests/m);
    const status = JSON.parse((await run('status', ...flags, '--json')).stdout);
    expect(status).toMatchObject({ live: { name: 'told', version: maskSetVersion(set), share: 1 }, tenant });
    expect((await run('history', ...flags)).stdout).toMatch(/activate {2}told v_\S+, by root\n$/);
    expect(JSON.parse((await run('history', ...flags, '--json')).stdout)).toMatchObject([{ name: 'told' }]);
    const nobody = await run('status', '--edge', edge.url, '--tenant', 'nobody');
    expect([nobody.status, nobody.stderr]).toEqual([1, 'error: There is no tenant nobody.\n']);
  });

  test("status and history name a set that a tenant has from the default's", async () => {
    const shared = maskSet('shared', 3);
    await storeMaskSet(client, shared, '');
    const tenant = 'borrower';
    await client.request(
      { method: 'POST', path: '/tenants', body: { id: tenant, name: tenant } },
      z.unknown(),
    );
    const body = { tenant, version: maskSetVersion(shared), rollout: [{ share: 0.5, duration_s: 3600 }] };
    await client.request({ method: 'POST', path: '/publications', body }, publicationSchema);
    const flags = ['--edge', edge.url, '--tenant', tenant];
    expect((await run('status', ...flags)).stdout).toContain(`Live      shared ${body.version}, for 50 %`);
    expect((await run('history', ...flags)).stdout).toContain(`shared ${body.version}, in 1 step, by root`);
  });

  test('an evaluation that is not of the set is refused before anything goes live', async () => {
    const set = maskSet('misjudged', 3);
    const other = maskSetVersion(maskSet('told', 1));
    const evaluation = path.join(folder, 'evaluation-of-another.json');
    writeFileSync(evaluation, JSON.stringify(madeUpEvaluation(other)));
    const flags = ['--edge', edge.url, '--tenant', tenant, '--evaluation', evaluation, '--activate'];
    const refused = await run('publish', fileOf(set), ...flags);
    expect([refused.status, refused.stdout]).toEqual([2, '']);
    expect(refused.stderr).toContain(`No row is of ${maskSetVersion(set)}`);
    expect((await livePublication(client, tenant))?.version).toBe(other);
    const stored = await listAll(client, `/mask-sets?tenant=${tenant}`, maskSetSummarySchema);
    expect(stored.map(({ version }) => version)).not.toContain(maskSetVersion(set));
  });

  test('what changes an edge elsewhere says so and wants --yes where nobody can be asked', async () => {
    const flags = ['--edge', elsewhere(), '--tenant', tenant];
    const set = maskSet('next', 2);
    const refused = await run('publish', fileOf(set), ...flags, '--activate');
    expect(refused.status).toBe(2);
    expect(refused.stderr).toContain(`for tenant ${tenant}.\nLive now: told v_`);
    expect(refused.stderr).toMatch(/It will be: next v_\S+, for everyone at once\nerror: .*add --yes\.\n$/);
    const once = ['--once', path.join(folder, 'first-try.json'), '--unless-rolled-back'];
    expect((await run('publish', fileOf(set), ...flags, '--activate', ...once)).stderr).toMatch(
      /, for everyone at once, unless it was published since \S+ was written, unless it is live or was rolled back\n/,
    );
    expect((await livePublication(client, tenant))?.version).toBe(maskSetVersion(maskSet('told', 1)));
    // To store a set changes nothing for anybody.
    expect(await run('publish', fileOf(set), ...flags)).toMatchObject({ status: 0, stderr: '' });

    expect((await run('publish', fileOf(set), ...flags, '--activate', '--yes')).stdout).toContain('next v_');
    const back = await run('rollback', ...flags);
    expect([back.status, back.stderr]).toEqual([
      2,
      expect.stringMatching(/Live now: next v_\S+\nIt will be: told v_/),
    ]);
    expect((await livePublication(client, tenant))?.version).toBe(maskSetVersion(set));
    const { stdout } = await run('rollback', ...flags, '--yes', '--json');
    expect(JSON.parse(stdout)).toMatchObject({
      action: 'rollback',
      version: maskSetVersion(maskSet('told', 1)),
    });
  });
});
