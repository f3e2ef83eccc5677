/** The model as a run needs it: serving engine, training step, loss alone, and teacher, over the same weights. */
import type { Mask } from '../../shared/mask.ts';
import { withSurrogates } from '../../shared/mask.ts';
import type { HeldOutScores } from '../calibration/held-out.ts';
import { scoreMasks } from '../calibration/held-out.ts';
import type { Sample } from '../calibration/samples.ts';
import { createMaskScorer } from '../calibration/score-mask.ts';
import { openRunner } from '../engine/runner.ts';
import type { ModelText } from '../model/model-text.ts';
import { openModelText } from '../model/model-text.ts';
import type { InstalledModel } from '../model/store.ts';
import type { Surrogates } from '../model/surrogates.ts';
import { toInstalledBasis } from '../model/surrogates.ts';
import type { Budget, BudgetOptions } from '../training/budget.ts';
import { createBudget } from '../training/budget.ts';
import type { GateSession, LossSession } from '../training/gate-session.ts';
import { openGateSession, openLossSession } from '../training/gate-session.ts';
import type { Teacher } from '../training/teacher.ts';
import { openTeacher } from '../training/teacher.ts';
import { measureBlockTimes } from './block-times.ts';
import type { Journal } from './journal.ts';
import type { BlockCost, TargetKind } from './settings.ts';

export type ModelParts = AsyncDisposable & {
  readonly text: ModelText;
  readonly teacher: Pick<Teacher, 'teach'>;
  readonly loss: LossSession['loss'];
  readonly step: GateSession['step'];
  /** @throws MaskrouteError `invalid_request` when no mask can meet it. */
  budget(
    options: { readonly sparsity: number; readonly cost?: BlockCost | undefined } & {
      readonly [kind in 'attention' | 'ffn']?: BudgetOptions[kind] | undefined;
    },
  ): Promise<Budget>;
  measure(name: string, samples: readonly Sample[], masks: readonly Mask[]): Promise<HeldOutScores[]>;
};

export async function openModelParts(
  { folder, manifest }: InstalledModel,
  surrogates: Surrogates | undefined,
  { threads, targets }: { readonly threads: number; readonly targets: TargetKind },
  journal: Journal,
): Promise<ModelParts> {
  const { config, weights } = manifest;
  const table = surrogates && toInstalledBasis(surrogates.table, weights);
  const text = await openModelText(folder, manifest);
  await using opening = new AsyncDisposableStack();
  const opened = <T extends { close(): Promise<void> }>(part: T): T => {
    opening.defer(() => part.close());
    return part;
  };
  const runner = opened(await openRunner(folder, config, { threads, surrogates: surrogates?.id }));
  // The dense model's likeliest tokens alone would have every mask that presses all others towards 0 look good.
  const lossOptions = { threads, surrogates: table, tail: targets === 'dense' };
  const gates = opened(await openGateSession(folder, config, weights, lossOptions));
  const losses = opened(await openLossSession(folder, config, weights, lossOptions));
  const teacher = opened(await openTeacher(folder, config, weights, { threads }));
  const scorer = createMaskScorer(runner);
  const stack = opening.move();
  return {
    ...{ text, teacher, loss: losses.loss, step: gates.step },
    [Symbol.asyncDispose]: () => stack.disposeAsync(),
    async budget({ sparsity, cost = 'blocks', attention, ffn }) {
      const all = { min: 0, max: config.layerCount };
      const measured = async () => Object.values(await measureBlockTimes(runner, surrogates?.id));
      const [a, f] = cost === 'time' ? await journal.numbers('block times', measured) : [1, 1];
      return createBudget({
        layerCount: config.layerCount,
        targetSparsity: sparsity,
        weights: { attention: a!, ffn: f! },
        attention: attention ?? all,
        ffn: ffn ?? all,
      });
    },
    async measure(name, samples, masks) {
      const served = masks.map((mask) => withSurrogates(mask, surrogates?.id));
      const numbers = await journal.numbers(name, async () => {
        const scores = (await scoreMasks(scorer, samples, served)) ?? [];
        return scores.flatMap((one) => FIGURES.map((figure) => one[figure]));
      });
      return masks.map((_, mask) => {
        const figures = FIGURES.map((figure, i) => [figure, numbers[mask * FIGURES.length + i]!]);
        return Object.fromEntries(figures) as HeldOutScores;
      });
    },
  };
}

const FIGURES = ['positions', 'kl', 'agreement', 'perplexity', 'densePerplexity'] as const;
