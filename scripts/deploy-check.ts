/**
 * `npm run deploy:check`: checks that the edge can be deployed. `wrangler deploy --dry-run` builds, bundles and checks the
 * configuration of every environment in wrangler.toml, and sends nothing. It needs no account and no network.
 */
import { spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { parse } from 'smol-toml';
import { newCommand, parseScript } from '../gpu-backend/cli/help.ts';

parseScript(
  newCommand('npm run deploy:check --', 'check that every environment of wrangler.toml could be deployed'),
  ['npm run deploy:check'],
);

const { env: environments = {} } = parse(readFileSync('wrangler.toml', 'utf8')) as { env?: object };

function check(environment: string): boolean {
  const folder = mkdtempSync(path.join(tmpdir(), 'deploy-check-'));
  const words = ['deploy', '--dry-run', '--strict', '--outdir', folder, '--env', environment];
  const { status, stdout, stderr } = spawnSync(path.resolve('node_modules/.bin/wrangler'), words, {
    encoding: 'utf8',
    env: {
      ...process.env,
      WRANGLER_SEND_METRICS: 'false',
      WRANGLER_LOG: 'warn',
      WRANGLER_HIDE_BANNER: 'true',
    },
  });
  rmSync(folder, { recursive: true });
  // Warnings count as failures: what wrangler warns about would not be deployed as written.
  const isClean = status === 0 && !/\bWARNING\b/.test(stdout + stderr);
  console.log(`${environment || 'top level'}: ${isClean ? 'could be deployed' : 'could not be deployed'}`);
  if (!isClean) console.error(stdout + stderr);
  return isClean;
}

const checks = ['', ...Object.keys(environments)].map(check);
process.exitCode = checks.every(Boolean) ? 0 : 1;
