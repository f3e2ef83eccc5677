/** The local edge: real workerd, a D1 that lasts, migrations that go forward only, nothing dropped in silence. */
import { cpSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createServer, type Server } from 'node:http';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { DatabaseSync } from 'node:sqlite';
import { setTimeout as sleep } from 'node:timers/promises';
import { convertV4MiniflareOptions, Miniflare } from 'miniflare';
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { readEdgeConfig } from '../../../gpu-backend/dev/edge-config.ts';
import { type Edge, startEdge } from '../../../gpu-backend/dev/local-edge.ts';
import { applyMigrations } from '../../../gpu-backend/dev/migrations.ts';
import { ensureApiKey } from '../../../gpu-backend/dev/seed.ts';
import { createAdminClient } from '../../../gpu-backend/publication/admin-client.ts';

const ADMIN_KEY = 'admin-key-of-this-test-0123456789';
const projectFolder = path.resolve('.');

let folder: string;
beforeEach(() => {
  folder = mkdtempSync(path.join(tmpdir(), 'edge-'));
});
afterEach(() => rmSync(folder, { recursive: true }));

const start = (port = 0): Promise<Edge> =>
  startEdge({
    projectFolder,
    stateFolder: path.join(folder, 'state'),
    port,
    bindings: { BACKEND_URL: 'http://127.0.0.1:9', BACKEND_KEY: ADMIN_KEY, ADMIN_KEY },
  });

/** Where Miniflare keeps the D1, by a name that it hashes. */
function databaseFile(state: string): string {
  const files = readdirSync(state, { recursive: true, encoding: 'utf8' });
  return path.join(state, files.find((file) => /^d1.*[0-9a-f]{64}\.sqlite$/.test(file))!);
}

const statusOf = async (url: string): Promise<number> => (await fetch(url)).status;

describe('the edge on this machine', () => {
  test('runs the worker; what it keeps outlives it', async () => {
    const first = await start();
    let key: string;
    try {
      expect(await statusOf(`${first.url}/healthz`)).toBe(200);
      expect(await statusOf(`${first.url}/encoder/static.bin`)).toBe(404);
      key = await ensureApiKey(createAdminClient(first.url, ADMIN_KEY), undefined);
    } finally {
      await first.close();
    }
    const second = await start();
    try {
      const client = createAdminClient(second.url, ADMIN_KEY);
      expect(await ensureApiKey(client, key)).toBe(key);
      expect(await ensureApiKey(client, 'mr_live_nobody')).not.toBe(key);
    } finally {
      await second.close();
    }
  });

  test('with its database locked says so within seconds, and is ready again afterwards', async () => {
    const edge = await start();
    try {
      const ask = async () => {
        const asked_ms = performance.now();
        const answer = await (await fetch(`${edge.url}/readyz`)).json();
        expect(performance.now() - asked_ms).toBeLessThan(8_000);
        return answer as { checks: Record<string, string>; routing_table_age_s: number | null };
      };
      expect((await ask()).checks).toMatchObject({ database: 'ok', routing_table: 'ok' });
      const lock = new DatabaseSync(databaseFile(path.join(folder, 'state')));
      lock.exec('BEGIN EXCLUSIVE');
      await sleep(5_000);
      const locked = await ask();
      expect(locked.checks.database).toMatch(/^unreachable since \d{4}-/);
      expect(locked.checks.routing_table).toBe('ok');
      expect(locked.routing_table_age_s).toBeGreaterThanOrEqual(4);
      lock.exec('ROLLBACK');
      lock.close();
      await vi.waitFor(
        async () => {
          const { checks, routing_table_age_s } = await ask();
          expect(checks).toMatchObject({ database: 'ok', routing_table: 'ok' });
          expect(routing_table_age_s).toBeLessThan(4);
        },
        { timeout: 20_000, interval: 500 },
      );
    } finally {
      await edge.close();
    }
  }, 60_000);

  test('says so when its port is taken', async () => {
    const other: Server = createServer().listen(0, '127.0.0.1');
    await new Promise((resolve) => other.once('listening', resolve));
    const { port } = other.address() as { port: number };
    await expect(start(port)).rejects.toMatchObject({ code: 'port_in_use' });
    other.close();
  });

  test('refuses a binding that it cannot give', async () => {
    const toml = readFileSync('wrangler.toml', 'utf8');
    writeFileSync(
      path.join(folder, 'wrangler.toml'),
      `${toml}\n[[kv_namespaces]]\nbinding = "K"\nid = "k"\n`,
    );
    await expect(readEdgeConfig(folder)).rejects.toThrow(/kv_namespaces/);
  });

  test('refuses a Durable Object that no migration makes', async () => {
    const toml = readFileSync('wrangler.toml', 'utf8');
    writeFileSync(
      path.join(folder, 'wrangler.toml'),
      toml.replace('new_sqlite_classes = ["TenantBudget"]', 'new_sqlite_classes = []'),
    );
    await expect(readEdgeConfig(folder)).rejects.toThrow(/TenantBudget/);
  });
});

describe('migrations', () => {
  let miniflare: Miniflare;
  const database = () => miniflare.getD1Database('DB');
  beforeEach(async () => {
    miniflare = new Miniflare(
      convertV4MiniflareOptions({
        modules: [{ type: 'ESModule', path: 'a.js', contents: 'export default {}' }],
        d1Databases: { DB: 'db' },
      }),
    );
    cpSync('migrations', path.join(folder, 'migrations'), { recursive: true });
  });
  afterEach(() => miniflare.dispose());

  const add = (name: string, sql: string) => writeFileSync(path.join(folder, 'migrations', name), sql);
  const apply = async () => applyMigrations(await database(), path.join(folder, 'migrations'));

  test('each is applied once, later ones on top', async () => {
    expect((await apply()).length).toBeGreaterThan(0);
    expect(await apply()).toEqual([]);
    add(
      '9999_more.sql',
      "CREATE TABLE more (a TEXT);\n--> statement-breakpoint\nINSERT INTO more VALUES ('x');",
    );
    expect(await apply()).toEqual(['9999_more.sql']);
    expect(await (await database()).prepare('SELECT a FROM more').all()).toMatchObject({
      results: [{ a: 'x' }],
    });
  });

  test('one that fails half-way leaves nothing, and can be applied once it is right', async () => {
    await apply();
    add(
      '9999_bad.sql',
      'CREATE TABLE half (a TEXT);\n--> statement-breakpoint\nINSERT INTO nowhere VALUES (1);',
    );
    await expect(apply()).rejects.toThrow(/nowhere/);
    add('9999_bad.sql', 'CREATE TABLE half (a TEXT);');
    expect(await apply()).toEqual(['9999_bad.sql']);
  });

  test('a database from a newer version is left alone', async () => {
    add('9999_future.sql', 'CREATE TABLE future (a TEXT);');
    await apply();
    rmSync(path.join(folder, 'migrations', '9999_future.sql'));
    await expect(apply()).rejects.toThrow(/newer.*9999_future/);
  });
});
