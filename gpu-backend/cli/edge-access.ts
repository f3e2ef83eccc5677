/** Which edge a command talks to, with which key, and whether a person wants what it is about to change there. */
import { createInterface } from 'node:readline/promises';
import { Option } from 'commander';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { readDevFile } from '../dev/dev-home.ts';
import { maskrouteHome } from '../files.ts';
import { type AdminClient, createAdminClient } from '../publication/admin-client.ts';

export const EDGE_OPTION = ['--edge <url>', 'the edge (default: a running "npm start")'] as const;
export const tenantOption = () =>
  new Option('--tenant <tenant>', 'whose mask sets').default('', 'all tenants without their own');
export const YES_OPTION = ['--yes', 'change an edge on another machine without asking', false] as const;

export const KEY_HELP = `
The admin key comes from MASKROUTE_ADMIN_KEY, or from a running "npm start" when that is the edge.`;

/** @throws MaskrouteError `invalid_argument` when no edge or no key is named and no `npm start` runs. */
export async function adminClient(edgeFlag: string | undefined): Promise<AdminClient> {
  const dev = await readDevFile(maskrouteHome());
  const edge = edgeFlag ?? dev?.edge;
  if (edge === undefined) {
    throw new MaskrouteError('invalid_argument', 'Name the edge with --edge, or run "npm start" first.');
  }
  if (!URL.canParse(edge)) throw new MaskrouteError('invalid_argument', `--edge: "${edge}" is no URL.`);
  const isDev = dev !== undefined && new URL(edge).origin === new URL(dev.edge).origin;
  const key = process.env.MASKROUTE_ADMIN_KEY || (isDev ? dev.adminKey : undefined);
  if (key !== undefined) return createAdminClient(edge, key);
  throw new MaskrouteError('invalid_argument', `Set MASKROUTE_ADMIN_KEY to an admin key of ${edge}.`);
}

const LOOPBACK = /^(localhost|127\.\d+\.\d+\.\d+|\[::1\])$/;
const isOnThisMachine = (edge: string): boolean => LOOPBACK.test(new URL(edge).hostname);

/**
 * Before something changes at an edge that others use: says what, and asks. An edge on this machine is one's own.
 * @param change what will be otherwise, in some lines.
 * @throws MaskrouteError `cancelled` when the answer is no, `invalid_argument` where nobody can be asked.
 */
export async function confirmChange(
  edge: string,
  change: () => Promise<string>,
  yes: boolean,
): Promise<void> {
  // Whoever started a job asked for what it does.
  const isJob = Boolean(process.env.MASKROUTE_JOB_FOLDER);
  if (yes || isJob || isOnThisMachine(edge)) return;
  const said = `${await change()}\n`;
  if (!process.stdin.isTTY || !process.stderr.isTTY) {
    process.stderr.write(said);
    throw new MaskrouteError(
      'invalid_argument',
      `This changes ${edge}, and nobody can be asked here: add --yes.`,
    );
  }
  const terminal = createInterface({ input: process.stdin, output: process.stderr });
  try {
    const answer = await terminal.question(`${said}Go on? [y/N] `);
    if (/^y(es)?$/i.test(answer.trim())) return;
  } finally {
    terminal.close();
  }
  throw new MaskrouteError('cancelled', 'Nothing was changed.');
}

/** A tenant as people read it. */
export const whose = (tenant: string): string =>
  tenant === '' ? 'all tenants without their own' : `tenant ${tenant}`;
