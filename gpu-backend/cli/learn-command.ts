/** `learn`: the offline pipeline on the command line. */
import path from 'node:path';
import { type Command, InvalidArgumentError, Option } from 'commander';
import { BLOCK_COUNT_MAX } from '../../shared/mask/mask.ts';
import { heldOutAgreement } from '../../shared/mask/mask-set.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { maskrouteHome } from '../files.ts';
import type { Scored } from '../learning/data/samples.ts';
import type { Learned, LearnOptions, LearnProgress } from '../learning/learn.ts';
import type { CountRange } from '../learning/search/budget.ts';
import type { BlockCost, TargetKind } from '../learning/search/effort.ts';
import { CONTEXT_TOKENS, LEARN_EFFORT, QUICK_EFFORT, withoutSearch } from '../learning/search/effort.ts';
import type { LearnReport } from '../learning/search/learn-report.ts';
import { percent } from '../measure.ts';
import type { InstalledModel } from '../model/store.ts';
import { type Device, deviceName } from '../onnx/device.ts';
import { readMaskSet } from '../publication/publish.ts';
import { examples } from './help.ts';
import { createReporter, type Reporter } from './reporter.ts';
import {
  chosenDevice,
  computingThreads,
  DATA_HELP,
  type DeviceFlags,
  deviceOption,
  floatTypeOption,
  interruptible,
  JSON_OPTION,
  numberWhere,
  part,
  wholeNumber,
} from './terminal.ts';
import { exitSoon, journalFolder, journalOption, queueOption } from './work-command.ts';

const CLUSTER_COUNT_MAX = 256;
const BLOCKS_MAX = BLOCK_COUNT_MAX / 2;

type LearnFlags = DeviceFlags & {
  readonly model: string;
  readonly data: string[];
  readonly clusters: readonly number[] | 'auto';
  readonly masks?: number;
  readonly sparsity: number;
  readonly cost: BlockCost;
  readonly context?: number;
  readonly quick: boolean;
  readonly from?: string;
  readonly memory?: number;
  readonly attention?: CountRange;
  readonly ffn?: CountRange;
  readonly surrogate?: boolean;
  readonly loss: TargetKind;
  readonly score: Scored;
  readonly encoder: string;
  readonly out: string;
  readonly name?: string;
  readonly rows?: number;
  readonly seed: number;
  readonly queue?: string;
  readonly journal?: string;
  readonly json: boolean;
};

export function addLearnCommand(program: Command): void {
  program
    .command('learn')
    .description(
      'learn masks for the clusters of your prompts; after an interruption the same command resumes',
    )
    .requiredOption('--model <name>', 'an installed model')
    .requiredOption('--data <file...>', DATA_HELP)
    .requiredOption(
      '--clusters <count>',
      'clusters of prompts: 1 to 256, auto, or several counts to compare: 1,16,64',
      clusterCounts,
    )
    .option(
      '--masks <count>',
      'masks that the clusters share at most (default: as many as pay)',
      wholeNumber(1, CLUSTER_COUNT_MAX),
    )
    .requiredOption('--sparsity <share>', 'share of the blocks to skip on average, such as 0.125', part)
    .addOption(
      new Option('--cost <what>', 'what the sparsity is a share of: blocks, or measured ms/token')
        .choices(['blocks', 'time'])
        .default('blocks'),
    )
    .option(
      '--context <tokens>',
      `with --cost time: context of the timed token, in tokens (default: ${CONTEXT_TOKENS})`,
      wholeNumber(1),
    )
    .option('--attention <range>', 'attention blocks to skip: 7, 4-9, or -9', countRange)
    .option('--ffn <range>', 'FFN blocks to skip: 7, 4-9, or -9', countRange)
    .option(
      '--surrogate',
      'learn with surrogates in place of skipped blocks (default: if the model has them)',
    )
    .option('--no-surrogate', 'learn without surrogates')
    .requiredOption('--out <folder>', 'where mask-set.json, report.json and report.html are written')
    .addOption(
      new Option(
        '--loss <kind>',
        "what masks are trained on: the dense model's distributions, or the text's next tokens",
      )
        .choices(['dense', 'next-token'])
        .default(LEARN_EFFORT.targets),
    )
    .addOption(
      new Option('--score <what>', 'scored positions: all after the system prompt, or answers only')
        .choices(['all', 'answers'])
        .default(LEARN_EFFORT.scored),
    )
    .option(
      '--encoder <name>',
      'what embeds prompts: static, a .bin table, an encoder by name, hf:OWNER/NAME, or a folder',
      'static',
    )
    .option('--name <name>', "the mask set's name (default: the folder's)")
    .option('--rows <count>', 'rows read from each file at most', wholeNumber(1))
    .option('--quick', 'a usable set in minutes: less text, fewer exchanges, one turn', false)
    .option(
      '--from <file>',
      'take the masks of this mask set, without a search, and assign them to the new clusters',
    )
    .option(
      '--memory <GB>',
      'memory for the work; a larger model is computed layer by layer (default: what there is)',
      gigabytes,
    )
    .addOption(deviceOption())
    .addOption(floatTypeOption())
    .option('--seed <number>', 'the same seed gives the same mask set', wholeNumber(0), 1)
    .addOption(queueOption('hand the work to maskroute work through this queue; without one, compute here'))
    .addOption(journalOption())
    .option(...JSON_OPTION)
    .addHelpText(
      'after',
      examples(
        'maskroute learn --model smollm2-135m-instruct --data chats.jsonl --clusters 8 --sparsity 0.125 --out out',
        'maskroute learn --model smollm2-135m-instruct --data a.jsonl b.jsonl --clusters auto --cost time --sparsity 0.25 \\',
        '    --out out',
      ),
    )
    .action((flags: LearnFlags, command: Command) => {
      if (command.getOptionValueSource('journal') === 'cli') checkJournal(flags);
      const run = interruptible((signal) => runLearn(flags, signal));
      return flags.queue === undefined ? run : run.finally(exitSoon);
    });
}

const STAGE_LINES = { read: 'reading the data', embed: 'embedding the prompts and clustering them' };

async function runLearn(flags: LearnFlags, signal: AbortSignal): Promise<void> {
  const { checkRun, learn, MASK_SET_FILE } = await import('../learning/learn.ts');
  const { openInstalled } = await import('../model/store.ts');
  const home = maskrouteHome();
  const reporter = createReporter();
  const model = await openInstalled(home, flags.model);
  checkSparsity(flags, 2 * model.manifest.config.layerCount);
  checkContext(flags);
  const options = await toOptions(flags, home, model, reporter, signal);
  await checkRun(options);
  await sayForecast(model, flags, { log: reporter.log, signal });
  try {
    if (flags.clusters !== 'auto' && flags.clusters.length > 1)
      return await runSweep(options, flags.clusters, flags.json);
    const clusterCount = flags.clusters === 'auto' ? 'auto' : flags.clusters[0]!;
    const learned = await learn({ ...options, clusterCount });
    reporter.stop();
    const file = path.join(flags.out, MASK_SET_FILE);
    if (flags.json) console.log(JSON.stringify(learnedJson(learned, file)));
    else await showLearned(learned, file);
  } finally {
    reporter.stop();
  }
}

async function toOptions(
  flags: LearnFlags,
  home: string,
  model: InstalledModel,
  reporter: Reporter,
  signal: AbortSignal,
): Promise<Omit<LearnOptions, 'clusterCount'>> {
  const device = await chosenDevice(flags, model.manifest);
  if (device.kind !== 'cpu') reporter.log(whereLearningComputes(device, flags.queue !== undefined));
  return {
    model,
    surrogates: await surrogatesFor(model, flags.surrogate),
    data: { files: flags.data, rowsMax: flags.rows },
    encoder: flags.encoder,
    budget: {
      sparsity: flags.sparsity,
      cost: flags.cost,
      context: flags.context,
      attention: flags.attention,
      ffn: flags.ffn,
    },
    search: {
      effort: { ...(flags.quick ? QUICK_EFFORT : LEARN_EFFORT), targets: flags.loss, scored: flags.score },
      maskCount: flags.masks,
      earlier: flags.from === undefined ? undefined : await readMaskSet(flags.from),
    },
    machine: {
      home,
      threads: computingThreads(),
      device,
      memory_bytes: flags.memory,
      openUnits: await unitsFor(flags, home, reporter.log),
    },
    output: { folder: flags.out, name: flags.name ?? path.basename(path.resolve(flags.out)) },
    seed: flags.seed,
    hooks: {
      onProgress: (progress) => showProgress(progress, reporter, signal),
      onDownload: reporter.onProgress,
      log: reporter.log,
      signal,
    },
  };
}

function showProgress(progress: LearnProgress, reporter: Reporter, signal: AbortSignal): void {
  // What was under way when the run was stopped still ends.
  if (signal.aborted) return;
  const at = `stage ${progress.at.number} of ${progress.at.count}`;
  if (!('done' in progress)) {
    reporter.log(`${at}, ${STAGE_LINES[progress.stage]}`);
    return;
  }
  const { stage, done, total, unit, group, work } = progress;
  const detail = group === undefined ? '' : `group ${group + 1}`;
  reporter.update(stage, done, total, detail, { unit, work, stage: at });
}

/** Gradients need operators that ONNX Runtime has for the CPU only. With a queue, workers choose their own devices. */
const whereLearningComputes = (device: Device, isQueued: boolean): string =>
  isQueued
    ? `Blocks are timed on ${deviceName(device)}; everything else is computed by the workers.`
    : `Masks are scored and timed on ${deviceName(device)}; gradients, losses and the dense model's targets are computed on the CPU.`;

/** Assumed clusters of `--clusters auto`, for the forecast. */
const AUTO_CLUSTERS = 8;

/** Prints how long the run will take, and what smaller runs would. */
async function sayForecast(
  model: InstalledModel,
  flags: LearnFlags,
  { log, signal }: { log(line: string): void; readonly signal: AbortSignal },
): Promise<void> {
  const { forecastLearning, forecastLines, measurePaces, memoryOfData, tokensAPosition } = await import(
    '../learning/forecast.ts'
  );
  const { roundingIn } = await import('../learning/learn.ts');
  const { sizeOfData } = await import('../learning/data/read-data.ts');
  const clusters = flags.clusters === 'auto' ? [AUTO_CLUSTERS] : flags.clusters;
  const files = { files: flags.data, rowsMax: flags.rows };
  const data = await sizeOfData(files);
  const sampling = { tokensMax: LEARN_EFFORT.tokensMax, scored: flags.score };
  const machine = {
    positionTokens: await tokensAPosition(model, { ...files, ...data }, sampling, signal),
    paces: await measurePaces(computingThreads(), await roundingIn(flags.out)),
    available_bytes: flags.memory ?? process.availableMemory() - memoryOfData(data),
    data,
  };
  const of = (full: typeof LEARN_EFFORT, clusterCounts: readonly number[]) => {
    const effort = flags.from === undefined ? full : withoutSearch(full);
    const { config, weights } = model.manifest;
    return forecastLearning(config, weights, effort, { ...machine, clusterCounts, maskCount: flags.masks });
  };
  const smaller = [
    { flags: '--clusters 1', forecast: of(LEARN_EFFORT, [1]) },
    { flags: '--quick', forecast: of(QUICK_EFFORT, clusters) },
    { flags: '--quick --clusters 1', forecast: of(QUICK_EFFORT, [1]) },
  ];
  const asked = of(flags.quick ? QUICK_EFFORT : LEARN_EFFORT, clusters);
  for (const line of forecastLines(asked, smaller)) log(line);
}

async function runSweep(
  options: Omit<LearnOptions, 'clusterCount'>,
  clusterCounts: readonly number[],
  json: boolean,
): Promise<void> {
  const { sweepClusters } = await import('../learning/sweep.ts');
  await sweepClusters(options, clusterCounts, (run) => {
    if (json) return console.log(JSON.stringify(run));
    const { clusters, kl, oneMask_kl, perplexity, largestShare } = run;
    const figures = `KL ${kl.toFixed(4)} (one mask ${oneMask_kl.toFixed(4)}), perplexity ${perplexity.toFixed(2)}`;
    console.log(`${clusters} clusters: held out, ${figures}; largest cluster ${percent(largestShare)}`);
  });
}

const learnedJson = ({ maskSet, report }: Learned, file: string) => ({
  file,
  name: maskSet.name,
  version: report.version,
  masks: report.masks,
  clusters: report.clusters,
  reached_sparsity: maskSet.reachedSparsity,
  held_out: maskSet.heldOut,
  collapse: report.routing.collapse,
});

async function showLearned({ maskSet, report }: Learned, file: string): Promise<void> {
  if (report.routing.collapse !== null) console.error(`Routing has collapsed: ${report.routing.collapse}.`);
  for (const [index, mask] of report.masks.entries()) {
    const skipped = [...mask.skipAttention.map((l) => `A${l}`), ...mask.skipFfn.map((l) => `F${l}`)];
    const clusters = report.clusters.filter(({ maskIndex }) => maskIndex === index).length;
    console.log(
      `mask ${index}  ${clusters} of ${report.clusters.length} clusters, ${percent(mask.share)}  skipped: ${skipped.join(' ')}`,
    );
  }
  if (report.sharing !== null) await showSharing(report.sharing);
  const figures = maskSet.heldOut as Record<string, { kl?: number; perplexity?: number } | undefined>;
  for (const method of ['learned', 'one-mask']) {
    const { kl, perplexity } = figures[method] ?? {};
    if (kl !== undefined && perplexity !== undefined)
      console.log(`held out, ${method}: KL ${kl.toFixed(3)}, perplexity ${perplexity.toFixed(1)}`);
  }
  console.log(
    `${maskSet.name} ${report.version}, ${percent(maskSet.reachedSparsity)} of the blocks skipped: ${file}`,
  );
  if (heldOutAgreement(maskSet) !== null) console.log(`Next: maskroute publish ${file} --activate`);
  else {
    console.error(
      'There were too few prompts to hold any out, so the quality of this set is unknown, and no edge makes it live. Learn it with more prompts.',
    );
  }
}

async function showSharing({ headroom, reason }: NonNullable<LearnReport['sharing']>): Promise<void> {
  const { headroomLines } = await import('../learning/search/headroom.ts');
  if (headroom !== null) console.log(headroomLines(headroom).join('\n'));
  if (reason !== null) console.log(`All clusters share one mask: ${reason}.`);
}

/** Units that workers compute; undefined without `--queue`, when this process computes. */
async function unitsFor({ queue, journal }: LearnFlags, home: string, say: (line: string) => void) {
  if (queue === undefined) return undefined;
  const { openQueuedUnits } = await import('../learning/units/queued-units.ts');
  return openQueuedUnits({ url: queue, journal: journalFolder(home, journal), say });
}

/** The model's surrogates, unless `--no-surrogate`. @throws MaskrouteError `invalid_argument` when requested but missing. */
async function surrogatesFor(model: InstalledModel, wanted: boolean | undefined) {
  if (wanted === false) return undefined;
  const { installedSurrogates } = await import('../model/surrogates.ts');
  const found = await installedSurrogates(model);
  if (found !== undefined || wanted === undefined) return found;
  throw new MaskrouteError(
    'invalid_argument',
    `${model.manifest.name} has no surrogates; make them with: maskroute surrogates`,
  );
}

/** @throws MaskrouteError `invalid_argument` when the sparsity rounds to no block. */
function checkSparsity({ sparsity, cost }: LearnFlags, blockCount: number): void {
  if (cost !== 'blocks' || Math.round(sparsity * blockCount) > 0) return;
  throw new MaskrouteError(
    'invalid_argument',
    `A sparsity of ${sparsity} is less than half a block of ${blockCount} blocks: no mask would skip anything.`,
  );
}

/** Called for the flag only; MASKROUTE_JOURNAL may be set for other runs. @throws MaskrouteError `invalid_argument`. */
function checkJournal({ queue }: LearnFlags): void {
  if (queue !== undefined) return;
  throw new MaskrouteError('invalid_argument', '--journal is for --queue, whose workers write there.');
}

/** @throws MaskrouteError `invalid_argument` when `--context` would have no effect. */
function checkContext({ cost, context, from }: LearnFlags): void {
  if (context === undefined || (cost === 'time' && from === undefined)) return;
  throw new MaskrouteError(
    'invalid_argument',
    from === undefined
      ? '--context needs --cost time, which times the blocks.'
      : '--context has no effect with --from: blocks weigh the same as in the earlier set.',
  );
}

/** Gigabytes as bytes. */
const gigabytes = (text: string): number =>
  1e9 * numberWhere('gigabytes, such as 8', (value) => value > 0)(text);

function clusterCounts(text: string): number[] | 'auto' {
  if (text === 'auto') return text;
  const counts = text.split(',').map(Number);
  const isCount = (count: number) => Number.isInteger(count) && count >= 1 && count <= CLUSTER_COUNT_MAX;
  if (/^[\d,]+$/.test(text) && counts.every(isCount)) return counts;
  throw new InvalidArgumentError(
    `expected a whole number from 1 to ${CLUSTER_COUNT_MAX}, several such as 1,2,4,8, or auto`,
  );
}

/** `7`: exactly; `4-9`; `4-`: at least; `-9`: at most. */
function countRange(text: string): CountRange {
  const [, min = '', dash, max = ''] = /^(\d*)(-?)(\d*)$/.exec(text) ?? [];
  const range = {
    min: Number(min),
    max: dash === '-' ? (max === '' ? BLOCKS_MAX : Number(max)) : Number(min),
  };
  if ((min !== '' || max !== '') && range.min <= range.max) return range;
  throw new InvalidArgumentError('expected a count or a range of counts, such as 7, 4-9, 4- or -9');
}
