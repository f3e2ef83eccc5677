/**
 * The checks that the paper calls for: where tasks are routed, what calibration on one narrow kind costs, text past 512
 * tokens, the sparsity at which quality collapses, and whether facts are still recalled.
 */
import { type Mask, type SurrogatesId, sparsity, withSurrogates } from '../../../../shared/mask/mask.ts';
import type { ModelText } from '../../../model/tokenizer/model-text.ts';
import { kindTable } from '../../data/clusters.ts';
import type { CalibrationRow } from '../../data/read-data.ts';
import { createSampler, type Sample } from '../../data/samples.ts';
import { skipCountFor } from '../../search/budget.ts';
import { addScores, type Figures, figuresOf } from '../../search/score-masks.ts';
import { searchOrders } from '../baselines/search-orders.ts';
import { maskAlong } from '../baselines/static-orders.ts';
import {
  type CheckOptions,
  type Context,
  contestantsOn,
  drawCalibration,
  scoreSamples,
} from '../evaluation-context.ts';
import type { Inputs } from '../inputs.ts';
import { equalCountContestants, type LineUp } from '../line-up.ts';
import type { Checks } from '../result.ts';
import { pickRows } from '../scored-rows.ts';
import type { Question } from '../tasks/read-task.ts';
import { encodeChoices } from '../tasks/score-question.ts';
import { judgeLongText } from './long-text.ts';

type CheckInput = {
  readonly context: Context;
  readonly asked: CheckOptions;
  readonly inputs: Inputs;
  readonly lineUp: LineUp;
  readonly rows: readonly CalibrationRow[];
  readonly samples: readonly Sample[];
};

const CLIFF_SPARSITIES = [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45] as const;
const LONG_TEXTS = 3;
const PROMPT_TOKENS_MAX = 96;

/** `notes` says which checks could not be made, and why. */
export async function runChecks(input: CheckInput): Promise<{ checks: Checks; notes: string[] }> {
  const facts = gatherFacts(input);
  const checks = {
    ...(facts.length === 0 ? {} : await recall(input, facts)),
    ...(await cliffAndNarrow(input)),
    ...(await longText(input)),
  };
  const missing = (check: keyof Checks, why: string) => (checks[check] === undefined ? [`No ${why}.`] : []);
  return {
    checks,
    notes: [
      ...missing('recall', 'recall check: neither --facts nor --tasks has an answer to score'),
      ...missing('cliff', 'cliff check: it uses FinerCut’s order, which --baselines leaves out'),
      ...missing(
        'narrow',
        'narrow calibration check: it needs FinerCut, and one kind with text to calibrate on',
      ),
      ...missing('longText', 'long text check: the model’s context is too short'),
    ],
  };
}

/** How likely right answers are under each method, and which clusters each kind of question went to. */
async function recall(
  { context, lineUp }: CheckInput,
  facts: readonly Fact[],
): Promise<Pick<Checks, 'recall' | 'clustersByTask'>> {
  const { sets, contestants } = await contestantsOn(context, lineUp, facts);
  const figures = await scored(
    context,
    facts.map(({ sample }) => sample),
    contestants.map(({ masks }) => masks),
  );
  return {
    recall: contestants.map(({ method, targetSparsity, surrogate }, i) => ({
      method,
      targetSparsity,
      surrogate,
      facts: facts.length,
      ...figures[i]!,
    })),
    clustersByTask: sets.map(({ set, clusters }) => ({
      name: set.name,
      kinds: kindTable(facts, clusters, set.clusters.length),
    })),
  };
}

/** Figures along FinerCut's order at every 5 % of sparsity, and of the order calibrated on one kind alone. */
async function cliffAndNarrow(input: CheckInput): Promise<Pick<Checks, 'cliff' | 'narrow'>> {
  const { context, lineUp, rows, samples } = input;
  const flavour = servedFlavour(lineUp);
  const general = lineUp.orders.get(flavour)?.get('finercut')?.[0]?.order;
  if (general === undefined) return {};
  const along = (order: typeof general, target: number): Mask =>
    withSurrogates(maskAlong(order, skipCountFor(lineUp.blockCount, target), lineUp.blockCount), flavour);
  const sparsities = CLIFF_SPARSITIES.filter(
    (target) => skipCountFor(lineUp.blockCount, target) <= general.length,
  );
  const steep = sparsities.map((target) => along(general, target));
  const everywhere = (mask: Mask) => rows.map(() => [mask]);
  const cliff = await scored(context, samples, steep.map(everywhere));
  const curve = { cliff: steep.map((mask, i) => ({ sparsity: sparsity(mask), ...cliff[i]! })) };
  const narrow = await narrowOrder(input, flavour);
  if (narrow === undefined) return curve;
  const target = lineUp.sparsities[0]!;
  const pair = [along(general, target), along(narrow.order, target)].map(everywhere);
  // One after the other: the scorer has one cache.
  const everybody = await scored(context, samples, pair);
  const own = await scored(context, samples, pair, (row) => rows[row]!.kind === narrow.kind);
  const named = ([broad, one]: Figures[]) => ({ calibratedOnAll: broad!, calibratedOnOne: one! });
  return {
    ...curve,
    narrow: {
      kind: narrow.kind,
      sparsity: target,
      general: named(everybody),
      own: rows.some(({ kind }) => kind === narrow.kind) ? named(own) : null,
    },
  };
}

/** The kind with most calibration rows, and FinerCut's order on it alone; undefined when it is too short for that. */
async function narrowOrder({ context, lineUp, inputs }: CheckInput, flavour: SurrogatesId | null) {
  const { options, scorer } = context;
  const { evaluated, search, signal } = options;
  const byKind = Map.groupBy(inputs.data.calibration, (row) => row.kind);
  const [kind, rows] = [...byKind].sort(([a, m], [b, n]) => n.length - m.length || (a < b ? -1 : 1))[0]!;
  const samples = drawCalibration(context, rows);
  if (samples.length === 0) return undefined;
  const orders = await searchOrders(
    { evaluated, scorer, samples },
    {
      methods: ['finercut'],
      flavours: [flavour],
      skipCountMax: skipCountFor(lineUp.blockCount, lineUp.sparsities[0]!),
      evaluationsMax: search.evaluationsMax,
    },
    { onEvaluation: () => options.onProgress('search one kind', 0, 0), signal },
  );
  return { kind, order: orders.get(flavour)!.get('finercut')![0]!.order };
}

/** The dense model, and each set with the mask that routing picks, on the prompts of a few scored rows. */
async function longText({ context, asked, lineUp, samples }: CheckInput): Promise<Pick<Checks, 'longText'>> {
  const { options, runner, session } = context;
  const { manifest } = options.evaluated.model;
  const prompts = samples.slice(0, LONG_TEXTS).map(({ tokenIds }) => tokenIds.subarray(0, PROMPT_TOKENS_MAX));
  const endIds = manifest.eosTokenIds;
  const tokens = Math.min(asked.longTokens, manifest.config.contextTokens - PROMPT_TOKENS_MAX - 1);
  if (tokens < 1) return {};
  const { contestants } = equalCountContestants(lineUp);
  const found: NonNullable<Checks['longText']> = [];
  const subjects = contestants.filter(({ method }) => method === 'dense' || method === 'learned');
  for (const { method, masks, targetSparsity, surrogate } of subjects) {
    options.onProgress('long text', found.length, subjects.length);
    const parts = { runner, session, signal: options.signal };
    const routed = prompts.map((tokenIds, row) => ({ tokenIds, mask: masks[row]![0]! }));
    const windows = await judgeLongText(parts, routed, endIds, tokens);
    found.push({ method, targetSparsity, surrogate, windows });
  }
  return { longText: found };
}

/** Pooled figures of each subject, over the rows that `counts` keeps. */
async function scored(
  context: Context,
  samples: readonly Sample[],
  subjects: readonly (readonly (readonly Mask[])[])[],
  counts: (row: number) => boolean = () => true,
): Promise<Figures[]> {
  const scoresOf = await scoreSamples(
    context,
    'checks',
    samples,
    samples.map((_, row) => subjects.flatMap((masks) => masks[row]!)),
  );
  return subjects.map((masks) => {
    const parts = masks.flatMap((some, row) => (counts(row) ? some.map((mask) => scoresOf(row, mask)) : []));
    return figuresOf(addScores(parts));
  });
}

/** The flavour that is served: with surrogates if they are among the compared flavours. */
const servedFlavour = ({ flavours }: LineUp): SurrogatesId | null => flavours.at(-1) ?? null;

/** An answer that is a fact, as a sample whose answer alone counts. */
type Fact = { readonly kind: string; readonly routeText: string; readonly sample: Sample };

/** From the rows of `--facts`; without them, the right answers of the tasks. */
function gatherFacts({ context, asked, inputs }: CheckInput): Fact[] {
  const { options, text } = context;
  const { manifest } = options.evaluated.model;
  const { contextTokens } = manifest.config;
  if (asked.facts.length > 0) {
    const rows = pickRows(inputs.data.facts, options.rows.limit, options.rows.seed);
    return factsOfRows(rows, text, manifest.eosTokenIds[0]!, contextTokens);
  }
  return inputs.tasks.flatMap(({ task, questions }) =>
    factsOfQuestions(task, questions, text, contextTokens),
  );
}

/** Rows without an answer are scored as a whole. Rows that are too long or too short to score are left out. */
function factsOfRows(
  rows: readonly CalibrationRow[],
  text: ModelText,
  eosTokenId: number,
  contextTokens: number,
): Fact[] {
  const sampling = { tokensMax: contextTokens, contextTokens, scored: 'answers' } as const;
  const sampleOf = createSampler(text, eosTokenId, sampling);
  return rows.flatMap((row) => {
    const sample = sampleOf(row);
    return sample === undefined ? [] : [{ kind: row.kind, routeText: row.routeText, sample }];
  });
}

/** The right choice of each question. */
function factsOfQuestions(
  kind: string,
  questions: readonly Question[],
  text: ModelText,
  contextMax: number,
): Fact[] {
  return questions.flatMap((question) => {
    const { tokenIds, contextTokens } = encodeChoices(question, text.tokenizer, contextMax)[question.gold]!;
    if (tokenIds.length <= contextTokens || contextTokens === 0) return [];
    return [{ kind, routeText: question.routeText, sample: { tokenIds, scoreFrom: contextTokens - 1 } }];
  });
}
