/** Debian's packages for the tests, where this machine has apt and the process may install. */
import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';

/** Whether the packages are installed now. */
export function installWithApt(...packages: string[]): boolean {
  const isRoot = process.getuid?.() === 0;
  if (!isRoot || !existsSync('/usr/bin/apt-get')) return false;
  const env = { ...process.env, DEBIAN_FRONTEND: 'noninteractive' };
  const run = (...words: string[]) =>
    spawnSync('apt-get', ['-qq', ...words], { env, stdio: 'inherit' }).status === 0;
  // The package lists may be old enough to name files that are gone.
  return run('update') && run('install', '-y', '--no-install-recommends', ...packages);
}
