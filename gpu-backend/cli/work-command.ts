/** `work`: a worker of `learn --queue`. */
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import { type Command, InvalidArgumentError, Option } from 'commander';
import { maskrouteHome } from '../files.ts';
import { examples, interruptible, wholeNumber } from './terminal.ts';

const LEASE_s = 10;
const GRACE_s = 5;

type WorkFlags = {
  readonly queue: string;
  readonly journal?: string;
  readonly model?: string;
  readonly threads: number;
  readonly lease: number;
  readonly grace: number;
  readonly json: boolean;
};

export function addWorkCommand(program: Command): void {
  program
    .command('work')
    .description('compute units of learn --queue, on as many machines as there are')
    .addOption(queueOption('the queue that the run hands its units to').makeOptionMandatory())
    .addOption(journalOption())
    .option('--model <name>', 'an installed model (default: the model that the run names)')
    .option('--threads <count>', 'that compute', wholeNumber(1, 1024), availableParallelism())
    .option(
      '--lease <seconds>',
      'without a sign of life for so long, a worker loses its unit to another',
      wholeNumber(1, 3600),
      LEASE_s,
    )
    .option(
      '--grace <seconds>',
      'that the unit at hand may still take after Ctrl-C or SIGTERM; then it is given back',
      wholeNumber(0, 3600),
      GRACE_s,
    )
    .option('--json', 'a line of JSON on standard output for each unit', false)
    .addHelpText(
      'after',
      examples(
        'maskroute work --queue redis://queue.internal:6379 --journal /shared/units',
        'maskroute work --queue redis://127.0.0.1:6379 --model smollm2-135m-instruct --threads 1',
      ),
    )
    .action(({ queue, journal, model, threads, lease, grace, json }: WorkFlags) =>
      interruptible(async (signal) => {
        const { workUnits } = await import('../learning/units/unit-worker.ts');
        const home = maskrouteHome();
        await workUnits({
          ...{ url: queue, journal: journalFolder(home, journal), home, model, threads, signal },
          ...{ lease_ms: 1000 * lease, grace_ms: 1000 * grace },
          say: (line) => console.error(line),
          onUnit: (unit) => json && console.log(JSON.stringify(unit)),
        });
      }),
    );
}

/** The environment says it for commands that a backend runs as jobs. */
export const queueOption = (description: string): Option =>
  new Option('--queue <url>', description).env('MASKROUTE_QUEUE').argParser(queueUrl);

export const journalOption = (): Option =>
  new Option(
    '--journal <folder>',
    'where units are written down, a folder that the run and all workers see (default: units in MASKROUTE_HOME)',
  ).env('MASKROUTE_JOURNAL');

export const journalFolder = (home: string, named: string | undefined): string =>
  named ?? join(home, 'units');

function queueUrl(text: string): string {
  const url = URL.parse(text);
  if (url !== null && /^rediss?:$/.test(url.protocol) && url.host !== '') return text;
  throw new InvalidArgumentError('expected an address such as redis://host:6379');
}
