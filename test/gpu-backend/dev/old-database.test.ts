/**
 * A database of the first release meets today's edge, by way of one that counted before there were quantiles: every later
 * migration runs over its rows, none is lost, and the edge goes on with its tenants, keys, what was live and its counts.
 */
import { createHash } from 'node:crypto';
import { cpSync, mkdirSync, mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { convertV4MiniflareOptions, Miniflare } from 'miniflare';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { type Edge, startEdge } from '../../../gpu-backend/dev/local-edge.ts';
import { applyMigrations, type MigrationDatabase } from '../../../gpu-backend/dev/migrations.ts';
import { type AdminClient, createAdminClient } from '../../../gpu-backend/publication/admin-client.ts';
import { readMaskSet } from '../../../gpu-backend/publication/artefact-files.ts';
import { livePublication, publicationHistory, rollBack } from '../../../gpu-backend/publication/publish.ts';
import { apiKeySchema, listSchema, tenantSchema } from '../../../shared/admin/admin-wire.ts';
import { experimentResultsSchema } from '../../../shared/admin/experiment-wire.ts';
import { statsSchema } from '../../../shared/admin/stats-wire.ts';
import { maskSetSchema, maskSetVersion } from '../../../shared/mask/mask-set.ts';

const ADMIN_KEY = 'admin-key-of-this-test-0123456789';
const TENANT_KEY = 'mr_live_of-the-first-release-0123456789';
const FIRST = '0000_first.sql';
const QUANTILES = '0007_quantiles.sql';
const PRESET = path.resolve('gpu-backend/presets/smollm2-135m-instruct/mask-set.json');
const THEN_ms = Date.UTC(2026, 0, 1);

let folder: string;
beforeAll(() => {
  folder = mkdtempSync(path.join(tmpdir(), 'old-database-'));
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

type Row = Record<string, unknown>;
type OldDatabase = MigrationDatabase & {
  prepare(sql: string): {
    bind(...values: unknown[]): { run(): Promise<unknown> };
    all(): Promise<{ results: unknown[] }>;
  };
};

/** Opens the database file that the edge uses, without the edge. */
async function withDatabase<T>(work: (database: OldDatabase) => Promise<T>): Promise<T> {
  const miniflare = new Miniflare(
    convertV4MiniflareOptions({
      resourcePersistencePath: path.join(folder, 'state'),
      workers: [
        {
          name: 'maskroute',
          modules: [{ type: 'ESModule', path: 'a.js', contents: 'export default {}' }],
          d1Databases: { DB: 'maskroute' },
        },
      ],
    }),
  );
  try {
    return await work((await miniflare.getD1Database('DB')) as unknown as OldDatabase);
  } finally {
    await miniflare.dispose();
  }
}

async function oldRows(): Promise<Record<string, Row[]>> {
  // What the first release could read: a set without what later ones added.
  const set = await readMaskSet(PRESET);
  const content = JSON.stringify(set);
  const set2 = JSON.stringify({ ...set, name: 'another' });
  const maskSet = (version: string, name: string, text: string) => ({
    owner: '',
    version,
    name,
    model_name: set.model.name,
    model_hash: set.model.hash,
    encoder: set.encoder.id,
    cluster_count: set.clusters.length,
    reached_sparsity: set.reachedSparsity,
    content: text,
    content_bytes: text.length,
    created_at_ms: THEN_ms,
  });
  const version = maskSetVersion(set);
  const version2 = maskSetVersion(maskSetSchema.parse(JSON.parse(set2)));
  const publication = (id: string, of: string, instead: string | null, previous: string | null) => ({
    id,
    tenant: '',
    owner: '',
    version: of,
    replaced_version: instead,
    previous_id: previous,
    action: 'activate',
    actor: 'root',
    created_at_ms: THEN_ms,
  });
  return {
    tenants: [{ id: 'old', name: 'Old & gold', routing_policy: 'last_user', created_at_ms: THEN_ms }],
    api_keys: [
      {
        id: 'k_old',
        kind: 'tenant',
        tenant_id: 'old',
        name: 'first',
        prefix: 'mr_live_of-the',
        sha256: createHash('sha256').update(TENANT_KEY).digest('hex'),
        created_at_ms: THEN_ms,
        expires_at_ms: null,
        revoked_at_ms: null,
      },
    ],
    mask_sets: [maskSet(version, set.name, content), maskSet(version2, 'another', set2)],
    masks: [
      { id: 'm_000000000000000000000000', model_hash: set.model.hash, block_count: 60, bits: 'f'.repeat(15) },
    ],
    publications: [publication('p_1', version, null, null), publication('p_2', version2, version, 'p_1')],
    live: [{ tenant: '', publication_id: 'p_2' }],
    feedback: [
      {
        tenant_id: 'old',
        api_key_id: 'k_old',
        completion_id: 'chatcmpl-1',
        rating: 1,
        comment: 'good',
        created_at_ms: THEN_ms,
      },
    ],
  };
}

/** What a release without quantiles had counted: ten requests of an experiment's variant, one of them not yet added up. */
function countedRows(): Record<string, Row[]> {
  const variants = ['a', 'b'].map((name) => ({ name, weight: 1, mask_set: 'dense' }));
  const definition = JSON.stringify({ variants, tenants: ['old'], models: ['another'] });
  const of = { experiment: 'before', variant: 'a', region: 'local' };
  const seen = {
    ...{
      tenant: 'old',
      model: 'smollm2-135m-instruct',
      version: '',
      cluster: -1,
      mask: 'dense',
      sparsity: 0,
    },
    ...{ fallback: 'none', ...of },
  };
  const sums = {
    ...{ requests: 10, errors: 1, ttft_count: 9, ttft_sum: 90, ttft_sq: 900, tpot_count: 9, tpot_sum: 45 },
    ...{ tpot_sq: 225, prompt_tokens: 100, completion_tokens: 50, completion_tokens_sq: 250, ratings: 1 },
    ...{ ratings_up: 1, agreement_count: 0, agreement_sum: 0, agreement_sq: 0 },
  };
  const minute = Math.floor(Date.now() / 60_000) - 10;
  const event = {
    ...{
      id: 'e_1',
      batch: 'b_1',
      created_at_ms: minute * 60_000,
      day: '2026-01-01',
      key_id: 'k_old',
      ...seen,
    },
    ...{
      requests: 1,
      errors: 0,
      failures: 0,
      ttft_ms: 10,
      tpot_ms: 5,
      prompt_tokens: 10,
      completion_tokens: 5,
    },
  };
  const started = {
    starts_at_ms: THEN_ms,
    ends_at_ms: null,
    stopped_at_ms: null,
    revision: 1,
    actor: 'root',
  };
  const own = JSON.stringify({ variants, models: ['another'] });
  return {
    experiments: [
      { id: 'before', owner: '', definition, created_at_ms: THEN_ms, ...started },
      { id: 'own', owner: 'old', definition: own, created_at_ms: THEN_ms, ...started, revision: 2 },
    ],
    events: [event, { ...event, id: 'e_2', experiment: 'own' }],
    outcomes: [{ minute, ...seen, ...sums }],
    variant_outcomes: [
      { ...of, ...sums },
      { ...of, ...sums, experiment: 'own', requests: 7 },
    ],
  };
}

async function insert(database: OldDatabase, tables: Record<string, Row[]>): Promise<void> {
  for (const [table, rows] of Object.entries(tables)) {
    for (const row of rows) {
      const columns = Object.keys(row);
      const sql = `INSERT INTO ${table} (${columns}) VALUES (${columns.map(() => '?')})`;
      await database
        .prepare(sql)
        .bind(...Object.values(row))
        .run();
    }
  }
}

test('later migrations keep every row of the first release, and the edge goes on with them', async () => {
  const first = await oldRows();
  const counted = countedRows();
  const before = { ...first, ...counted };
  const some = path.join(folder, 'migrations');
  mkdirSync(some);
  const files = readdirSync('migrations').filter((name) => name.endsWith('.sql'));
  await withDatabase(async (database) => {
    cpSync(path.join('migrations', FIRST), path.join(some, FIRST));
    expect(await applyMigrations(database, some)).toEqual([FIRST]);
    await insert(database, first);
    for (const name of files.filter((name) => name < QUANTILES)) {
      cpSync(path.join('migrations', name), path.join(some, name));
    }
    await applyMigrations(database, some);
    await insert(database, counted);
  });

  const edge: Edge = await startEdge({
    projectFolder: path.resolve('.'),
    stateFolder: path.join(folder, 'state'),
    port: 0,
    bindings: { BACKEND_URL: 'http://127.0.0.1:9', BACKEND_KEY: ADMIN_KEY, ADMIN_KEY },
  });
  try {
    await goesOn(createAdminClient(edge.url, ADMIN_KEY), edge.url);
  } finally {
    await edge.close();
  }

  await withDatabase(async (database) => {
    const applied = await database.prepare('SELECT name FROM d1_migrations ORDER BY id').all();
    expect(applied.results.map((row) => (row as { name: string }).name)).toEqual(files.toSorted());
    for (const [table, rows] of Object.entries(before).filter(([table]) => table !== 'live')) {
      const { results } = await database.prepare(`SELECT * FROM ${table}`).all();
      for (const row of rows) expect(results, table).toContainEqual(expect.objectContaining(row));
    }
    // Ids became their owners' own: what was counted before is whose the experiment is.
    for (const table of ['events', 'variant_outcomes']) {
      const rows = await database.prepare(`SELECT experiment, experiment_owner FROM ${table}`).all();
      expect(rows.results, table).toEqual([
        { experiment: 'before', experiment_owner: '' },
        { experiment: 'own', experiment_owner: 'old' },
      ]);
    }
  });
}, 120_000);

async function goesOn(client: AdminClient, edge: string): Promise<void> {
  const tenants = await client.request({ method: 'GET', path: '/tenants' }, listSchema(tenantSchema));
  expect(tenants.data).toMatchObject([{ id: 'old', name: 'Old & gold', routing_policy: 'last_user' }]);
  const keys = await client.request({ method: 'GET', path: '/keys?tenant=old' }, listSchema(apiKeySchema));
  expect(keys.data).toMatchObject([{ id: 'k_old', revoked_at: null }]);

  const headers = { authorization: `Bearer ${TENANT_KEY}`, 'content-type': 'application/json' };
  const body = {
    model: 'smollm2-135m-instruct',
    messages: [{ role: 'user', content: 'How much is 2 and 2?' }],
  };
  const routed = await fetch(`${edge}/v1/route`, { method: 'POST', headers, body: JSON.stringify(body) });
  expect(routed.status).toBe(200);
  expect(await routed.json()).toMatchObject({ maskroute: { mask_set: 'another' } });

  const stats = await client.request({ method: 'GET', path: '/stats?tenant=old' }, statsSchema);
  expect(stats.routing.reduce((sum, { requests }) => sum + requests, 0)).toBe(10);
  const results = { method: 'GET', path: '/experiments/before/results' } as const;
  const { variants } = await client.request(results, experimentResultsSchema);
  const own = { method: 'GET', path: '/experiments/own/results?tenant=old' } as const;
  expect((await client.request(own, experimentResultsSchema)).variants[0]!.figures.requests).toBe(7);
  expect(variants[0]!.figures).toMatchObject({ requests: 10, ttft_ms: 10, ttft_quantiles_ms: null });

  const [newest, first] = await publicationHistory(client, '');
  expect((await livePublication(client, ''))?.version).toBe(newest!.version);
  expect((await rollBack(client, '')).version).toBe(first!.version);
}
