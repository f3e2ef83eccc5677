/** `learn` and `distill`: the offline pipelines on the command line. */
import { availableParallelism } from 'node:os';
import path from 'node:path';
import type { Command } from 'commander';
import { maskrouteHome } from '../home.ts';
import { interruptible, share, wholeNumber } from './arguments.ts';
import { createProgressReporter } from './progress.ts';
import { createStages } from './stages.ts';

const CLUSTER_COUNT_MAX = 256;
const DATA_HELP =
  'JSONL rows with messages, prompt + completion, question + answer, instruction + output, or text';

type LearnFlags = {
  readonly model: string;
  readonly data: string[];
  readonly clusters: number;
  readonly sparsity: number;
  readonly encoder: string;
  readonly out: string;
  readonly name?: string;
  readonly rows?: number;
  readonly seed?: number;
};

type DistillFlags = {
  readonly encoder: string;
  readonly data: string[];
  readonly out: string;
  readonly dimensions?: number;
  readonly seed?: number;
};

export function addCalibrationCommands(program: Command): void {
  program
    .command('learn')
    .description('find a mask for every cluster of your prompts; killed and started again, it goes on')
    .requiredOption('--model <name>', 'an installed model')
    .requiredOption('--data <file...>', DATA_HELP)
    .requiredOption('--clusters <count>', 'how many masks', wholeNumber(1, CLUSTER_COUNT_MAX))
    .requiredOption('--sparsity <share>', 'share of the blocks to leave out, such as 0.125', share)
    .requiredOption('--out <folder>', 'gets mask-set.json and report.json')
    .option('--encoder <name>', 'what embeds: static, a .bin table, all-minilm-l6-v2, or a folder', 'static')
    .option('--name <name>', "the mask set's own name (default: the folder's)")
    .option('--rows <count>', 'rows taken from each file', wholeNumber(1))
    .option('--seed <number>', 'equal seeds give equal sets', wholeNumber(0))
    .action((flags: LearnFlags) => interruptible((signal) => runLearn(flags, signal)));

  program
    .command('distill')
    .description('make the table of the static encoder out of a full sentence encoder')
    .requiredOption('--encoder <name>', 'the teacher: all-minilm-l6-v2, hf:OWNER/NAME, or a folder')
    .requiredOption('--data <file...>', DATA_HELP)
    .requiredOption('--out <file>', 'the table')
    .option('--dimensions <count>', 'of the vectors', wholeNumber(1, 1024))
    .option('--seed <number>', 'equal seeds give equal tables', wholeNumber(0))
    .action((flags: DistillFlags) => interruptible((signal) => runDistill(flags, signal)));
}

async function runLearn({ rows, seed, ...flags }: LearnFlags, signal: AbortSignal): Promise<void> {
  const { learn, MASK_SET_FILE } = await import('../calibration/learn.ts');
  const { showModel } = await import('./model.ts');
  const home = maskrouteHome();
  const { stop: stopHooks, ...hooks } = createProgressReporter();
  const stages = createStages();
  const { maskSet, report } = await learn({
    model: await showModel(home, flags.model),
    data: flags.data,
    clusterCount: flags.clusters,
    sparsity: flags.sparsity,
    encoder: flags.encoder,
    encoderOptions: { home, threads: availableParallelism(), hooks },
    out: flags.out,
    name: flags.name ?? path.basename(path.resolve(flags.out)),
    ...(rows === undefined ? {} : { rowsMax: rows }),
    ...(seed === undefined ? {} : { seed }),
    onProgress: (progress) =>
      'done' in progress
        ? stages.update(progress.stage, progress.done, progress.total)
        : hooks.log(STAGE_LINES[progress.stage]),
    signal,
  }).finally(() => {
    stages.stop();
    stopHooks();
  });
  for (const [index, cluster] of report.clusters.entries()) {
    const out = [...cluster.skipAttention.map((l) => `A${l}`), ...cluster.skipFfn.map((l) => `F${l}`)];
    console.log(`cluster ${index}  ${percent(cluster.share)}  ${cluster.label}  out: ${out.join(' ')}`);
  }
  const file = path.join(flags.out, MASK_SET_FILE);
  console.log(
    `${maskSet.name} ${report.version}, ${percent(maskSet.reachedSparsity)} of the blocks out: ${file}`,
  );
  console.log(`Next: maskroute publish ${file} --activate`);
}

const STAGE_LINES = { read: 'Reading the data', embed: 'Embedding the prompts' };

async function runDistill({ seed, dimensions, ...flags }: DistillFlags, signal: AbortSignal): Promise<void> {
  const { distillTable } = await import('../calibration/distill-table.ts');
  const { stop: stopHooks, ...hooks } = createProgressReporter();
  const stages = createStages();
  const report = await distillTable({
    ...flags,
    home: maskrouteHome(),
    threads: availableParallelism(),
    ...(dimensions === undefined ? {} : { dimensions }),
    ...(seed === undefined ? {} : { seed }),
    hooks,
    onProgress: stages.update,
    signal,
  }).finally(() => {
    stages.stop();
    stopHooks();
  });
  console.log(`${flags.out}: from ${report.texts} texts of ${report.tokens} tokens`);
}

const percent = (part: number): string => `${(part * 100).toFixed(1)} %`;
