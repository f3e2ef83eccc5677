/**
 * The browser of the dashboard's tests: Chromium as the system has it. Run by itself (`npm run browser`, and before
 * `npm test`) this installs Debian's package where it is missing and that is possible.
 */
import { existsSync } from 'node:fs';
import { newCommand, parseScript } from '../gpu-backend/cli/help.ts';
import { installWithApt } from './apt.ts';

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

if (import.meta.main) {
  parseScript(newCommand('npm run browser --', 'install Chromium for the tests, unless it is there'), [
    'npm run browser',
  ]);
  if (findBrowser() === undefined && !(installWithApt('chromium', 'fonts-dejavu-core') && findBrowser())) {
    console.error(NO_BROWSER);
    process.exit(1);
  }
}
