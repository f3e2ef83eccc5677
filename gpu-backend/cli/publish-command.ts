/** `publish`, `rollback` and `register`: commands that change an edge. `gpu-backend/publication` does the work. */
import { setTimeout as sleep } from 'node:timers/promises';
import type { Command } from 'commander';
import type { LivePublication } from '../../shared/admin/publication-wire.ts';
import { maskSetVersion } from '../../shared/mask/mask-set.ts';
import { BACKENDS_MAX } from '../../shared/wire/backend-load.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import type { AdminClient } from '../publication/admin-client.ts';
import {
  firstTry,
  livePublication,
  namesOfVersions,
  publishMaskSet,
  readEvaluation,
  readMaskSet,
  rollBack,
} from '../publication/publish.ts';
import { createRegistrar, type Fleet, type Registrar } from '../publication/register.ts';
import { onStopSignal } from '../stop-signals.ts';
import {
  adminClient,
  confirmChange,
  EDGE_OPTION,
  KEY_HELP,
  tenantOption,
  whose,
  YES_OPTION,
} from './edge-access.ts';
import { examples } from './help.ts';
import { parseSchedule, type ScheduleFlags } from './publish-flags.ts';
import { httpAddress, JSON_OPTION, numberWhere, share, wholeNumber } from './terminal.ts';

type EdgeFlags = {
  readonly edge?: string;
  readonly tenant: string;
  readonly yes: boolean;
  readonly json: boolean;
};

type PublishFlags = EdgeFlags &
  ScheduleFlags & {
    readonly activate: boolean;
    /** File of {@link firstTry}. */
    readonly once?: string;
    readonly unlessRolledBack: boolean;
    readonly evaluation?: string;
  };

export function addPublishCommands(program: Command): void {
  program
    .command('publish')
    .description('store a mask set at an edge, and with --activate make it live')
    .argument('<file>', 'a mask-set.json')
    .option(...EDGE_OPTION)
    .addOption(tenantOption())
    .option('--evaluation <file>', 'the evaluation.json of the set, for the dashboard')
    .option('--activate', 'make it live', false)
    .option(
      '--once <file>',
      'with --activate: change nothing if this version was published since the first call with this file, which remembers it',
    )
    .option(
      '--unless-rolled-back',
      'with --activate: change nothing if this version is live, or was rolled back and nobody has published it since',
      false,
    )
    .option('--at <time>', 'go live at this time, such as 2026-01-31T09:00:00Z (default: now)')
    .option(
      '--rollout <steps>',
      'go live in steps: 1%:10m,10%:1h is 1 % of conversations for 10 minutes, then 10 % for an hour',
    )
    .option('--max-error-rate <share>', 'roll back at a higher error rate, such as 0.02', share)
    .option(
      '--max-slowdown <ratio>',
      'roll back when ms/token is more than this many times that of the version before',
      numberWhere('a number above 1, such as 1.1', (value) => value > 1),
    )
    .option(
      '--max-token-ms <ms>',
      'roll back at more ms/token',
      numberWhere('a number above 0', (value) => value > 0),
    )
    .option(
      '--min-requests <count>',
      'requests that a decision to roll back needs (default: 100)',
      wholeNumber(1, 1_000_000),
    )
    .option(...YES_OPTION)
    .option(...JSON_OPTION)
    .addHelpText('after', KEY_HELP)
    .addHelpText(
      'after',
      examples(
        'maskroute publish out/mask-set.json --activate',
        'maskroute publish out/mask-set.json --edge https://edge.example.com --tenant acme --activate \\',
        '    --rollout 1%:10m,10%:1h --max-error-rate 0.02',
      ),
    )
    .action(runPublish);

  program
    .command('rollback')
    .description('bring back the mask set that was live before')
    .option(...EDGE_OPTION)
    .addOption(tenantOption())
    .option(...YES_OPTION)
    .option(...JSON_OPTION)
    .addHelpText('after', KEY_HELP)
    .addHelpText(
      'after',
      examples(
        'maskroute rollback',
        'maskroute rollback --edge https://edge.example.com --tenant acme --yes',
      ),
    )
    .action(runRollback);
}

async function runPublish(file: string, flags: PublishFlags): Promise<void> {
  const schedule = parseSchedule(flags);
  const { tenant, activate, once, unlessRolledBack } = flags;
  if (!activate && (once !== undefined || unlessRolledBack || Object.keys(schedule).length > 0)) {
    const message = '--once, --unless-rolled-back, --at, --rollout and bounds need --activate.';
    throw new MaskrouteError('invalid_argument', message);
  }
  const set = await readMaskSet(file);
  const figures = flags.evaluation === undefined ? undefined : await readEvaluation(flags.evaluation);
  const client = await adminClient(flags.edge);
  if (activate) {
    const isGradual = schedule.activate_at !== undefined || schedule.rollout !== undefined;
    const how = [
      isGradual ? 'as scheduled' : 'for everyone at once',
      ...(once === undefined ? [] : [`unless it was published since ${once} was written`]),
      ...(unlessRolledBack ? ['unless it is live or was rolled back'] : []),
    ].join(', ');
    const change = async () => `${await liveNow(client, tenant, await livePublication(client, tenant))}
It will be: ${set.name} ${maskSetVersion(set)}, ${how}`;
    await confirmChange(client.edge, change, flags.yes);
  }
  const since = once === undefined ? undefined : await firstTry(client, tenant, once);
  const options = { tenant, activate, since, unlessRolledBack, schedule, figures };
  const published = await publishMaskSet(client, set, options);
  const { version, state, replacedVersion } = published;
  if (flags.json) {
    const told = { version, name: set.name, state, replaced_version: replacedVersion };
    return console.log(JSON.stringify({ ...told, edge: client.edge, tenant }));
  }
  const replaced = replacedVersion === null ? '' : ` in place of ${replacedVersion}`;
  console.log(`${set.name} ${version}: ${STATES[state]}${replaced} at ${client.edge}`);
}

async function runRollback(flags: EdgeFlags): Promise<void> {
  const { tenant } = flags;
  const client = await adminClient(flags.edge);
  // What was confirmed is what happens, or nothing: somebody may publish meanwhile.
  const live = await livePublication(client, tenant);
  await confirmChange(client.edge, () => whatComesBack(client, tenant, live), flags.yes);
  const publication = await rollBack(client, tenant, live);
  if (flags.json) return console.log(JSON.stringify({ ...publication, edge: client.edge }));
  const { version, replaced_version } = publication;
  const now = version === null ? 'nothing is live any more' : `${version}: live again`;
  console.log(`${now} in place of ${replaced_version} at ${client.edge}`);
}

type Live = LivePublication | undefined;

const liveNow = async (client: AdminClient, tenant: string, live: Live): Promise<string> =>
  `At ${client.edge}, for ${whose(tenant)}.
Live now: ${live === undefined ? 'nothing' : await named(client, tenant, live.version)}`;

async function whatComesBack(client: AdminClient, tenant: string, live: Live): Promise<string> {
  const previous = live?.previous_version ?? null;
  return `${await liveNow(client, tenant, live)}
It will be: ${previous === null ? 'nothing' : await named(client, tenant, previous)}`;
}

const named = async (client: AdminClient, tenant: string, version: string): Promise<string> =>
  `${(await namesOfVersions(client, tenant, [version])).get(version)} ${version}`;

type RegisterFlags = Omit<Fleet, 'regions'> & {
  readonly region: string[];
  readonly everyS: number;
  readonly edge?: string;
  readonly json: boolean;
};

/** `register` keeps the edge's registry in step with backends that a scaler starts and stops, until SIGTERM. */
export function addRegisterCommand(program: Command): void {
  program
    .command('register')
    .description(
      'keep the ready backends in the registry of an edge; {n} in an option is the number of a backend',
    )
    .requiredOption('--count <count>', 'backends at most', wholeNumber(1, BACKENDS_MAX))
    .requiredOption('--url <url>', 'their address for the edge: https://backend-{n}.example.com')
    .requiredOption('--probe <url>', 'their address for this process: http://backend-{n}.backend:8080')
    .option('--id <id>', 'their ids in the registry', 'backend-{n}')
    .option('--region <regions...>', 'regions that they serve: EU, DE, FRA, or *', ['*'])
    .option('--every-s <seconds>', 'seconds between checks', wholeNumber(1, 3600), 5)
    .option(...EDGE_OPTION)
    .option('--json', 'print a JSON object a line, one for each change', false)
    .addHelpText('after', KEY_HELP)
    .addHelpText(
      'after',
      examples(
        'maskroute register --count 4 --edge https://edge.example.com --url https://backend-{n}.example.com \\',
        '    --probe http://backend-{n}.backend:8080',
      ),
    )
    .action(runRegister);
}

async function runRegister({ region: regions, everyS, edge, json, ...fleet }: RegisterFlags): Promise<void> {
  if (fleet.count > 1 && [fleet.url, fleet.probe, fleet.id].some((text) => !text.includes('{n}'))) {
    throw new MaskrouteError('invalid_argument', '--url, --probe and --id need {n} for the number.');
  }
  for (const name of ['url', 'probe'] as const) httpAddress(`--${name}`, fleet[name]);
  const stop = new AbortController();
  onStopSignal(() => stop.abort());
  const look = createRegistrar(await adminClient(edge), { ...fleet, regions });
  const say = json
    ? (id: string, state: string) => console.log(JSON.stringify({ id, state }))
    : (id: string, state: keyof typeof HEARD) => console.log(`${id}: ${HEARD[state]}`);
  await follow(look, everyS, say, stop.signal);
}

const HEARD = { added: 'ready, added to the registry', removed: 'not ready, removed from the registry' };

/** Checks the backends every `every_s`, until `signal`. A check that fails is a line on standard error. */
async function follow(
  look: Registrar,
  every_s: number,
  say: (id: string, state: keyof typeof HEARD) => void,
  signal: AbortSignal,
): Promise<void> {
  while (!signal.aborted) {
    try {
      const { added, removed, foreign } = await look();
      for (const id of added) say(id, 'added');
      for (const id of removed) say(id, 'removed');
      for (const id of foreign) {
        console.error(
          `${id}: the registry has this id with another address; delete that entry, or choose other ids with --id`,
        );
      }
    } catch (error) {
      if (!(error instanceof MaskrouteError)) throw error;
      console.error(`error: ${error.message}`);
    }
    await sleep(every_s * 1000, undefined, { signal }).catch(() => {});
  }
}

const STATES = {
  stored: 'stored, not live (--activate makes it so)',
  activated: 'live',
  scheduled: 'goes live as scheduled',
  already_scheduled: 'goes live by this schedule already',
  already_live: 'is live already',
  bounds_changed: 'is live already; these bounds apply from now on',
  published_before: 'was published already, so nothing changes',
  rolled_back: 'was rolled back, so nothing changes',
};
