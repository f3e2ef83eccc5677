/** `surrogates`: fits and distils surrogates of a model's blocks, and with `--install` installs them. */
import { type Command, Option } from 'commander';
import { maskBits } from '../../shared/mask/mask.ts';
import type { MaskSet } from '../../shared/mask/mask-set.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { maskrouteHome } from '../files.ts';
import type { InstalledModel } from '../model/store.ts';
import { examples } from './help.ts';
import { createReporter } from './reporter.ts';
import {
  computingThreads,
  DATA_HELP,
  interruptible,
  JSON_OPTION,
  part,
  rank,
  wholeNumber,
} from './terminal.ts';

/** As the value of `--from`: the table that the model has. */
const INSTALLED = 'installed';

type Flags = {
  readonly model: string;
  readonly data: string[];
  readonly rank: number;
  readonly steps: number;
  readonly rows?: number;
  readonly seed: number;
  readonly learningRate?: number;
  readonly from?: string;
  readonly around: string[];
  readonly out: string;
  readonly install: boolean;
  readonly json: boolean;
};

export function addSurrogatesCommand(program: Command): void {
  program
    .command('surrogates')
    .description("fit surrogates of a model's skipped blocks; after an interruption the same command resumes")
    .requiredOption('--model <name>', 'an installed model')
    .requiredOption('--data <file...>', DATA_HELP)
    .requiredOption('--out <file>', 'where the table is written, safetensors')
    .option('--rank <number>', 'rank of each surrogate, a multiple of 32', rank, 64)
    .option('--steps <count>', 'steps of distillation; 0: the closed form only', wholeNumber(0), 600)
    .addOption(
      // A table keeps its rank: another one would be ignored.
      new Option(
        '--from <file>',
        `start from this table, at its rank, instead of the closed form; ${INSTALLED}: the model's own`,
      ).conflicts('rank'),
    )
    .option(
      '--around <mask-set...>',
      'mask sets in use: distill mostly under their masks and similar ones',
      [],
    )
    .option('--rows <count>', 'rows read from each file at most', wholeNumber(1))
    .option('--seed <number>', 'the same seed gives the same table', wholeNumber(0), 1)
    .option('--learning-rate <share>', 'learning rate of distillation', part)
    .option('--install', 'put the table into the model at the end', false)
    .option(...JSON_OPTION)
    .addHelpText(
      'after',
      examples(
        'maskroute surrogates --model smollm2-135m-instruct --data chats.jsonl --out table.safetensors --install',
        `maskroute surrogates --model smollm2-135m-instruct --data chats.jsonl --from ${INSTALLED} \\\n` +
          '      --around masks/mask-set.json --steps 150 --learning-rate 0.005 --out tuned.safetensors --install',
      ),
    )
    .action((flags: Flags) => interruptible((signal) => run(flags, signal)));
}

async function run(flags: Flags, signal: AbortSignal): Promise<void> {
  const { out, install, json, around } = flags;
  const { learnSurrogates } = await import('../learning/surrogates/learn-surrogates.ts');
  const { openInstalled } = await import('../model/store.ts');
  const reporter = createReporter();
  const model = await openInstalled(maskrouteHome(), flags.model);
  const learned = await learnSurrogates({
    model,
    data: { files: flags.data, rowsMax: flags.rows },
    start: { rank: flags.rank, from: await startingTable(flags.from, model) },
    distillation: {
      steps: flags.steps,
      learningRate: flags.learningRate,
      around: around.length === 0 ? undefined : await masksInUse(around, model),
    },
    seed: flags.seed,
    out,
    threads: computingThreads(),
    onProgress: reporter.update,
    log: reporter.log,
    signal,
  }).finally(reporter.stop);
  // Installed before anything is printed: a closed pipe or a full disk at the output ends the command.
  const surrogates = install ? await putIntoModel(flags, { log: reporter.log, signal }) : undefined;
  const { start, distilled, steps } = learned;
  const told = { out, start_kl: start, kl: distilled, steps, installed: install, surrogates };
  if (json) return console.log(JSON.stringify(told));
  console.log(
    `${out}: held-out KL ${start.toFixed(4)} at first, ${distilled.toFixed(4)} after ${steps} steps`,
  );
  if (install) console.log(`${model.manifest.name} has the surrogates ${surrogates}`);
  else console.log(`Next: maskroute model surrogates ${flags.model} ${out}`);
}

async function startingTable(
  from: string | undefined,
  { folder, manifest }: InstalledModel,
): Promise<string | undefined> {
  if (from !== INSTALLED) return from;
  if (manifest.surrogates === undefined) {
    const message = `${manifest.name} has no surrogates to start from: leave out --from.`;
    throw new MaskrouteError('invalid_argument', message);
  }
  const { installedTableFile } = await import('../model/surrogates.ts');
  return installedTableFile(folder);
}

/** @returns the table's id. */
async function putIntoModel(
  { model, out }: Pick<Flags, 'model' | 'out'>,
  hooks: { readonly log: (line: string) => void; readonly signal: AbortSignal },
): Promise<string | undefined> {
  const { installTable } = await import('./models.ts');
  const { manifest } = await installTable(maskrouteHome(), model, out, hooks);
  return manifest.surrogates?.id;
}

/** The distinct masks of the sets: first each set's one mask for everybody, then the masks of the clusters. */
async function masksInUse(paths: readonly string[], model: InstalledModel): Promise<Uint8Array[]> {
  const { readMaskSet } = await import('../publication/publish.ts');
  const { checkMaskSets } = await import('../learning/evaluation/inputs.ts');
  const { clusterMasks, oneMask } = await import('../learning/evaluation/scored-rows.ts');
  const sets: MaskSet[] = [];
  for (const path of paths) sets.push(await readMaskSet(path));
  checkMaskSets(sets, model);
  const masks = [...sets.flatMap((set) => oneMask(set) ?? []), ...sets.flatMap(clusterMasks)];
  return [...new Map(masks.map((mask) => [maskBits(mask), mask.runs])).values()];
}
