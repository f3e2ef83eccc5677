/** The edge's bundle is kept from start to start, for exactly as long as it is what the sources say. */
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { bundleEdge } from '../../../gpu-backend/dev/edge-bundle.ts';
import type { EdgeConfig } from '../../../gpu-backend/dev/edge-config.ts';

let projectFolder: string;
beforeEach(() => {
  projectFolder = mkdtempSync(path.join(tmpdir(), 'maskroute-bundle-'));
  write('said.ts', 'export const said: string = "first";');
  write('worker.ts', 'import { said } from "./said.ts"; export default { fetch: () => new Response(said) };');
});
afterEach(() => rmSync(projectFolder, { recursive: true }));

const write = (name: string, text: string) => writeFileSync(path.join(projectFolder, name), text);
const bundle = () => {
  const entry = path.join(projectFolder, 'worker.ts');
  const config = { entry, buildCommand: 'true', worker: { queueProducers: {} } } as unknown as EdgeConfig;
  return bundleEdge(config, { projectFolder });
};
const keptFile = () => {
  const folder = path.join(projectFolder, 'node_modules/.cache/edge');
  const names = readdirSync(folder);
  expect(names).toHaveLength(1);
  return path.join(folder, names[0]!);
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
  rmSync(path.join(projectFolder, 'said.ts'));
  write('worker.ts', 'export default { fetch: () => new Response("alone") };');
  expect(await bundle()).toContain('alone');
});

test('a folder that cannot be written costs time and nothing else', async () => {
  write('node_modules', 'a file');
  expect(await bundle()).toContain('first');
});
