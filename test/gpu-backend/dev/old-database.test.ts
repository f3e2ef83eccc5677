/**
 * A database of the first release meets today's edge: every later migration runs over its rows, none is lost, and
 * the edge goes on with its tenants, keys and what was live.
 */
import { createHash } from 'node:crypto';
import { cpSync, mkdirSync, mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { convertV4MiniflareOptions, Miniflare } from 'miniflare';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { type Edge, startEdge } from '../../../gpu-backend/dev/edge.ts';
import { applyMigrations, type MigrationDatabase } from '../../../gpu-backend/dev/migrations.ts';
import { type AdminClient, createAdminClient } from '../../../gpu-backend/publication/admin-client.ts';
import { readMaskSet } from '../../../gpu-backend/publication/mask-set-file.ts';
import { livePublication, publicationHistory, rollBack } from '../../../gpu-backend/publication/publish.ts';
import { apiKeySchema, listSchema, tenantSchema } from '../../../shared/admin.ts';
import { maskSetSchema, maskSetVersion } from '../../../shared/mask-set.ts';

const ADMIN_KEY = 'admin-key-of-this-test-0123456789';
const TENANT_KEY = 'mr_live_of-the-first-release-0123456789';
const FIRST = '0000_first.sql';
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

test('later migrations keep every row of the first release, and the edge goes on with them', async () => {
  const before = await oldRows();
  const firstOnly = path.join(folder, 'migrations');
  mkdirSync(firstOnly);
  cpSync(path.join('migrations', FIRST), path.join(firstOnly, FIRST));
  await withDatabase(async (database) => {
    expect(await applyMigrations(database, firstOnly)).toEqual([FIRST]);
    for (const [table, rows] of Object.entries(before)) {
      for (const row of rows) {
        const columns = Object.keys(row);
        const sql = `INSERT INTO ${table} (${columns}) VALUES (${columns.map(() => '?')})`;
        await database
          .prepare(sql)
          .bind(...Object.values(row))
          .run();
      }
    }
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
    const files = readdirSync('migrations')
      .filter((name) => name.endsWith('.sql'))
      .sort();
    expect(applied.results.map((row) => (row as { name: string }).name)).toEqual(files);
    for (const [table, rows] of Object.entries(before).filter(([table]) => table !== 'live')) {
      const { results } = await database.prepare(`SELECT * FROM ${table}`).all();
      for (const row of rows) expect(results, table).toContainEqual(expect.objectContaining(row));
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

  const [newest, first] = await publicationHistory(client, '');
  expect((await livePublication(client, ''))?.version).toBe(newest!.version);
  expect((await rollBack(client, '')).version).toBe(first!.version);
}
