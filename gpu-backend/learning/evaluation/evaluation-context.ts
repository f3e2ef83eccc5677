/** The options of an evaluation, and what all its stages share: the model, opened once. */
import type { SurrogatesId } from '../../../shared/mask/mask.ts';
import type { MaskSet } from '../../../shared/mask/mask-set.ts';
import { openRunner } from '../../engine/runner.ts';
import type { Runner } from '../../engine/runner-interface.ts';
import type { InstalledModel } from '../../model/store.ts';
import { type ModelText, openModelText } from '../../model/tokenizer/model-text.ts';
import type { Device } from '../../onnx/device.ts';
import type { OpenEncoder } from '../data/encoders.ts';
import type { ScoreSession } from '../search/score-masks.ts';
import { createScorer, openScoreSession, type Scorer } from '../search/score-masks.ts';
import type { RoutedSet } from './line-up.ts';
import type { Baseline, RowCounts } from './result.ts';
import { routeTexts } from './scored-rows.ts';
import type { TaskFile } from './tasks/read-task.ts';

export type EvaluateOptions = {
  readonly home: string;
  readonly model: InstalledModel;
  readonly maskSets: readonly MaskSet[];
  readonly data: readonly string[];
  readonly calibration: readonly string[];
  readonly baselines: readonly Baseline[];
  /** Sparsities of the static methods, in addition to those of the mask sets. */
  readonly sparsities: readonly number[];
  /** `null`: holes. A table: the model's surrogates stand in for skipped blocks. */
  readonly flavours: readonly (SurrogatesId | null)[];
  readonly openEncoder: (set: MaskSet) => Promise<OpenEncoder>;
  readonly equalTime: boolean;
  /** Multiple-choice sets that all methods answer, and how many questions of each. */
  readonly tasks: readonly TaskFile[];
  readonly taskLimit: number;
  /** Whether to run the paper's own checks (`checks/run-checks.ts`). */
  readonly checks: boolean;
  /** Files whose answers are facts, for the check of recall; without them, the right answers of `tasks`. */
  readonly facts: readonly string[];
  /** Tokens that the check of long text generates. */
  readonly longTokens: number;
  /** Rows that are scored. */
  readonly limit: number;
  /** Rows read from each file. */
  readonly rowsMax?: number | undefined;
  /** Tokens of a row; no more than the model has room for. */
  readonly tokensMax: number;
  /** Model evaluations of each search. */
  readonly evaluationsMax: number;
  /** Scored positions of one such evaluation. */
  readonly searchPositions: number;
  readonly rounds: number;
  readonly threads: number;
  /** What runs and times the model; the CPU unless given. */
  readonly device?: Device | undefined;
  readonly seed: number;
  /** Called before scoring, with how many rows of `data` are used and left out. */
  readonly onRows: (counts: RowCounts) => void;
  readonly onProgress: (stage: string, done: number, total: number) => void;
  readonly signal?: AbortSignal | undefined;
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
  const { model, threads, device } = options;
  const { folder, manifest } = model;
  await using opening = new AsyncDisposableStack();
  const text = await openModelText(folder, manifest);
  const surrogates = surrogatesOf(model);
  const runner = await openRunner(folder, manifest.config, { threads, surrogates, device });
  opening.defer(() => runner.close());
  const session = await openScoreSession(threads);
  opening.defer(() => session.close());
  const stack = opening.move();
  const tokensMax = Math.min(options.tokensMax, manifest.config.contextTokens);
  return {
    options: { ...options, tokensMax },
    runner,
    session,
    text,
    scorer: createScorer(runner, session),
    [Symbol.asyncDispose]: () => stack.disposeAsync(),
  };
}

/** The cluster of each text under each mask set. */
export async function routeSets(options: EvaluateOptions, texts: readonly string[]): Promise<RoutedSet[]> {
  const sets: RoutedSet[] = [];
  for (const set of options.maskSets) {
    const open = await options.openEncoder(set);
    try {
      sets.push({ set, clusters: await routeTexts(set, open, texts, options.signal) });
    } finally {
      await open.close();
    }
  }
  return sets;
}

/** The table that the model's graph holds, if any. */
export const surrogatesOf = ({ manifest }: InstalledModel): SurrogatesId | undefined =>
  manifest.surrogates?.id as SurrogatesId | undefined;
