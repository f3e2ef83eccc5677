/**
 * `maskroute evaluate`: compares learned masks with the dense model and every static baseline, on rows that none of
 * them was made on. Each method gives one row of figures. Results are kept by content, so a killed or repeated
 * evaluation resumes.
 */

import type { Mask } from '../../../shared/mask/mask.ts';
import { maskSetVersion } from '../../../shared/mask/mask-set.ts';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { CPU, deviceName } from '../../onnx/device.ts';
import { kindTable } from '../data/clusters.ts';
import type { CalibrationRow } from '../data/read-data.ts';
import type { Sample } from '../data/samples.ts';
import { createSampler, tryTemplate } from '../data/samples.ts';
import { countsOf, skipCountFor } from '../search/budget.ts';
import { searchOrders } from './baselines/search-orders.ts';
import { runChecks } from './checks/run-checks.ts';
import type { Contestant } from './contestants.ts';
import { toRow } from './contestants.ts';
import type { Context, EvaluateOptions } from './evaluation-context.ts';
import { drawCalibration, openContext, routeSets, scoreSamples, surrogatesOf } from './evaluation-context.ts';
import type { Inputs } from './inputs.ts';
import { readInputs } from './inputs.ts';
import type { LineUp } from './line-up.ts';
import { equalCountContestants, equalTimeContestants } from './line-up.ts';
import type { Evaluation, EvaluationRow, StaticMethod } from './result.ts';
import { CALIBRATED, hasAny, SEARCHED } from './result.ts';
import { pickRows } from './scored-rows.ts';
import { headroomSubjects, setHeadroom } from './set-headroom.ts';
import { checkTasks, runTasks } from './tasks/run-tasks.ts';
import type { Timer } from './timing.ts';
import { createTimer, timePlane, weightPoints } from './timing.ts';

/**
 * @throws MaskrouteError `invalid_data`, `invalid_argument`, `invalid_mask_set` for a set of another model,
 * `encoder_mismatch`. Rejects when `signal` aborts; the next evaluation reuses finished results.
 */
export async function evaluate(options: EvaluateOptions): Promise<Evaluation> {
  const inputs = await readInputs(options);
  await using context = await openContext(options);
  return await evaluateIn(context, inputs);
}

async function evaluateIn(context: Context, inputs: Inputs): Promise<Evaluation> {
  const { options, runner } = context;
  const { model, threads } = options.evaluated;
  const { limit, seed } = options.rows;
  const { data } = inputs;
  checkTasks(context, inputs.tasks);
  // Other rows are encoded at the start, but those of the checks only at the end, so the template is tried on them now.
  if (options.checks) tryTemplate([...data.calibration, ...pickRows(data.facts, limit, seed)], context.text);
  const { rows, samples } = scoredSamples(context, data.scored);
  const lineUp = await drawUp(context, rows, data.calibration);
  const { contestants, notes } = equalCountContestants(lineUp);
  const timer = createTimer(runner, options.signal);
  const timed = await matchTimes(context, lineUp, contestants, timer);
  const all = [...contestants, ...timed];
  const subjects = headroomSubjects(lineUp);
  const scoresOf = await scoreSamples(
    context,
    'score',
    samples,
    rows.map((_, row) => [
      ...all.flatMap(({ masks }) => masks[row]!),
      ...subjects.flatMap(({ masks, lighter }) => [...masks, ...lighter]),
    ]),
  );
  const toFigures = (contestant: Contestant): EvaluationRow => {
    const perRow = contestant.masks.map((masks, row) => masks.map((mask) => scoresOf(row, mask)));
    return toRow(contestant, rows, perRow, timer, model.manifest.config);
  };
  const tasks = await runTasks(context, lineUp, inputs.tasks);
  const checked = options.checks
    ? await runChecks({ context, asked: options.checks, inputs, lineUp, rows, samples })
    : { checks: undefined, notes: [] };
  return {
    rows: contestants.map((contestant, i) => ({ ...toFigures(contestant), ...tasks[i] })),
    equalTime: timed.map(toFigures),
    headroom: subjects.map((subject) => setHeadroom(subject, rows, scoresOf)),
    routing: lineUp.sets.map(({ set, clusters }) => ({
      maskSet: maskSetVersion(set),
      name: set.name,
      kinds: kindTable(rows, clusters, set.clusters.length),
    })),
    ...(checked.checks === undefined ? {} : { checks: checked.checks }),
    data: data.counts,
    notes: [...inputs.notes, ...notes, ...tableNotes(options), ...deviceNotes(options), ...checked.notes],
    model: model.manifest.name,
    weights: model.manifest.weights,
    threads,
    search: { evaluations: options.search.evaluationsMax, positions: options.search.positions },
    seed,
  };
}

/** Routes the rows, and searches the orders of the static methods. */
async function drawUp(
  context: Context,
  rows: readonly CalibrationRow[],
  calibration: readonly CalibrationRow[],
): Promise<LineUp> {
  const { options } = context;
  const { baselines, flavours } = options.compared;
  return {
    rowCount: rows.length,
    blockCount: 2 * options.evaluated.model.manifest.config.layerCount,
    sets: await routeSets(options, rows),
    baselines,
    flavours,
    sparsities: sparsitiesOf(options),
    orders: await search(context, calibration),
  };
}

/** Notes the device that ran and timed the masks, unless it is the CPU. */
const deviceNotes = ({ evaluated: { device = CPU } }: EvaluateOptions): string[] =>
  device.kind === 'cpu' ? [] : [`Masks were run and timed on ${deviceName(device)}.`];

/** Notes the sets that were learned with another table of surrogates than the model has now. */
function tableNotes({ compared, evaluated }: EvaluateOptions): string[] {
  const present = surrogatesOf(evaluated.model);
  return compared.maskSets
    .filter(({ surrogates }) => surrogates !== undefined && surrogates !== present)
    .map(
      ({ name, surrogates }) =>
        `${name} was learned with the surrogates ${surrogates}; the model has ${present ?? 'none'}.`,
    );
}

/** Rows that are long enough to score, at most `limit`. */
function scoredSamples({ options, text }: Context, scored: readonly CalibrationRow[]) {
  const { limit, seed, tokensMax } = options.rows;
  const { eosTokenIds, config } = options.evaluated.model.manifest;
  const sampling = { tokensMax, contextTokens: config.contextTokens };
  const sampleOf = createSampler(text, eosTokenIds[0]!, sampling);
  const rows: CalibrationRow[] = [];
  const samples: Sample[] = [];
  for (const row of pickRows(scored, limit, seed)) {
    const sample = sampleOf(row);
    if (sample === undefined) continue;
    rows.push(row);
    samples.push(sample);
  }
  if (rows.length === 0)
    throw new MaskrouteError('invalid_data', `No row has a token to score among its first ${tokensMax}.`);
  return { rows, samples };
}

function search(context: Context, calibration: readonly CalibrationRow[]) {
  const { options, scorer } = context;
  const { evaluated, onProgress, signal } = options;
  const { baselines, flavours } = options.compared;
  const { evaluationsMax } = options.search;
  const methods = baselines.filter((name): name is StaticMethod => name !== 'one-mask');
  const samples = drawCalibration(context, calibration);
  if (samples.length === 0 && hasAny(methods, CALIBRATED))
    throw new MaskrouteError(
      'invalid_data',
      `No row to calibrate on has a token among its first ${options.rows.tokensMax}.`,
    );
  const blockCount = 2 * evaluated.model.manifest.config.layerCount;
  const skipCountMax = skipCountFor(blockCount, Math.max(...sparsitiesOf(options)) + EXTRA_SPARSITY);
  const greedy = methods.filter((name) => hasAny(SEARCHED, [name])).length;
  const total = greedy * flavours.length * evaluationsMax;
  let done = 0;
  const onEvaluation = (method: StaticMethod) =>
    onProgress(`search ${method}`, ++done, Math.max(done, total));
  return searchOrders(
    { evaluated, scorer, samples },
    { methods, flavours, skipCountMax, evaluationsMax },
    { onEvaluation, signal },
  );
}

/** Searches go this much beyond the highest sparsity, so that a method can also be taken at a learned set's time. */
const EXTRA_SPARSITY = 0.05;

/** Timing rounds: enough to find the count of blocks at which two methods are equally fast. */
const ROUGH_ROUNDS = 3;

/** Times all contestants, adds the static methods at the times of the learned sets, and times all again. */
async function matchTimes(
  { options }: Context,
  lineUp: LineUp,
  contestants: readonly Contestant[],
  timer: Timer,
): Promise<Contestant[]> {
  const { rounds, equalTime } = options.timing;
  const masksOf = (some: readonly Contestant[]): Mask[] => some.flatMap(({ masks }) => masks.flat());
  options.onProgress('time', 0, 2);
  await timer.measure(masksOf(contestants), equalTime ? ROUGH_ROUNDS : rounds);
  options.onProgress('time', 1, 2);
  if (!equalTime) return [];
  const learned = contestants.filter(({ method }) => method === 'learned');
  const timed = equalTimeContestants(lineUp, learned, (flavour) => {
    const dense = masksOf(contestants.filter(({ method }) => method === 'dense')).slice(0, 1);
    const masks = masksOf(contestants).filter((mask) => (mask.surrogates ?? null) === flavour);
    const measured = [...dense, ...masks].map((mask) => ({ ...countsOf(mask), ms: timer.msOf(mask) }));
    const weights = weightPoints(options.evaluated.model.manifest.config, measured[0]!.ms);
    // The weights count as much as the measurements: an attention block saves less time than measurements vary by
    // chance.
    return timePlane([...measured, ...measured.flatMap(() => weights)]);
  });
  await timer.measure([...masksOf(contestants), ...masksOf(timed)], rounds);
  options.onProgress('time', 2, 2);
  return timed;
}

const sparsitiesOf = ({ compared }: EvaluateOptions): number[] =>
  [
    ...new Set([...compared.sparsities, ...compared.maskSets.map(({ targetSparsity }) => targetSparsity)]),
  ].sort((a, b) => a - b);
