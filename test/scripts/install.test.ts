/** What npm says at the two commands of README, by the system's npm and Node, as somebody new has them. */
import { spawnSync } from 'node:child_process';
import { copyFileSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { expect, test } from 'vitest';

test('`npm ci` prints no warning', () => {
  const folder = mkdtempSync(path.join(tmpdir(), 'npm-ci-'));
  try {
    for (const file of ['package.json', 'package-lock.json', '.npmrc'])
      copyFileSync(file, path.join(folder, file));
    // Without the project's own Node, and without what npm tells its scripts.
    const env = Object.fromEntries(Object.entries(process.env).filter(([name]) => !/^npm_/i.test(name)));
    const folders = (env.PATH ?? '').split(path.delimiter).filter((entry) => !entry.includes('node_modules'));
    env.PATH = [...folders, path.dirname(process.execPath)].join(path.delimiter);
    // It reads the whole tree and installs nothing.
    const { status, stderr } = spawnSync('npm', ['ci', '--dry-run'], { cwd: folder, env, encoding: 'utf8' });
    expect([status, stderr]).toEqual([0, '']);
  } finally {
    rmSync(folder, { recursive: true });
  }
});
