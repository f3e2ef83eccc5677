/**
 * The queue's server for tests and `bench learn-many`: Valkey as the system has it. Run by itself (`npm run valkey`, and
 * before `npm test`) this unpacks Debian's packages into the product's home where it is missing and that is possible. That
 * needs no root.
 */
import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readdirSync, rmSync } from 'node:fs';
import path from 'node:path';
import { findValkey, NO_VALKEY, VALKEY_FOLDER } from '../gpu-backend/bench/valkey-server.ts';
import { newCommand, parseScript } from '../gpu-backend/cli/help.ts';

/** With the libraries that a small system lacks; the others come with any Debian. */
const PACKAGES = ['valkey-server', 'valkey-tools', 'liblzf1', 'libjemalloc2', 'libatomic1'];

function install(): boolean {
  if (!existsSync('/usr/bin/apt-get') || !existsSync('/usr/bin/dpkg-deb')) return false;
  const packages = path.join(VALKEY_FOLDER, 'packages');
  mkdirSync(packages, { recursive: true });
  const run = (program: string, ...words: string[]) =>
    spawnSync(program, words, { cwd: packages, stdio: ['ignore', 'ignore', 'inherit'] }).status === 0;
  // Without its sandbox, whose user may not write here.
  const download = () => run('apt-get', '-qq', '-o', 'APT::Sandbox::User=root', 'download', ...PACKAGES);
  // The package lists may be old enough to name files that are gone.
  const isThere = download() || (process.getuid?.() === 0 && run('apt-get', '-qq', 'update') && download());
  const files = readdirSync(packages).filter((name) => name.endsWith('.deb'));
  const isUnpacked = isThere && files.every((file) => run('dpkg-deb', '-x', file, VALKEY_FOLDER));
  rmSync(packages, { recursive: true });
  return isUnpacked;
}

if (import.meta.main) {
  parseScript(newCommand('npm run valkey --', 'unpack Valkey for the tests, unless it is there'), [
    'npm run valkey',
  ]);
  if (findValkey() === undefined && !(install() && findValkey() !== undefined)) {
    console.error(NO_VALKEY);
    process.exit(1);
  }
}
