/** The model's functions for a run: losses, gradients and scores, computed as units, and the cost of blocks. */
import {
  denseMask,
  type Mask,
  maskBits,
  type SurrogatesId,
  withSurrogates,
} from '../../../shared/mask/mask.ts';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { openRunner } from '../../engine/runner.ts';
import type { Runner } from '../../engine/runner-interface.ts';
import { interleaved, median, times_ms } from '../../measure.ts';
import type { InstalledModel } from '../../model/store.ts';
import type { Surrogates } from '../../model/surrogates.ts';
import { type ModelText, openModelText } from '../../model/tokenizer/model-text.ts';
import type { Device } from '../../onnx/device.ts';
import type { Sample } from '../data/samples.ts';
import type { SampleBatch } from '../gates/batches.ts';
import type { LossAndGradients } from '../gates/train-mask.ts';
import { contentKey, type RunJournal, sampleKey } from '../journal.ts';
import { batchUnit, scoreUnit } from '../units/unit.ts';
import type { Units } from '../units/units.ts';
import { type BlockCounts, type Budget, type BudgetRequest, createBudget, maskWithout } from './budget.ts';
import { CONTEXT_TOKENS, type TargetKind } from './effort.ts';
import { type SampleScores, SCORE_FIGURES, scoresBy } from './score-masks.ts';

type ModelParts = {
  readonly text: ModelText;
  /** Mean loss of a batch under gates, for the run's targets, nats. */
  loss(batch: SampleBatch, gates: ArrayLike<number>): Promise<number>;
  /** The same with its gradient by each gate. */
  step(batch: SampleBatch, gates: ArrayLike<number>): Promise<LossAndGradients>;
  /**
   * @param weights known weights of the blocks; without, each weighs 1, or its measured milliseconds.
   * @throws MaskrouteError `invalid_request` when no mask can meet it.
   */
  budget(request: BudgetRequest, weights?: BlockCounts): Promise<Budget>;
  /**
   * Exact scores of several masks on one sample, by the serving engine; each is journalled by the content of mask and
   * sample.
   */
  score(sample: Sample, masks: readonly Mask[]): Promise<SampleScores[]>;
};

type PartsOptions = {
  readonly model: InstalledModel;
  readonly surrogates: Surrogates | undefined;
  readonly targets: TargetKind;
  /** For the timing of blocks. */
  readonly threads: number;
  readonly device?: Device | undefined;
};

export async function openModelParts(
  { model: { folder, manifest }, surrogates, targets, threads, device }: PartsOptions,
  units: Pick<Units, 'run'>,
  journal: RunJournal,
): Promise<ModelParts> {
  const { config } = manifest;
  const measured = async (context: number) => {
    const runner = await openRunner(folder, config, { threads, device, surrogates: surrogates?.id });
    try {
      return Object.values(await measureBlockTimes(runner, surrogates?.id, context));
    } finally {
      await runner.close();
    }
  };
  return {
    text: await openModelText(folder, manifest),
    async loss(batch, gates) {
      const [loss] = await units.run(batchUnit('loss', targets, batch, gates));
      return loss!;
    },
    async step(batch, gates) {
      const [loss, ...gradients] = await units.run(batchUnit('step', targets, batch, gates));
      return { loss: loss!, gradients };
    },
    async budget({ sparsity, cost, context = CONTEXT_TOKENS, attention, ffn }, weights) {
      const all = { min: 0, max: config.layerCount };
      const weighed = async (): Promise<BlockCounts> => {
        if (cost === 'blocks') return { attention: 1, ffn: 1 };
        const [a, f] = await journal.result('block times', () => measured(context));
        return { attention: a!, ffn: f! };
      };
      return createBudget({
        layerCount: config.layerCount,
        targetSparsity: sparsity,
        weights: weights ?? (await weighed()),
        attention: attention ?? all,
        ffn: ffn ?? all,
      });
    },
    score: (sample, masks) => scoreKept(sample, masks, units, journal),
  };
}

/**
 * Most masks of one unit: the dense model runs once for each unit, and other units can be computed elsewhere meanwhile.
 */
const UNIT_MASKS_MAX = 8;

/** Scores masks, reading known scores from the journal. */
async function scoreKept(
  sample: Sample,
  masks: readonly Mask[],
  units: Pick<Units, 'run'>,
  journal: RunJournal,
): Promise<SampleScores[]> {
  const content = contentKey(sampleKey([sample])).slice(0, 24);
  const nameOf = (mask: Mask) => `${content} | ${maskBits(mask)}`;
  const fresh = masks.filter((mask) => journal.get(nameOf(mask)) === undefined);
  for (let from = 0; from < fresh.length; from += UNIT_MASKS_MAX) {
    const asked = fresh.slice(from, from + UNIT_MASKS_MAX);
    const numbers = await units.run(scoreUnit(sample, asked));
    for (const [index, mask] of asked.entries()) {
      const own = numbers.slice(index * SCORE_FIGURES.length, (index + 1) * SCORE_FIGURES.length);
      await journal.set(nameOf(mask), own);
    }
  }
  return masks.map((mask) => {
    const numbers = journal.get(nameOf(mask))!;
    return scoresBy((_, index) => numbers[index]!);
  });
}

/** Tokens of one step of filling the cache: attention over a long text in one step takes a lot of memory. */
const FILL_TOKENS = 256;
const STEPS = 16;
const ROUNDS = 9;
/** Lower bound of a block's time: every kind must have some weight. */
const BLOCK_MIN_ms = 1e-4;

/**
 * Milliseconds of a decoded token that each skipped attention and FFN block saves: half of a kind skipped against none,
 * in interleaved rounds. An FFN block takes equally long at any length; attention takes longer after more tokens.
 */
async function measureBlockTimes(
  runner: Runner,
  surrogates: SurrogatesId | undefined,
  context: number,
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
  const decode_ms = await openDecodeTimer(runner, context);
  const subjects = Object.entries(masks).map(([name, mask]) => ({ name, measure: () => decode_ms(mask) }));
  const found = await interleaved(subjects, ROUNDS);
  const perBlock = (name: 'attention' | 'ffn') =>
    Math.max(BLOCK_MIN_ms, (found.get('dense')! - found.get(name)!) / half.length);
  return { attention: perBlock('attention'), ffn: perBlock('ffn') };
}

/** Milliseconds of a decoding step under a mask, the median of several. */
export type DecodeTimer = (mask: Mask) => Promise<number>;

/**
 * Times decoding after `context` tokens on the serving engine. The tokens themselves do not matter.
 * @throws MaskrouteError `invalid_argument` when the model has no room for so many tokens.
 */
export async function openDecodeTimer(runner: Runner, context: number): Promise<DecodeTimer> {
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
  // Keys and values have the same shape under every mask, so all masks are timed after the same cache.
  for (let from = 0; from < context; from += FILL_TOKENS) {
    const tokenIds = Array.from({ length: Math.min(FILL_TOKENS, context - from) }, (_, i) => token(from + i));
    await runner.run({ cache, tokenIds, plan: dense, logitRows: [] });
  }
  return async (mask) => {
    const plan = { mask, kv: 'preserve' } as const;
    cache.length = context;
    const times = await times_ms(STEPS, (step) =>
      runner.run({ cache, tokenIds: [token(step)], plan, logitRows: [0] }),
    );
    return median(times);
  };
}
