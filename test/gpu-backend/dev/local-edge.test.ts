/** The local edge: real workerd, and a D1 that lasts. */
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { createServer, type Server } from 'node:http';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { DatabaseSync } from 'node:sqlite';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterAll, beforeAll, describe, expect, test, vi } from 'vitest';
import { type Edge, startEdge } from '../../../gpu-backend/dev/local-edge.ts';
import { ensureApiKey } from '../../../gpu-backend/dev/seed.ts';
import { createAdminClient } from '../../../gpu-backend/publication/admin-client.ts';

const ADMIN_KEY = 'admin-key-of-this-test-0123456789';
const projectFolder = path.resolve('.');

/** A start takes seconds: the second test goes on with the edge that the first one left. */
let folder: string;
let edge: Edge | undefined;
beforeAll(() => {
  folder = mkdtempSync(path.join(tmpdir(), 'edge-'));
});
afterAll(async () => {
  await edge?.close();
  rmSync(folder, { recursive: true });
});

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

/** The process of workerd that this one has started; undefined while there is none. */
function workerdBelow(): number | undefined {
  const pids = readFileSync(`/proc/self/task/${process.pid}/children`, 'utf8').trim().split(' ');
  const isWorkerd = (pid: string) => {
    try {
      return readFileSync(`/proc/${pid}/cmdline`, 'utf8').includes('workerd');
    } catch {
      return false;
    }
  };
  const found = pids.find(isWorkerd);
  return found === undefined ? undefined : Number(found);
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
    edge = await start();
    const client = createAdminClient(edge.url, ADMIN_KEY);
    expect(await ensureApiKey(client, key)).toBe(key);
    expect(await ensureApiKey(client, 'mr_live_nobody')).not.toBe(key);
  }, 60_000);

  test('with its database locked says so within seconds, and is ready again afterwards', async () => {
    edge ??= await start();
    const { url } = edge;
    const ask = async () => {
      const asked_ms = performance.now();
      const answer = await (await fetch(`${url}/readyz`)).json();
      expect(performance.now() - asked_ms).toBeLessThan(25_000);
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
  }, 60_000);

  test.runIf(process.platform === 'linux')(
    'has workerd again after its death, and says when it is gone for good',
    async () => {
      edge ??= await start();
      const { url, gone } = edge;
      const first = workerdBelow()!;
      process.kill(first, 'SIGKILL');
      await vi.waitFor(async () => expect(await statusOf(`${url}/healthz`)).toBe(200), 20_000);
      const second = workerdBelow()!;
      expect(second).not.toBe(first);
      process.kill(second, 'SIGKILL');
      // Killed again before it runs.
      const third = await vi.waitFor(
        () => {
          const found = workerdBelow();
          expect(found).toBeOneOf([expect.any(Number)]);
          expect(found).not.toBe(second);
          return found!;
        },
        { timeout: 20_000, interval: 2 },
      );
      process.kill(third, 'SIGKILL');
      expect(await gone).toMatch(/failed to restart/);
      await edge.close();
      edge = undefined;
    },
    60_000,
  );

  test('says so when its port is taken', async () => {
    const other: Server = createServer().listen(0, '127.0.0.1');
    await new Promise((resolve) => other.once('listening', resolve));
    const { port } = other.address() as { port: number };
    await expect(start(port)).rejects.toMatchObject({ code: 'port_in_use' });
    other.close();
  });
});
