/** `evaluate`: learned masks against dense and every static baseline. The last line is one JSON object. */
import { dirname, join } from 'node:path';
import { type Command, InvalidArgumentError, Option } from 'commander';
import { STATIC_ENCODER_ID } from '../../shared/embedding/static-encoder.ts';
import type { SurrogatesId } from '../../shared/mask/mask.ts';
import type { MaskSet } from '../../shared/mask/mask-set.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { ENCODERS } from '../encoder/encoder-service.ts';
import { makeOutFolder, maskrouteHome } from '../files.ts';
import type { EvaluateOptions } from '../learning/evaluation/evaluation-context.ts';
import type { Baseline, Evaluation } from '../learning/evaluation/result.ts';
import { BASELINES, CALIBRATED, hasAny, SEARCHED, UNITS_OF } from '../learning/evaluation/result.ts';
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
  share,
  THREADS_OPTION,
  wholeNumber,
} from './terminal.ts';

const SURROGATE_CHOICES = ['auto', 'both', 'with', 'without'] as const;

type EvaluateFlags = DeviceFlags & {
  readonly model: string;
  readonly maskSet: string[];
  readonly data: string[];
  readonly calibration: string[];
  readonly baselines: readonly Baseline[];
  readonly sparsity: readonly number[];
  readonly surrogate: (typeof SURROGATE_CHOICES)[number];
  readonly encoder?: string;
  readonly equalTime: boolean;
  readonly tasks: readonly string[];
  readonly taskLimit: number;
  readonly checks: boolean;
  readonly facts: readonly string[];
  readonly limit: number;
  readonly rows?: number;
  readonly tokens: number;
  readonly budget: number;
  readonly searchPositions: number;
  readonly rounds: number;
  readonly threads?: number;
  readonly seed: number;
  readonly out?: string;
  readonly json: boolean;
};

/** Tokens of `--checks`' long text: well past 512, where missing keys and values would show. */
const LONG_TOKENS = 640;
const TASKS_HELP =
  'multiple choice, as TASK=FILE: openbookqa, winogrande, hellaswag, piqa, arc_easy or arc_challenge';

const CALIBRATION_HELP =
  'text that baselines calibrate on (default: a part of --data). A row that is also here, or in a file with the same name as one of the learning data, ' +
  'is scored only if learn held it out, and then it calibrates nothing';

export function addEvaluationCommand(program: Command): void {
  program
    .command('evaluate')
    .description('compare learned masks with dense and with static pruning, on held-out text')
    .requiredOption('--model <name>', 'an installed model')
    .requiredOption('--mask-set <file...>', 'mask sets that learn wrote')
    .requiredOption('--data <file...>', `${DATA_HELP}; repeated rows count once`)
    .option('--calibration <file...>', CALIBRATION_HELP, [])
    .addOption(
      new Option('--baselines <names>', `all, none, or some of ${BASELINES.join(',')}`)
        .argParser(baselineNames)
        .default(BASELINES, 'all'),
    )
    .option(
      '--sparsity <shares>',
      "more sparsities for the baselines than the mask sets', such as 0.125,0.25",
      shares,
      [],
    )
    .addOption(
      new Option('--surrogate <which>', 'which kinds of masks; auto is both where the model has surrogates')
        .choices(SURROGATE_CHOICES)
        .default('auto'),
    )
    .option('--encoder <name>', 'the encoder of the mask sets (default: what they name)')
    .option('--no-equal-time', 'leave out the comparison at equal time')
    .option('--tasks <file...>', TASKS_HELP, [])
    .option('--task-limit <questions>', 'questions read from each task file at most', wholeNumber(1), 100)
    .option('--checks', 'also check long text, the cliff, narrow calibration and recall of facts', false)
    .option('--facts <file...>', 'text of facts for --checks (default: the right answers of --tasks)', [])
    .option('--limit <rows>', 'rows scored at most', wholeNumber(1), 64)
    .option('--rows <count>', 'rows read from each file at most', wholeNumber(1))
    .option(
      '--tokens <count>',
      'max tokens of a row beside its system prompt; the rest is cut off',
      wholeNumber(8),
      160,
    )
    .option(
      '--budget <evaluations>',
      'evaluations of the model that each search may use',
      wholeNumber(1),
      300,
    )
    .option('--search-positions <count>', 'scored positions of one evaluation', wholeNumber(16), 384)
    .option('--rounds <count>', 'interleaved rounds; their median is the time', wholeNumber(1), 5)
    .option(...THREADS_OPTION)
    .addOption(deviceOption())
    .addOption(floatTypeOption())
    .option('--seed <number>', 'the same seed scores the same rows', wholeNumber(0), 1)
    .option('--out <folder>', 'where evaluation.json and report.html are written')
    .option('--json', 'print the JSON line and nothing else', false)
    .addHelpText(
      'after',
      examples(
        'maskroute evaluate --model smollm2-135m-instruct --mask-set out/mask-set.json --data held-out.jsonl --out out',
        'maskroute evaluate --model smollm2-135m-instruct --mask-set out/mask-set.json --data held-out.jsonl \\',
        '    --baselines shortgpt,last-k --limit 32 --json',
      ),
    )
    .action((flags: EvaluateFlags, command: Command) => {
      refuseIdle(flags, (name) => command.getOptionValueSource(name) === 'cli');
      return interruptible((signal) => runEvaluate(flags, signal));
    });
}

/** Refuses options that would have no effect. @throws MaskrouteError `invalid_argument`. */
function refuseIdle(
  { baselines, checks, tasks }: EvaluateFlags,
  isGiven: (name: keyof EvaluateFlags) => boolean,
): void {
  const needs = (name: keyof EvaluateFlags, isMet: boolean, what: string) => {
    if (isGiven(name) && !isMet) throw new MaskrouteError('invalid_argument', `${what}.`);
  };
  const compared = (some: readonly Baseline[]) =>
    `the baselines ${some.join(', ')}; --baselines names none of them`;
  const fixed = Object.keys(UNITS_OF) as Baseline[];
  needs('facts', checks, '--facts needs --checks, which measures the recall of facts');
  needs('taskLimit', tasks.length > 0, '--task-limit needs --tasks');
  needs('sparsity', hasAny(baselines, fixed), `--sparsity is for ${compared(fixed)}`);
  needs('budget', hasAny(baselines, SEARCHED), `--budget is for ${compared(SEARCHED)}`);
  needs(
    'searchPositions',
    hasAny(baselines, CALIBRATED),
    `--search-positions is for ${compared(CALIBRATED)}`,
  );
}

async function runEvaluate(flags: EvaluateFlags, signal: AbortSignal): Promise<void> {
  const { evaluate } = await import('../learning/evaluation/evaluate.ts');
  const { dataLine, formatEvaluation } = await import('../learning/evaluation/result.ts');
  const reporter = createReporter();
  const options: EvaluateOptions = {
    ...(await toOptions(flags, reporter, signal)),
    onRows: (counts) => reporter.log(`data: ${dataLine(counts)}`),
    onProgress: reporter.update,
  };
  if (flags.out !== undefined) await makeOutFolder(flags.out);
  const evaluation = await evaluate(options).finally(reporter.stop);
  // Files are written before anything is printed: a closed pipe or a full disk at the output ends the command.
  if (flags.out !== undefined) await writeOut(flags.out, flags.maskSet, evaluation);
  if (!flags.json) console.log(formatEvaluation(evaluation));
  console.log(JSON.stringify(evaluation));
}

async function toOptions(
  flags: EvaluateFlags,
  { onProgress, log }: Reporter,
  signal: AbortSignal,
): Promise<Omit<EvaluateOptions, 'onRows' | 'onProgress'>> {
  const { openInstalled } = await import('../model/store.ts');
  const { readMaskSet } = await import('../publication/publish.ts');
  const { parseTaskFile } = await import('../learning/evaluation/tasks/read-task.ts');
  const { surrogatesOf } = await import('../learning/evaluation/evaluation-context.ts');
  const home = maskrouteHome();
  const model = await openInstalled(home, flags.model);
  const maskSets = await Promise.all(flags.maskSet.map(readMaskSet));
  const threads = flags.threads ?? computingThreads();
  return {
    evaluated: { home, model, threads, device: await chosenDevice(flags, model.manifest) },
    compared: {
      maskSets,
      openEncoder: async (set) => {
        const { openEncoder } = await import('../learning/data/encoders.ts');
        const hooks = { onProgress, log, signal };
        return openEncoder(flags.encoder ?? encoderName(set), { home, threads, hooks });
      },
      baselines: flags.baselines,
      sparsities: flags.sparsity,
      flavours: flavoursOf(flags.surrogate, surrogatesOf(model)),
    },
    rows: {
      data: flags.data,
      calibration: flags.calibration,
      rowsMax: flags.rows,
      limit: flags.limit,
      tokensMax: flags.tokens,
      seed: flags.seed,
    },
    search: { evaluationsMax: flags.budget, positions: flags.searchPositions },
    timing: { rounds: flags.rounds, equalTime: flags.equalTime },
    tasks:
      flags.tasks.length === 0
        ? undefined
        : { files: flags.tasks.map(parseTaskFile), limit: flags.taskLimit },
    checks: flags.checks ? { facts: flags.facts, longTokens: LONG_TOKENS } : undefined,
    signal,
  };
}

/** The name that `--encoder` takes for a mask set's encoder. */
function encoderName({ encoder: { id } }: MaskSet): string {
  if (id === STATIC_ENCODER_ID) return STATIC_ENCODER_ID;
  return Object.keys(ENCODERS).find((name) => ENCODERS[name] === id) ?? `hf:${id}`;
}

/** @throws MaskrouteError `invalid_argument` when surrogates are asked for and the model has none. */
function flavoursOf(
  choice: EvaluateFlags['surrogate'],
  table: SurrogatesId | undefined,
): (SurrogatesId | null)[] {
  if (choice === 'without' || (choice === 'auto' && table === undefined)) return [null];
  if (table === undefined)
    throw new MaskrouteError('invalid_argument', 'The model has no surrogates; use --surrogate without.');
  return choice === 'with' ? [table] : [null, table];
}

/** Writes evaluation.json and report.html; the page has the learning report of an evaluated set, too, if it is found. */
async function writeOut(folder: string, maskSets: readonly string[], evaluation: Evaluation): Promise<void> {
  const { writeWhole } = await import('../files.ts');
  const { EVALUATION_FILE, writeEvaluationPage } = await import('../learning/report/write-report.ts');
  await writeWhole(join(folder, EVALUATION_FILE), `${JSON.stringify(evaluation, null, 1)}\n`);
  const besideSets = maskSets.map((file) => dirname(file));
  await writeEvaluationPage(folder, evaluation, besideSets);
}

function baselineNames(text: string): readonly Baseline[] {
  if (text === 'all') return BASELINES;
  if (text === 'none') return [];
  return text.split(',').map((name) => {
    const found = BASELINES.find((baseline) => baseline === name.trim());
    if (found === undefined) throw new InvalidArgumentError(`${name} is none of ${BASELINES.join(', ')}`);
    return found;
  });
}

const shares = (text: string): readonly number[] => text.split(',').map(share);
