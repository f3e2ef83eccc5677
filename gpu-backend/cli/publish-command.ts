/** `publish`, `rollback` and `register`: what people change at an edge; gpu-backend/publication does the work. */
import { setTimeout as sleep } from 'node:timers/promises';
import { type Command, InvalidArgumentError } from 'commander';
import { BACKENDS_MAX } from '../../shared/wire/backend-load.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { readDevFile } from '../dev/dev-home.ts';
import { maskrouteHome } from '../files.ts';
import { type AdminClient, createAdminClient } from '../publication/admin-client.ts';
import { readEvaluation, readMaskSet } from '../publication/artefact-files.ts';
import {
  parseSchedule,
  publishMaskSet,
  rollBack,
  type ScheduleFlags,
  storeEvaluation,
} from '../publication/publish.ts';
import { createRegistrar, type Fleet, type Registrar } from '../publication/register.ts';
import { wholeNumber } from './terminal.ts';

type EdgeFlags = { readonly edge?: string; readonly tenant: string };

type PublishFlags = EdgeFlags & ScheduleFlags & { readonly activate: boolean; readonly evaluation?: string };

const KEY_HELP = `
The admin key comes from MASKROUTE_ADMIN_KEY, or from a running "npm start" when that is the edge.`;

export function addPublishCommands(program: Command): void {
  program
    .command('publish')
    .description('store a mask set at an edge, and with --activate make it live')
    .argument('<file>', 'a mask-set.json')
    .option('--edge <url>', 'the edge (default: a running "npm start")')
    .option('--tenant <tenant>', 'whose set it is (default: every tenant without its own)', '')
    .option('--evaluation <file>', 'what `evaluate` wrote of it, for the dashboard')
    .option('--activate', 'make it live', false)
    .option('--at <time>', 'not before this time, like 2026-01-31T09:00:00Z')
    .option('--rollout <steps>', 'in steps: 1%:10m,10%:1h is 1 % of conversations for 10 minutes, and so on')
    .option('--max-error-rate <share>', 'roll back by itself when more requests fail, 0 to 1', number)
    .option(
      '--max-slowdown <ratio>',
      'roll back by itself when a token takes this many times as long as before',
      number,
    )
    .option('--max-token-ms <ms>', 'roll back by itself when a token takes longer on average', number)
    .option('--min-requests <count>', 'how many requests such a decision takes (default: 100)', number)
    .addHelpText('after', KEY_HELP)
    .action(async (file: string, flags: PublishFlags) => {
      const schedule = parseSchedule(flags);
      if (!flags.activate && Object.keys(schedule).length > 0) {
        throw new MaskrouteError('invalid_argument', 'A schedule or bounds go with --activate.');
      }
      const set = await readMaskSet(file);
      const figures = flags.evaluation === undefined ? undefined : await readEvaluation(flags.evaluation);
      const client = await adminClient(flags.edge);
      const { version, state, replacedVersion } = await publishMaskSet(client, set, { ...flags, schedule });
      if (figures !== undefined) await storeEvaluation(client, version, figures, flags.tenant);
      const replaced = replacedVersion === null ? '' : ` in place of ${replacedVersion}`;
      console.log(`${set.name} ${version}: ${STATES[state]}${replaced} at ${client.edge}`);
    });

  program
    .command('rollback')
    .description('make the mask set live that was live before')
    .option('--edge <url>', 'the edge (default: a running "npm start")')
    .option('--tenant <tenant>', 'whose set it is (default: every tenant without its own)', '')
    .addHelpText('after', KEY_HELP)
    .action(async (flags: EdgeFlags) => {
      const client = await adminClient(flags.edge);
      const { version, replaced_version } = await rollBack(client, flags.tenant);
      const now = version === null ? 'nothing is live any more' : `${version}: live again`;
      console.log(`${now} in place of ${replaced_version} at ${client.edge}`);
    });
}

type RegisterFlags = Omit<Fleet, 'regions'> & {
  readonly region: string[];
  readonly everyS: number;
  readonly edge?: string;
};

/** `register` keeps the edge's registry in step with backends that a scaler starts and stops, until SIGTERM. */
export function addRegisterCommand(program: Command): void {
  program
    .command('register')
    .description(
      'keep an entry at the edge for each of several backends while it is ready; {n} is its number',
    )
    .requiredOption('--count <count>', 'how many there may be', wholeNumber(1, BACKENDS_MAX))
    .requiredOption('--url <url>', 'how the edge reaches each: https://backend-{n}.example.com')
    .requiredOption('--probe <url>', 'how this process does: http://backend-{n}.backend:8080')
    .option('--id <id>', "the entries' names", 'backend-{n}')
    .option('--region <regions...>', 'what they are for: EU, DE, FRA, or *', ['*'])
    .option('--every-s <seconds>', 'how often to look', wholeNumber(1, 3600), 5)
    .option('--edge <url>', 'the edge (default: a running "npm start")')
    .addHelpText('after', KEY_HELP)
    .action(async ({ region: regions, everyS, edge, ...fleet }: RegisterFlags) => {
      if (fleet.count > 1 && [fleet.url, fleet.probe, fleet.id].some((text) => !text.includes('{n}'))) {
        throw new MaskrouteError('invalid_argument', '--url, --probe and --id need {n} for the number.');
      }
      const stop = new AbortController();
      for (const signal of ['SIGTERM', 'SIGINT'] as const) process.once(signal, () => stop.abort());
      await follow(createRegistrar(await adminClient(edge), { ...fleet, regions }), everyS, stop.signal);
    });
}

/** A look that fails is a line on standard error, and the next look is the next try. */
async function follow(registrar: Registrar, every_s: number, signal: AbortSignal): Promise<void> {
  while (!signal.aborted) {
    try {
      const { added, removed, foreign } = await registrar.look();
      for (const id of added) console.log(`${id}: ready, and in the registry`);
      for (const id of removed) console.log(`${id}: gone, and out of the registry`);
      for (const id of foreign) {
        console.error(
          `${id}: another address has this name; delete its entry, or give --id names of its own`,
        );
      }
    } catch (error) {
      if (!(error instanceof MaskrouteError)) throw error;
      console.error(`error: ${error.message}`);
    }
    await sleep(every_s * 1000, undefined, { signal }).catch(() => {});
  }
}

function number(text: string): number {
  const value = Number(text);
  if (text.trim() !== '' && Number.isFinite(value)) return value;
  throw new InvalidArgumentError('expected a number');
}

const STATES = {
  stored: 'stored, not live (--activate makes it so)',
  activated: 'live',
  scheduled: 'goes live as scheduled',
  already_live: 'is live already',
  bounds_changed: 'is live already, and rolled back by these bounds from now on',
};

/** @throws MaskrouteError `invalid_argument` when no edge or no key is named and no `npm start` runs. */
async function adminClient(edgeFlag: string | undefined): Promise<AdminClient> {
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
