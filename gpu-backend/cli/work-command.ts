/** `work`: a worker that computes units of `learn --queue`. */
import { join } from 'node:path';
import { type Command, InvalidArgumentError, Option } from 'commander';
import { maskrouteHome } from '../files.ts';
import { examples } from './help.ts';
import { computingThreads, interruptible, THREADS_OPTION, wholeNumber } from './terminal.ts';

const LEASE_s = 10;
const GRACE_s = 5;

type WorkFlags = {
  readonly queue: string;
  readonly journal?: string;
  readonly model?: string;
  readonly threads?: number;
  readonly lease: number;
  readonly grace: number;
  readonly json: boolean;
};

export function addWorkCommand(program: Command): void {
  program
    .command('work')
    .description('compute units of learn --queue; run it on as many machines as you like')
    .addOption(queueOption('the queue of the learning run').makeOptionMandatory())
    .addOption(journalOption())
    .option('--model <name>', 'an installed model (default: as the run names it)')
    .option(...THREADS_OPTION)
    .option(
      '--lease <seconds>',
      'seconds without a sign of life after which a worker loses its unit to another worker',
      wholeNumber(1, 3600),
      LEASE_s,
    )
    .option(
      '--grace <seconds>',
      'how long the current unit may still take after Ctrl-C or SIGTERM, before it is given back',
      wholeNumber(0, 3600),
      GRACE_s,
    )
    .option('--json', 'print a JSON object a line, one for each unit', false)
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
          url: queue,
          journal: journalFolder(home, journal),
          home,
          model,
          signal,
          threads: threads ?? computingThreads(),
          lease_ms: 1000 * lease,
          grace_ms: 1000 * grace,
          say: (line) => console.error(line),
          onUnit: (unit) => json && console.log(JSON.stringify(unit)),
        });
      }).finally(exitSoon),
    );
}

/**
 * Ends the process once a command that used the queue is over and its error, if any, is printed: while the queue is away,
 * BullMQ waits for it with connections and timers that keep the process alive.
 */
export const exitSoon = (): void => void setImmediate(() => process.exit());

/** `--queue`, or MASKROUTE_QUEUE from the environment, which a backend passes to its jobs. */
export const queueOption = (description: string): Option =>
  new Option('--queue <url>', description).env('MASKROUTE_QUEUE').argParser(queueUrl);

export const journalOption = (): Option =>
  new Option(
    '--journal <folder>',
    'the folder of results, which the run and all workers share; by default units in MASKROUTE_HOME',
  ).env('MASKROUTE_JOURNAL');

export const journalFolder = (home: string, named: string | undefined): string =>
  named ?? join(home, 'units');

function queueUrl(text: string): string {
  const url = URL.parse(text);
  if (url !== null && /^rediss?:$/.test(url.protocol) && url.host !== '') return text;
  throw new InvalidArgumentError('expected an address such as redis://host:6379');
}
