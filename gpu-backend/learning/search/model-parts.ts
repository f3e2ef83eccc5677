/** The model as a run needs it: serving engine, training step, loss alone, and teacher, over the same weights. */

import { join } from 'node:path';
import {
  denseMask,
  isDense,
  type Mask,
  maskBits,
  type SurrogatesId,
  withSurrogates,
} from '../../../shared/mask/mask.ts';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { openRunner, type Runner } from '../../engine/runner.ts';
import { interleaved, median } from '../../measure.ts';
import type { InstalledModel } from '../../model/store.ts';
import { readSurrogates, type Surrogates, toInstalledBasis } from '../../model/surrogates.ts';
import { type ModelText, openModelText } from '../../model/tokenizer/model-text.ts';
import type { Device } from '../../onnx/device.ts';
import type { Sample } from '../data/samples.ts';
import {
  type GateSession,
  type LossSession,
  openGateSession,
  openLossSession,
} from '../gates/gate-session.ts';
import { openTeacher, type Teacher } from '../gates/teacher.ts';
import { contentKey, type RunJournal, sampleKey } from '../journal.ts';
import { type BlockCounts, type Budget, type BudgetOptions, createBudget, maskWithout } from './budget.ts';
import { type BlockCost, CONTEXT_TOKENS, type TargetKind } from './effort.ts';
import {
  createScorer,
  openScoreSession,
  type Reference,
  type SampleScores,
  type Scorer,
} from './score-masks.ts';

type ModelParts = AsyncDisposable & {
  readonly text: ModelText;
  readonly teacher: Pick<Teacher, 'teach'>;
  readonly loss: LossSession['loss'];
  readonly step: GateSession['step'];
  /** @throws MaskrouteError `invalid_request` when no mask can meet it. */
  budget(
    options: {
      readonly sparsity: number;
      readonly cost?: BlockCost | undefined;
      /** Tokens before those that blocks are timed with. */
      readonly context?: number | undefined;
    } & {
      readonly [kind in 'attention' | 'ffn']?: BudgetOptions[kind] | undefined;
    },
  ): Promise<Budget>;
  /** Exact scores by the serving engine of several masks on one sample; each is kept by the content of both. */
  score(sample: Sample, masks: readonly Mask[]): Promise<SampleScores[]>;
};

export async function openModelParts(
  { folder, manifest }: InstalledModel,
  surrogates: Surrogates | undefined,
  {
    threads,
    device,
    targets,
  }: { readonly threads: number; readonly device?: Device | undefined; readonly targets: TargetKind },
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
  const runner = opened(await openRunner(folder, config, { threads, device, surrogates: surrogates?.id }));
  // The dense model's likeliest tokens alone would have every mask that presses all others towards 0 look good.
  const lossOptions = { threads, surrogates: table, tail: targets === 'dense' };
  const gates = opened(await openGateSession(folder, config, lossOptions));
  const losses = opened(await openLossSession(folder, config, lossOptions));
  const teacher = opened(await openTeacher(folder, config, { threads }));
  const scorer = createScorer(runner, opened(await openScoreSession(threads)));
  const stack = opening.move();
  return {
    ...{ text, teacher, loss: losses.loss, step: gates.step },
    [Symbol.asyncDispose]: () => stack.disposeAsync(),
    async budget({ sparsity, cost = 'blocks', context, attention, ffn }) {
      const all = { min: 0, max: config.layerCount };
      const measured = async () => Object.values(await measureBlockTimes(runner, surrogates?.id, context));
      const [a, f] = cost === 'time' ? await journal.result('block times', measured) : [1, 1];
      return createBudget({
        layerCount: config.layerCount,
        targetSparsity: sparsity,
        weights: { attention: a!, ffn: f! },
        attention: attention ?? all,
        ffn: ffn ?? all,
      });
    },
    score: (sample, masks) => scoreKept(sample, masks, scorer, journal, surrogates?.id),
  };
}

const FIGURES = ['positions', 'kl', 'equalTops', 'loss'] as const;

/** The dense model runs once for all masks that are not known yet. */
async function scoreKept(
  sample: Sample,
  masks: readonly Mask[],
  scorer: Scorer,
  journal: RunJournal,
  surrogates: SurrogatesId | undefined,
): Promise<SampleScores[]> {
  const name = contentKey(sampleKey([sample])).slice(0, 24);
  let reference: Reference | undefined;
  const found: SampleScores[] = [];
  for (const mask of masks) {
    const numbers = await journal.result(`${name} | ${maskBits(mask)}`, async () => {
      reference ??= await scorer.reference(sample);
      const scores = isDense(mask)
        ? reference.scores
        : await scorer.score(reference, withSurrogates(mask, surrogates));
      return FIGURES.map((figure) => scores[figure]);
    });
    found.push(Object.fromEntries(FIGURES.map((figure, i) => [figure, numbers[i]!])) as SampleScores);
  }
  return found;
}

/** Tokens that the cache is filled with at a time: attention over all of a long text at once takes a lot of memory. */
const FILL_TOKENS = 256;
const STEPS = 16;
const ROUNDS = 9;
/** A kind that costs next to nothing still has to weigh something. */
const BLOCK_MIN_ms = 1e-4;

/**
 * By how much a decoded token takes less for each attention and each FFN block that is left out, in ms: half of a kind
 * out against none, in interleaved rounds. An FFN block takes the same at any length, attention longer after more tokens.
 */
async function measureBlockTimes(
  runner: Runner,
  surrogates: SurrogatesId | undefined,
  context?: number,
): Promise<BlockCounts> {
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
  const decoder = await openDecoder(runner, context);
  const subjects = Object.entries(masks).map(([name, mask]) => ({
    name,
    measure: () => decoder.step_ms(mask),
  }));
  const found = await interleaved(subjects, ROUNDS);
  const perBlock = (name: 'attention' | 'ffn') =>
    Math.max(BLOCK_MIN_ms, (found.get('dense')! - found.get(name)!) / half.length);
  return { attention: perBlock('attention'), ffn: perBlock('ffn') };
}

/** Times decoding after `context` tokens on the engine that serves. Which tokens come makes no difference to it. */
export type Decoder = {
  /** The median step under a mask. */
  step_ms(mask: Mask): Promise<number>;
};

/** @throws MaskrouteError `invalid_argument` when the model has no room for so many tokens. */
export async function openDecoder(runner: Runner, context = CONTEXT_TOKENS): Promise<Decoder> {
  const { vocabularySize, contextTokens } = runner.config;
  if (context + STEPS > contextTokens) {
    throw new MaskrouteError(
      'invalid_argument',
      `The model has room for ${contextTokens} tokens: ${context} leave none to time ${STEPS} steps with.`,
    );
  }
  const cache = runner.newCache();
  const token = (i: number) => (7919 * i) % vocabularySize;
  const dense = { mask: denseMask(2 * runner.config.layerCount), kv: 'preserve' } as const;
  // Every mask leaves keys and values of the same shape, so all are timed after the same ones.
  for (let from = 0; from < context; from += FILL_TOKENS) {
    const tokenIds = Array.from({ length: Math.min(FILL_TOKENS, context - from) }, (_, i) => token(from + i));
    await runner.run({ cache, tokenIds, plan: dense, logitRows: [] });
  }
  return {
    async step_ms(mask) {
      const plan = { mask, kv: 'preserve' } as const;
      cache.length = context;
      const times: number[] = [];
      for (let step = 0; step < STEPS; step++) {
        const start = performance.now();
        await runner.run({ cache, tokenIds: [token(step)], plan, logitRows: [0] });
        times.push(performance.now() - start);
      }
      return median(times);
    },
  };
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
