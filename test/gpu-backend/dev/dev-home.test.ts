/** What is kept in a home: the lock, the keys, dev.json. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, mkdtempSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { readdir } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import {
  loadOrCreateKeys,
  lockHome,
  readDevFile,
  removeDevFile,
  saveKeys,
  writeDevFile,
} from '../../../gpu-backend/dev/dev-home.ts';
import { startProduct } from '../../../gpu-backend/dev/product.ts';

let home: string;
beforeEach(() => {
  home = mkdtempSync(path.join(tmpdir(), 'home-'));
});
afterEach(() => rmSync(home, { recursive: true }));

const modeOf = (name: string): string => (statSync(path.join(home, name)).mode & 0o777).toString(8);

/** A process that holds the lock until it is killed. */
async function lockedElsewhere(): Promise<{ kill(): Promise<void> }> {
  const script = `
    import { lockHome } from ${JSON.stringify(path.resolve('gpu-backend/dev/dev-home.ts'))};
    lockHome(${JSON.stringify(home)});
    console.log('locked');
    setInterval(() => {}, 1000);`;
  const child = spawn(process.execPath, ['--input-type=module', '-e', script], { stdio: 'pipe' });
  await once(child.stdout, 'data');
  return {
    async kill() {
      child.kill('SIGKILL');
      await once(child, 'exit');
    },
  };
}

test('a second process is refused while the first runs, and welcome once it was killed', async () => {
  const other = await lockedElsewhere();
  expect(() => lockHome(home)).toThrow(/already running on .*MASKROUTE_HOME/);
  await other.kill();
  lockHome(home)();
});

test('a lock that was let go can be taken again', () => {
  lockHome(home)();
  const unlock = lockHome(home);
  expect(() => lockHome(home)).toThrow(/already running/);
  unlock();
});

test('a lock that cannot be one is named, with the reason', () => {
  const file = path.join(home, 'dev.lock');
  writeFileSync(file, 'not a database, but long enough to be read as one'.repeat(100));
  expect(() => lockHome(home)).toThrow(
    expect.objectContaining({
      code: 'start_failed',
      message: `${file} cannot be locked: file is not a database. It holds no data, so you can delete it.`,
    }),
  );
  expect(() => lockHome(path.join(home, 'none'))).toThrow(/dev\.lock cannot be locked: unable to open/);
});

test('keys are drawn once, differ from each other, and only their owner reads them', async () => {
  const keys = await loadOrCreateKeys(home);
  expect(keys.adminKey).not.toBe(keys.backendKey);
  expect(await loadOrCreateKeys(home)).toEqual(keys);
  await saveKeys(home, { ...keys, apiKey: 'mr_live_x' });
  expect(await loadOrCreateKeys(home)).toEqual({ ...keys, apiKey: 'mr_live_x' });
  expect(modeOf('dev-keys.json')).toBe('600');
  expect(await readdir(home)).toEqual(['dev-keys.json']);
});

test('keys cut short by a full disk are drawn anew', async () => {
  writeFileSync(path.join(home, 'dev-keys.json'), '{"adminKey": "mr_adm');
  expect((await loadOrCreateKeys(home)).adminKey).toMatch(/^mr_admin_.{32}$/);
});

test('dev.json comes and goes, readable by its owner alone', async () => {
  const dev = {
    edge: 'http://localhost:1',
    backend: 'http://localhost:2',
    apiKey: 'a',
    adminKey: 'b',
    backendKey: 'c',
    model: 'm',
  };
  expect(await readDevFile(home)).toBeUndefined();
  await writeDevFile(home, dev);
  expect(await readDevFile(home)).toEqual(dev);
  expect(modeOf('dev.json')).toBe('600');
  await removeDevFile(home);
  await removeDevFile(home);
  expect(await readDevFile(home)).toBeUndefined();
});

test('a stop goes on where dev.json cannot be removed: the home is free again', async () => {
  mkdirSync(path.join(home, 'dev.json'));
  const said: string[] = [];
  const start = startProduct({
    home,
    port: 0,
    backendPort: 0,
    threads: 1,
    say: (line) => said.push(line),
    step: (_, work) => work(),
    signal: new AbortController().signal,
  });
  await expect(start).rejects.toThrow(/directory/);
  expect(said).toEqual([expect.stringContaining('dev.json could not be removed')]);
  lockHome(home)();
});
