/** `register`: keeps the edge's registry in step with backends that a scaler starts and stops, until SIGTERM. */
import { setTimeout as sleep } from 'node:timers/promises';
import { type Command, InvalidArgumentError } from 'commander';
import { BACKENDS_MAX } from '../../shared/backends.ts';
import { MaskrouteError } from '../../shared/errors.ts';
import { createRegistrar, type Fleet, type Registrar } from '../publication/register.ts';
import { adminClient, KEY_HELP } from './publication.ts';

type Flags = Omit<Fleet, 'regions'> & {
  readonly region: string[];
  readonly everyS: number;
  readonly edge?: string;
};

export function addRegisterCommand(program: Command): void {
  program
    .command('register')
    .description(
      'keep an entry at the edge for each of several backends while it is ready; {n} is its number',
    )
    .requiredOption('--count <count>', 'how many there may be', between(1, BACKENDS_MAX))
    .requiredOption('--url <url>', 'how the edge reaches each: https://backend-{n}.example.com')
    .requiredOption('--probe <url>', 'how this process does: http://backend-{n}.backend:8080')
    .option('--id <id>', "the entries' names", 'backend-{n}')
    .option('--region <regions...>', 'what they are for: EU, DE, FRA, or *', ['*'])
    .option('--every-s <seconds>', 'how often to look', between(1, 3600), 5)
    .option('--edge <url>', 'the edge (default: a running "npm start")')
    .addHelpText('after', KEY_HELP)
    .action(async ({ region: regions, everyS, edge, ...fleet }: Flags) => {
      if (fleet.count > 1 && [fleet.url, fleet.probe, fleet.id].some((text) => !text.includes('{n}'))) {
        throw new MaskrouteError('invalid_argument', '--url, --probe and --id need {n} for the number.');
      }
      const stop = new AbortController();
      for (const signal of ['SIGTERM', 'SIGINT'] as const) process.once(signal, () => stop.abort());
      await follow(createRegistrar(await adminClient(edge), { ...fleet, regions }), everyS, stop.signal);
    });
}

/** What goes wrong with a look is a line, and the next look is the next try. */
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

const between = (least: number, most: number) => (text: string) => {
  const value = Number(text);
  if (Number.isInteger(value) && value >= least && value <= most) return value;
  throw new InvalidArgumentError(`expected a whole number from ${least} to ${most}`);
};
