/**
 * How far a mask moves the serving engine's model on one sample: KL(dense ‖ masked), equal top tokens, and the
 * cost of the text itself, as sums, so that any set of samples can be pooled and resampled.
 */
import { denseMask, type Mask } from '../../shared/mask.ts';
import type { Sample } from '../calibration/samples.ts';
import { scoredPositions } from '../calibration/samples.ts';
import type { KvCache } from '../engine/kv-cache.ts';
import type { Runner } from '../engine/runner.ts';
import type { ScoreSession } from './score-graph.ts';

/** Sums over the scored positions of a sample. */
export type SampleScores = {
  readonly positions: number;
  /** Nats. */
  readonly kl: number;
  readonly equalTops: number;
  /** −log-likelihood of the text, nats. */
  readonly loss: number;
};

/** A sample under the dense model. */
export type Reference = {
  readonly sample: Sample;
  /** `[P, V]`. */
  readonly probabilities: Float32Array;
  /** Σ p log p, `[P]`. */
  readonly negentropies: Float32Array;
  readonly tops: Int32Array;
  readonly scores: SampleScores;
};

export type Scorer = {
  reference(sample: Sample): Promise<Reference>;
  score(reference: Reference, mask: Mask): Promise<SampleScores>;
};

/** One sequence at a time, in one cache. */
export function createScorer(runner: Runner, session: ScoreSession): Scorer {
  const cache = runner.newCache();
  const dense = denseMask(2 * runner.config.layerCount);
  return {
    async reference(sample) {
      const logits = await logitsOf(runner, cache, sample, dense);
      const positions = scoredPositions(sample);
      const { losses, tops } = await session.losses(logits, nextIds(sample));
      const distribution = await session.distribution(logits, positions);
      return {
        sample,
        ...distribution,
        tops,
        scores: { positions, kl: 0, equalTops: positions, loss: sum(losses) },
      };
    },
    async score({ sample, probabilities, negentropies, tops }, mask) {
      const logits = await logitsOf(runner, cache, sample, mask);
      const found = await session.against(logits, nextIds(sample), probabilities);
      let kl = 0;
      let equalTops = 0;
      negentropies.forEach((negentropy, row) => {
        // Rounding can put an equal distribution a hair below 0.
        kl += Math.max(0, negentropy - found.expectedLogits[row]! + found.logSums[row]!);
        if (found.tops[row] === tops[row]) equalTops++;
      });
      return { positions: tops.length, kl, equalTops, loss: sum(found.losses) };
    },
  };
}

/** `[P, V]`. */
function logitsOf(runner: Runner, cache: KvCache, sample: Sample, mask: Mask): Promise<Float32Array> {
  cache.length = 0;
  const logitRows = Array.from({ length: scoredPositions(sample) }, (_, i) => sample.scoreFrom + i);
  const tokenIds = sample.tokenIds.subarray(0, -1);
  return runner.run({ cache, tokenIds, logitRows, plan: { mask, kv: 'preserve' } });
}

const nextIds = ({ tokenIds, scoreFrom }: Sample): Int32Array => tokenIds.subarray(scoreFrom + 1);

const sum = (values: Float32Array): number => values.reduce((total, value) => total + value, 0);

export function addScores(parts: readonly SampleScores[]): SampleScores {
  const total = { positions: 0, kl: 0, equalTops: 0, loss: 0 };
  for (const part of parts) {
    total.positions += part.positions;
    total.kl += part.kl;
    total.equalTops += part.equalTops;
    total.loss += part.loss;
  }
  return total;
}

/** Means a position; perplexity is exp of the mean loss. */
export const figuresOf = ({ positions, kl, equalTops, loss }: SampleScores) => ({
  kl: kl / positions,
  agreement: equalTops / positions,
  perplexity: Math.exp(loss / positions),
});
