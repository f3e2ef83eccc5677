/**
 * Milliseconds a decoded token on the serving engine. Masks with equal counts of attention and FFN blocks read equally
 * many weights, so each pair of counts is measured once. Rounds are interleaved: whatever slows the machine for a while
 * slows all of them.
 */
import { Matrix, solve } from 'ml-matrix';
import { denseMask, type Mask, maskFromSkippedLayers } from '../../../shared/mask/mask.ts';
import type { Runner } from '../../engine/runner-interface.ts';
import { interleavedRounds, median } from '../../measure.ts';
import type { ModelConfig } from '../../model/model-source.ts';
import { weightsRead } from '../../model/weights-file.ts';
import { type BlockCounts, countsOf } from '../search/budget.ts';
import { CONTEXT_TOKENS } from '../search/effort.ts';
import { type DecodeTimer, openDecodeTimer } from '../search/model-parts.ts';

export type Timer = {
  /** Measures all of `masks`, including those that were measured before. */
  measure(masks: readonly Mask[], rounds: number): Promise<void>;
  /** ms a token. @throws Error for a mask whose counts were not measured. */
  msOf(mask: Mask): number;
  /** The mask's fastest and slowest round. @throws as `msOf`. */
  spreadOf(mask: Mask): readonly [low_ms: number, high_ms: number];
};

export function createTimer(runner: Runner, signal?: AbortSignal): Timer {
  const known = new Map<string, readonly number[]>();
  const roundsOf = (mask: Mask): readonly number[] => {
    const rounds = known.get(nameOf(mask));
    if (rounds === undefined) throw new Error(`${nameOf(mask)} was not timed`);
    return rounds;
  };
  let opened: Promise<DecodeTimer> | undefined;
  return {
    async measure(masks, rounds) {
      const subjects = new Map<string, Mask>();
      for (const mask of masks) subjects.set(nameOf(mask), mask);
      opened ??= openDecodeTimer(runner, CONTEXT_TOKENS);
      const decode_ms = await opened;
      const found = await interleavedRounds(
        [...subjects].map(([name, mask]) => ({ name, measure: () => decode_ms(mask) })),
        rounds,
        signal,
      );
      for (const [name, ms] of found) known.set(name, ms);
    },
    msOf: (mask) => median(roundsOf(mask)),
    spreadOf(mask) {
      const rounds = roundsOf(mask);
      return [Math.min(...rounds), Math.max(...rounds)];
    },
  };
}

function nameOf(mask: Mask): string {
  const { attention, ffn } = countsOf(mask);
  const replaced = attention + ffn > 0 ? (mask.surrogates ?? 'holes') : 'dense';
  return `${attention} attention, ${ffn} FFN, ${replaced}`;
}

/*
 * Static methods at the time of a learned set: along a method's order, the fewest blocks whose removal makes a token no
 * slower. Times are compared on a plane fitted to the measured ones: a fixed time, and a time for each attention and
 * each FFN block that runs. So equal counts take equal time.
 */

type TimedCounts = BlockCounts & { readonly ms: number };

/**
 * Times predicted from weights alone: proportional to the weights that are read, since decoding is bound by memory
 * bandwidth. Added to noisy measurements they keep the saving of each kind of block plausible.
 */
export function weightPoints(config: ModelConfig, dense_ms: number): TimedCounts[] {
  const quarter = Math.ceil(config.layerCount / 4);
  const timeOf = (counts: BlockCounts): TimedCounts => {
    const layers = (count: number) => Array.from({ length: count }, (_, layer) => layer);
    const mask = maskFromSkippedLayers(2 * config.layerCount, {
      skipAttention: layers(counts.attention),
      skipFfn: layers(counts.ffn),
    });
    const all = weightsRead(config, denseMask(2 * config.layerCount));
    return { ...counts, ms: (dense_ms * weightsRead(config, mask)) / all };
  };
  return [timeOf({ attention: quarter, ffn: 0 }), timeOf({ attention: 0, ffn: quarter })];
}

/** ms a token for any counts, by least squares. */
export function timePlane(points: readonly TimedCounts[]): (counts: BlockCounts) => number {
  const ridge = 1e-6;
  const rows = points.map(({ attention, ffn }) => [1, attention, ffn]);
  const system = new Matrix(rows);
  const normal = system.transpose().mmul(system);
  // A kind of block that was never skipped makes the system singular; the ridge gives it a saving of 0.
  for (let i = 0; i < 3; i++) normal.set(i, i, normal.get(i, i) + ridge);
  const right = system.transpose().mmul(Matrix.columnVector(points.map(({ ms }) => ms)));
  const [fixed, attention, ffn] = solve(normal, right).to1DArray() as [number, number, number];
  return (counts) => fixed + attention * counts.attention + ffn * counts.ffn;
}

/** How much slower than the learned set a static method may be, as a share of its time. */
const TOLERANCE = 0.005;

/**
 * The first of `masks` (each with more blocks removed) that is no slower than `target_ms`, within the tolerance;
 * undefined when even the last is slower.
 */
export function firstAsFast(
  masks: readonly Mask[],
  target_ms: number,
  predict: (counts: BlockCounts) => number,
): Mask | undefined {
  return masks.find((mask) => predict(countsOf(mask)) <= target_ms * (1 + TOLERANCE));
}
