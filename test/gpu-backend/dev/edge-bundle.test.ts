/** wrangler.toml on one machine: nothing of it is dropped in silence. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { readEdgeConfig } from '../../../gpu-backend/dev/edge-bundle.ts';

let folder: string;
beforeEach(() => {
  folder = mkdtempSync(path.join(tmpdir(), 'edge-config-'));
});
afterEach(() => rmSync(folder, { recursive: true }));

const toml = readFileSync('wrangler.toml', 'utf8');
async function read(text: string) {
  writeFileSync(path.join(folder, 'wrangler.toml'), text);
  return await readEdgeConfig(folder);
}

test('a binding that one machine cannot give is refused', async () => {
  await expect(read(`${toml}\n[[kv_namespaces]]\nbinding = "K"\nid = "k"\n`)).rejects.toMatchObject({
    code: 'start_failed',
    message: expect.stringContaining('kv_namespaces'),
  });
});

test('a Durable Object that no migration makes is refused', async () => {
  const without = toml.replace('new_sqlite_classes = ["TenantBudget"]', 'new_sqlite_classes = []');
  await expect(read(without)).rejects.toThrow(/no migration makes the class TenantBudget/);
});

test('a queue is counted sooner than deployed, and otherwise as the file says', async () => {
  const { worker } = await read(toml);
  expect(worker.queueConsumers).toEqual({
    'maskroute-events': {
      maxBatchSize: 100,
      maxBatchTimeout: 0.5,
      maxRetries: 100,
      retryDelay: 30,
      deadLetterQueue: 'maskroute-events-dead',
    },
  });
});
