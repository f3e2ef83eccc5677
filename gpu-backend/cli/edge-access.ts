/** The edge or backend that a command talks to, its key, and the question before a change at an edge that others use. */
import { createInterface } from 'node:readline/promises';
import { Option } from 'commander';
import { sentKey } from '../../shared/admin/admin-wire.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { readDevFile } from '../dev/dev-home.ts';
import { maskrouteHome } from '../files.ts';
import {
  type AdminClient,
  type BackendClient,
  createAdminClient,
  createBackendClient,
} from '../publication/admin-client.ts';
import { httpAddress } from './terminal.ts';

export const EDGE_OPTION = ['--edge <url>', 'the edge (default: a running "npm start")'] as const;
export const tenantOption = () =>
  new Option('--tenant <tenant>', 'whose mask sets').default('', 'all tenants without a set of their own');
export const YES_OPTION = ['--yes', 'change an edge on another machine without asking', false] as const;

export const KEY_HELP = `
The admin key comes from MASKROUTE_ADMIN_KEY, or from a running "npm start" when that is the edge.`;

/** Where the key of an edge or of a backend comes from: `ofDev` is its field in `dev.json`. `key`: its name in messages. */
const ACCESS = {
  edge: { variable: 'MASKROUTE_ADMIN_KEY', ofDev: 'adminKey', key: 'an admin key' },
  backend: { variable: 'MASKROUTE_BACKEND_KEY', ofDev: 'backendKey', key: 'the backend key' },
} as const;

/** A client for `--edge`. @throws MaskrouteError `invalid_argument` without an edge or a key, and no `npm start` runs. */
export async function adminClient(edge: string | undefined): Promise<AdminClient> {
  return createAdminClient(...(await accessTo('edge', edge)));
}

/** A client for `--backend`. @throws as {@link adminClient}. */
export async function backendClient(backend: string | undefined): Promise<BackendClient> {
  return createBackendClient(...(await accessTo('backend', backend)));
}

async function accessTo(
  kind: keyof typeof ACCESS,
  flag: string | undefined,
): Promise<[url: string, key: string]> {
  const dev = await readDevFile(maskrouteHome());
  const named = flag ?? dev?.[kind];
  if (named === undefined) throw invalid(`Name the ${kind} with --${kind}, or run "npm start" first.`);
  const url = httpAddress(`--${kind}`, named);
  const { variable, ofDev, key: what } = ACCESS[kind];
  const isDev = dev !== undefined && new URL(url).origin === new URL(dev[kind]).origin;
  const key = process.env[variable] || (isDev ? dev[ofDev] : undefined);
  if (key === undefined) throw invalid(`Set ${variable} to ${what} of ${url}.`);
  const { data } = sentKey.safeParse(key);
  if (data !== undefined) return [url, data];
  throw invalid(`${variable} is no key: it has characters that no key has, or spaces.`);
}

const invalid = (message: string): MaskrouteError => new MaskrouteError('invalid_argument', message);

const LOOPBACK = /^(localhost|127\.\d+\.\d+\.\d+|\[::1\])$/;
const isOnThisMachine = (edge: string): boolean => LOOPBACK.test(new URL(edge).hostname);

/**
 * Asks before a change at an edge on another machine, where others may use it.
 * @param change describes the change, in some lines.
 * @throws MaskrouteError `cancelled` when the answer is no, `invalid_argument` without a terminal to ask at.
 */
export async function confirmChange(
  edge: string,
  change: () => Promise<string>,
  yes: boolean,
): Promise<void> {
  // A job was confirmed by whoever started it.
  const isJob = Boolean(process.env.MASKROUTE_JOB_FOLDER);
  if (yes || isJob || isOnThisMachine(edge)) return;
  const said = `${await change()}\n`;
  if (!process.stdin.isTTY || !process.stderr.isTTY) {
    process.stderr.write(said);
    throw invalid(`This changes ${edge}, and nobody can be asked here: add --yes.`);
  }
  const terminal = createInterface({ input: process.stdin, output: process.stderr });
  // Ctrl-C and Ctrl-D count as no; they leave the cursor in the question's line.
  const answer = await terminal.question(`${said}Go on? [y/N] `).catch(() => {
    process.stderr.write('\n');
    return '';
  });
  terminal.close();
  if (/^y(es)?$/i.test(answer.trim())) return;
  throw new MaskrouteError('cancelled', 'Nothing was changed.');
}

/** A tenant's name in messages. */
export const whose = (tenant: string): string =>
  tenant === '' ? 'all tenants without a set of their own' : `tenant ${tenant}`;
