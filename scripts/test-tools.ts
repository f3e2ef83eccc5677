/**
 * Tools that the tests need beside npm's packages: Chromium for the dashboard, Valkey for queues, and a software GPU.
 * `node scripts/test-tools.ts` (before `npm test`) installs missing tools if it can; `npm run browser` and `npm run valkey`
 * install one of them.
 */
import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readdirSync, rmSync } from 'node:fs';
import path from 'node:path';
import { findTool, findValkey, NO_VALKEY, VALKEY_FOLDER } from '../gpu-backend/bench/valkey-server.ts';
import { newCommand, parseScript } from '../gpu-backend/cli/help.ts';
import { MaskrouteError } from '../shared/wire/errors.ts';

/** Installs packages with Debian's apt, as root. Returns whether they are installed. */
function installWithApt(...packages: string[]): boolean {
  const isRoot = process.getuid?.() === 0;
  if (!isRoot || !existsSync('/usr/bin/apt-get')) return false;
  const env = { ...process.env, DEBIAN_FRONTEND: 'noninteractive' };
  const run = (...words: string[]) =>
    spawnSync('apt-get', ['-qq', ...words], { env, stdio: 'inherit' }).status === 0;
  // Old package lists may name files that no longer exist.
  return run('update') && run('install', '-y', '--no-install-recommends', ...packages);
}

/* The browser: the system's Chromium. */

const BROWSERS = [
  '/usr/bin/chromium',
  '/usr/bin/chromium-browser',
  '/usr/bin/google-chrome',
  '/Applications/Google Chrome.app/Contents/MacOS/Google Chrome',
];

/**
 * The browser's path; undefined when there is none. `CHROMIUM` in the environment names another one.
 * @throws MaskrouteError `invalid_argument` when that one does not exist.
 */
export const findBrowser = (): string | undefined => findTool('CHROMIUM', BROWSERS);

export const NO_BROWSER =
  'There is no Chromium for the tests of the dashboard. Install one (Debian: apt-get install chromium), or name one in the environment variable CHROMIUM.';

/* The GPU: Mesa's lavapipe, a Vulkan driver that computes on the CPU. */

const DRIVER_FOLDERS = ['/usr/share/vulkan/icd.d', '/usr/local/share/vulkan/icd.d', '/etc/vulkan/icd.d'];

/** The file by which Vulkan's loader finds lavapipe; undefined when there is none. */
function findLavapipe(): string | undefined {
  const files = DRIVER_FOLDERS.filter(existsSync).flatMap((folder) =>
    readdirSync(folder).map((name) => path.join(folder, name)),
  );
  return files.find((file) => /\/lvp_icd\.[^/]*json$/.test(file));
}

const NO_LAVAPIPE =
  'There is no lavapipe for the tests of GPUs. Install it (Debian: apt-get install mesa-vulkan-drivers).';

/** Makes lavapipe the only Vulkan device of this process and its children. @throws Error without lavapipe. */
export function useLavapipe(): void {
  const file = findLavapipe();
  if (file === undefined) throw new Error(NO_LAVAPIPE);
  process.env.VK_DRIVER_FILES = file;
  // Computes in the calling thread. Beside other tests, its own threads would wait for each other at each of many small steps.
  process.env.LP_NUM_THREADS = '0';
}

/*
 * The queue's server: the system's Valkey, or Debian's packages unpacked into the product's home, which needs no root.
 */

/** With libraries that a minimal Debian lacks. */
const VALKEY_PACKAGES = ['valkey-server', 'valkey-tools', 'liblzf1', 'libjemalloc2', 'libatomic1'];

function unpackValkey(): boolean {
  if (!existsSync('/usr/bin/apt-get') || !existsSync('/usr/bin/dpkg-deb')) return false;
  const packages = path.join(VALKEY_FOLDER, 'packages');
  mkdirSync(packages, { recursive: true });
  const run = (program: string, ...words: string[]) =>
    spawnSync(program, words, { cwd: packages, stdio: ['ignore', 'ignore', 'inherit'] }).status === 0;
  // Without apt's sandbox, whose user may not write here.
  const download = () =>
    run('apt-get', '-qq', '-o', 'APT::Sandbox::User=root', 'download', ...VALKEY_PACKAGES);
  // Old package lists may name files that no longer exist.
  const isThere = download() || (process.getuid?.() === 0 && run('apt-get', '-qq', 'update') && download());
  const files = readdirSync(packages).filter((name) => name.endsWith('.deb'));
  const isUnpacked = isThere && files.every((file) => run('dpkg-deb', '-x', file, VALKEY_FOLDER));
  rmSync(packages, { recursive: true });
  return isUnpacked;
}

type Tool = {
  readonly about: string;
  readonly isThere: () => boolean;
  readonly install: () => boolean;
  readonly missing: string;
};
const TOOLS: Readonly<Record<string, Tool>> = {
  browser: {
    about: 'install Chromium for the tests, unless it is there',
    isThere: () => findBrowser() !== undefined,
    install: () => installWithApt('chromium', 'fonts-dejavu-core'),
    missing: NO_BROWSER,
  },
  valkey: {
    about: 'unpack Valkey for the tests, unless it is there',
    isThere: () => findValkey() !== undefined,
    install: unpackValkey,
    missing: NO_VALKEY,
  },
  lavapipe: {
    about: 'install lavapipe for the tests, unless it is there',
    isThere: () => process.platform !== 'linux' || findLavapipe() !== undefined,
    install: () => installWithApt('mesa-vulkan-drivers', 'libvulkan1'),
    missing: NO_LAVAPIPE,
  },
};

if (import.meta.main) {
  const [name = '', ...args] = process.argv.slice(2);
  const one = TOOLS[name];
  if (one !== undefined) parseScript(newCommand(`npm run ${name} --`, one.about), [`npm run ${name}`], args);
  for (const { isThere, install, missing } of one === undefined ? Object.values(TOOLS) : [one]) {
    try {
      if (isThere() || (install() && isThere())) continue;
      console.error(missing);
    } catch (error) {
      if (!(error instanceof MaskrouteError)) throw error;
      console.error(error.message);
    }
    process.exitCode = 1;
  }
}
