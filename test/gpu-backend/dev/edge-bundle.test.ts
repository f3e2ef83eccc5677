/**
 * wrangler.toml on one machine: nothing of it is dropped in silence. The worker's bundle is kept from start to start, for exactly
 * as long as it is what the sources say.
 */
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { bundleEdge, type EdgeConfig, readEdgeConfig } from '../../../gpu-backend/dev/edge-bundle.ts';

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

describe('the bundle', () => {
  beforeEach(() => {
    write('said.ts', 'export const said: string = "first";');
    write(
      'worker.ts',
      'import { said } from "./said.ts"; export default { fetch: () => new Response(said) };',
    );
  });

  const write = (name: string, text: string) => writeFileSync(path.join(folder, name), text);
  const bundle = () => {
    const entry = path.join(folder, 'worker.ts');
    const config = { entry, buildCommand: 'true', worker: { queueProducers: {} } } as unknown as EdgeConfig;
    return bundleEdge(config, { projectFolder: folder });
  };
  const keptFile = () => {
    const kept = path.join(folder, 'node_modules/.cache/edge');
    const names = readdirSync(kept);
    expect(names).toHaveLength(1);
    return path.join(kept, names[0]!);
  };

  test('is made once, and anew when a file that it is made of changes', async () => {
    expect(await bundle()).toContain('first');
    const kept = JSON.parse(readFileSync(keptFile(), 'utf8'));
    writeFileSync(keptFile(), JSON.stringify({ ...kept, script: '// taken from where it is kept' }));
    expect(await bundle()).toBe('// taken from where it is kept');
    write('said.ts', 'export const said: string = "second";');
    expect(await bundle()).toContain('second');
  });

  test('is made anew where what is kept is cut short, or a file of it is gone', async () => {
    const whole = await bundle();
    writeFileSync(keptFile(), readFileSync(keptFile(), 'utf8').slice(0, -10));
    expect(await bundle()).toBe(whole);
    rmSync(path.join(folder, 'said.ts'));
    write('worker.ts', 'export default { fetch: () => new Response("alone") };');
    expect(await bundle()).toContain('alone');
  });

  test('a folder that cannot be written costs time and nothing else', async () => {
    write('node_modules', 'a file');
    expect(await bundle()).toContain('first');
  });
});
