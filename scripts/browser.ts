/**
 * The browser of the dashboard's tests: Chromium as the system has it. Run by itself (`npm run browser`, and before
 * `npm test`) this installs Debian's package where it is missing and that is possible.
 */
import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';

const CANDIDATES = [
  process.env.CHROMIUM,
  '/usr/bin/chromium',
  '/usr/bin/chromium-browser',
  '/usr/bin/google-chrome',
  '/Applications/Google Chrome.app/Contents/MacOS/Google Chrome',
];

/** The browser's path; undefined when there is none. `CHROMIUM` in the environment names another one. */
export const findBrowser = (): string | undefined =>
  CANDIDATES.find((file) => file !== undefined && existsSync(file));

export const NO_BROWSER =
  'There is no Chromium for the tests of the dashboard. Install one (Debian: apt-get install chromium), or name one in the environment variable CHROMIUM.';

function install(): boolean {
  const isRoot = process.getuid?.() === 0;
  if (!isRoot || !existsSync('/usr/bin/apt-get')) return false;
  const env = { ...process.env, DEBIAN_FRONTEND: 'noninteractive' };
  const run = (...words: string[]) =>
    spawnSync('apt-get', ['-qq', ...words], { env, stdio: 'inherit' }).status === 0;
  // The package lists may be old enough to name files that are gone.
  return run('update') && run('install', '-y', '--no-install-recommends', 'chromium', 'fonts-dejavu-core');
}

if (import.meta.main) {
  if (findBrowser() === undefined && !(install() && findBrowser() !== undefined)) {
    console.error(NO_BROWSER);
    process.exit(1);
  }
}
