/** `distill`: makes the static encoder's table. */
import type { Command } from 'commander';
import { maskrouteHome } from '../files.ts';
import { examples } from './help.ts';
import { createReporter } from './reporter.ts';
import { computingThreads, DATA_HELP, interruptible, JSON_OPTION, wholeNumber } from './terminal.ts';

type DistillFlags = {
  readonly encoder: string;
  readonly data: string[];
  readonly out: string;
  readonly dimensions: number;
  readonly seed: number;
  readonly json: boolean;
};

export function addDistillCommand(program: Command): void {
  program
    .command('distill')
    .description('distill the table of the static encoder from a full sentence encoder')
    .requiredOption(
      '--encoder <name>',
      'the teacher: an encoder by name such as all-minilm-l6-v2, hf:OWNER/NAME, or a folder',
    )
    .requiredOption('--data <file...>', DATA_HELP)
    .requiredOption('--out <file>', 'where the table is written')
    .option('--dimensions <count>', 'dimensions of the vectors', wholeNumber(1, 1024), 248)
    .option('--seed <number>', 'the same seed gives the same table', wholeNumber(0), 1)
    .option(...JSON_OPTION)
    .addHelpText(
      'after',
      examples('maskroute distill --encoder all-minilm-l6-v2 --data chats.jsonl --out table.bin'),
    )
    .action((flags: DistillFlags) => interruptible((signal) => runDistill(flags, signal)));
}

async function runDistill({ json, ...flags }: DistillFlags, signal: AbortSignal): Promise<void> {
  const { distillTable } = await import('../learning/data/distill.ts');
  const reporter = createReporter();
  const report = await distillTable({
    ...flags,
    home: maskrouteHome(),
    threads: computingThreads(),
    hooks: { onProgress: reporter.onProgress, log: reporter.log, signal },
    onProgress: reporter.update,
  }).finally(reporter.stop);
  const { texts, tokens } = report;
  const text = `${flags.out}: from ${texts} texts of ${tokens} tokens`;
  console.log(json ? JSON.stringify({ out: flags.out, texts, tokens }) : text);
}
