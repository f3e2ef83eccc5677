/** The model as a run needs it: serving engine, training step, loss alone, and teacher, over the same weights. */

import { join } from 'node:path';
import { denseMask, type Mask, type SurrogatesId, withSurrogates } from '../../../shared/mask/mask.ts';
import { openRunner, type Runner } from '../../engine/runner.ts';
import { interleaved, median } from '../../measure.ts';
import type { InstalledModel } from '../../model/store.ts';
import { readSurrogates, type Surrogates, toInstalledBasis } from '../../model/surrogates.ts';
import { type ModelText, openModelText } from '../../model/tokenizer/model-text.ts';
import type { Sample } from '../data/samples.ts';
import {
  type GateSession,
  type LossSession,
  openGateSession,
  openLossSession,
} from '../gates/gate-session.ts';
import { openTeacher, type Teacher } from '../gates/teacher.ts';
import type { RunJournal } from '../journal.ts';
import { type BlockCounts, type Budget, type BudgetOptions, createBudget, maskWithout } from './budget.ts';
import type { BlockCost, TargetKind } from './effort.ts';
import { createScorer, type HeldOutScores, openScoreSession, scoreHeldOut } from './score-masks.ts';

type ModelParts = AsyncDisposable & {
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
  journal: RunJournal,
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
  const scorer = createScorer(runner, opened(await openScoreSession(threads)));
  const stack = opening.move();
  return {
    ...{ text, teacher, loss: losses.loss, step: gates.step },
    [Symbol.asyncDispose]: () => stack.disposeAsync(),
    async budget({ sparsity, cost = 'blocks', attention, ffn }) {
      const all = { min: 0, max: config.layerCount };
      const measured = async () => Object.values(await measureBlockTimes(runner, surrogates?.id));
      const [a, f] = cost === 'time' ? await journal.result('block times', measured) : [1, 1];
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
      const numbers = await journal.result(name, async () => {
        const scores = await scoreHeldOut(scorer, samples, served);
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

/** Tokens before those that are timed. */
const POSITION = 64;
const STEPS = 16;
const ROUNDS = 9;
/** A kind that costs next to nothing still has to weigh something. */
const BLOCK_MIN_ms = 1e-4;

/**
 * By how much a decoded token takes less for each attention and each FFN block that is left out, in ms: half of a kind
 * out against none, in interleaved rounds.
 */
async function measureBlockTimes(runner: Runner, surrogates: SurrogatesId | undefined): Promise<BlockCounts> {
  const { layerCount } = runner.config;
  const half = Array.from({ length: Math.ceil(layerCount / 2) }, (_, i) => 2 * i);
  const without = (kind: 0 | 1): Mask =>
    withSurrogates(
      maskWithout(
        2 * layerCount,
        half.map((layer) => 2 * layer + kind),
      ),
      surrogates,
    );
  const masks = { dense: denseMask(2 * layerCount), attention: without(0), ffn: without(1) };
  const subjects = Object.entries(masks).map(([name, mask]) => ({
    name,
    measure: () => decode_ms(runner, mask),
  }));
  const found = await interleaved(subjects, ROUNDS);
  const perBlock = (name: 'attention' | 'ffn') =>
    Math.max(BLOCK_MIN_ms, (found.get('dense')! - found.get(name)!) / half.length);
  return { attention: perBlock('attention'), ffn: perBlock('ffn') };
}

/** The median step of decoding on the engine that serves. Which tokens come makes no difference to it. */
export async function decode_ms(runner: Runner, mask: Mask): Promise<number> {
  const plan = { mask, kv: 'preserve' } as const;
  const cache = runner.newCache();
  const token = (i: number) => (7919 * i) % runner.config.vocabularySize;
  const tokenIds = Array.from({ length: POSITION }, (_, i) => token(i));
  await runner.run({ cache, tokenIds, plan, logitRows: [] });
  const times: number[] = [];
  for (let step = 0; step < STEPS; step++) {
    const start = performance.now();
    await runner.run({ cache, tokenIds: [token(step)], plan, logitRows: [0] });
    times.push(performance.now() - start);
  }
  return median(times);
}

const SURROGATES_FILE = 'surrogates.safetensors';

/** The table that an installed model serves with, if any. @throws MaskrouteError `corrupt_model`. */
export async function installedSurrogates({
  folder,
  manifest,
}: InstalledModel): Promise<Surrogates | undefined> {
  if (manifest.surrogates === undefined) return undefined;
  return readSurrogates(join(folder, SURROGATES_FILE));
}
