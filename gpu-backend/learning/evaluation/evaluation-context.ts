/** The options of an evaluation, and what all its stages share: the model, opened once. */
import type { Mask, SurrogatesId } from '../../../shared/mask/mask.ts';
import type { MaskSet } from '../../../shared/mask/mask-set.ts';
import type { Runner } from '../../engine/runner-interface.ts';
import type { InstalledModel } from '../../model/store.ts';
import { type ModelText, openModelText } from '../../model/tokenizer/model-text.ts';
import { createRandom } from '../../random.ts';
import type { OpenEncoder } from '../data/encoders.ts';
import type { CalibrationRow } from '../data/read-data.ts';
import { drawSamples, type Sample } from '../data/samples.ts';
import { openScoring, type Scorer, type ScoreSession } from '../search/score-masks.ts';
import { equalCountContestants, type LineUp, type RoutedSet } from './line-up.ts';
import type { Baseline, RowCounts } from './result.ts';
import { type Evaluated, scoreRows } from './score-rows.ts';
import { pickRows, routeTexts } from './scored-rows.ts';
import type { TaskFile } from './tasks/read-task.ts';

export type EvaluateOptions = {
  readonly evaluated: Evaluated;
  readonly compared: Compared;
  readonly rows: RowOptions;
  readonly search: SearchEffort;
  readonly timing: TimingOptions;
  /** Multiple-choice sets that all methods answer. */
  readonly tasks?: TaskOptions | undefined;
  /** The paper's own checks (`checks/run-checks.ts`). */
  readonly checks?: CheckOptions | undefined;
  /** Called before scoring, with how many rows of the data are used and left out. */
  readonly onRows: (counts: RowCounts) => void;
  readonly onProgress: (stage: string, done: number, total: number) => void;
  readonly signal?: AbortSignal | undefined;
};

/** The methods, each at its sparsities and in each flavour. */
type Compared = {
  readonly maskSets: readonly MaskSet[];
  readonly openEncoder: (set: MaskSet) => Promise<OpenEncoder>;
  readonly baselines: readonly Baseline[];
  /** Sparsities of the static methods, in addition to those of the mask sets. */
  readonly sparsities: readonly number[];
  /** `null`: holes. A table: the model's surrogates stand in for skipped blocks. */
  readonly flavours: readonly (SurrogatesId | null)[];
};

/** The text, and how much of it is used. */
type RowOptions = {
  /** Files whose rows are scored. */
  readonly data: readonly string[];
  /** Files to calibrate on; without any, a share of `data` calibrates. */
  readonly calibration: readonly string[];
  /** Rows read from each file. */
  readonly rowsMax?: number | undefined;
  /** Rows that are scored. */
  readonly limit: number;
  /** Tokens of a row; no more than the model has room for. */
  readonly tokensMax: number;
  /** The same seed picks the same rows. */
  readonly seed: number;
};

/** What each search of a static method may use. */
type SearchEffort = {
  /** Model evaluations. */
  readonly evaluationsMax: number;
  /** Scored positions of one of them. */
  readonly positions: number;
};

type TimingOptions = {
  /** Interleaved rounds; their median is the time. */
  readonly rounds: number;
  /** Whether static methods are also compared at the times of the learned sets. */
  readonly equalTime: boolean;
};

type TaskOptions = {
  readonly files: readonly TaskFile[];
  /** Questions of each file. */
  readonly limit: number;
};

export type CheckOptions = {
  /** Files whose answers are facts, for the check of recall; without any, the right answers of the tasks. */
  readonly facts: readonly string[];
  /** Tokens that the check of long text generates. */
  readonly longTokens: number;
};

/** What every stage needs. */
export type Context = {
  readonly options: EvaluateOptions;
  readonly runner: Runner;
  readonly scorer: Scorer;
  readonly session: ScoreSession;
  readonly text: ModelText;
};

/** Opens the model once for all stages. */
export async function openContext(options: EvaluateOptions): Promise<Context & AsyncDisposable> {
  const { model, threads, device } = options.evaluated;
  const { folder, manifest } = model;
  const text = await openModelText(folder, manifest);
  const { runner, session, scorer, close } = await openScoring(model, {
    threads,
    device,
    surrogates: surrogatesOf(model),
  });
  const tokensMax = Math.min(options.rows.tokensMax, manifest.config.contextTokens);
  return {
    options: { ...options, rows: { ...options.rows, tokensMax } },
    runner,
    session,
    text,
    scorer,
    [Symbol.asyncDispose]: close,
  };
}

type Routable = Pick<CalibrationRow, 'routeText'>;

/** The cluster of each row under each mask set. */
export async function routeSets(
  { compared, signal }: EvaluateOptions,
  rows: readonly Routable[],
): Promise<RoutedSet[]> {
  const texts = rows.map(({ routeText }) => routeText);
  const sets: RoutedSet[] = [];
  for (const set of compared.maskSets) {
    const open = await compared.openEncoder(set);
    try {
      sets.push({ set, clusters: await routeTexts(set, open, texts, signal) });
    } finally {
      await open.close();
    }
  }
  return sets;
}

/** The contestants of the line-up on other rows, and where these are routed. */
export async function contestantsOn({ options }: Context, lineUp: LineUp, rows: readonly Routable[]) {
  const sets = await routeSets(options, rows);
  const { contestants } = equalCountContestants({ ...lineUp, rowCount: rows.length, sets });
  return { sets, contestants };
}

/** {@link scoreRows}, with its progress shown as the progress of `stage`. */
export const scoreSamples = (
  { options, scorer }: Context,
  stage: string,
  samples: readonly Sample[],
  masks: readonly (readonly Mask[])[],
) =>
  scoreRows(
    {
      evaluated: options.evaluated,
      scorer,
      samples,
      onProgress: (done, total) => options.onProgress(stage, done, total),
      signal: options.signal,
    },
    masks,
  );

/** Samples for one search, of rows in a random order, equally many of each kind. Empty where no row has a token to score. */
export function drawCalibration({ options, text }: Context, rows: readonly CalibrationRow[]): Sample[] {
  const { positions } = options.search;
  const { seed, tokensMax } = options.rows;
  const { eosTokenIds, config } = options.evaluated.model.manifest;
  const picked = pickRows(rows, positions, seed);
  const sampling = { positions, tokensMax, contextTokens: config.contextTokens };
  return drawSamples(picked, text, eosTokenIds[0]!, createRandom(seed), sampling);
}

/** The table that the model's graph holds, if any. */
export const surrogatesOf = ({ manifest }: InstalledModel): SurrogatesId | undefined =>
  manifest.surrogates?.id;
