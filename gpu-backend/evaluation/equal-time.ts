/**
 * Static methods at the time of a learned set: along a method's order, as few blocks as make a token no slower. All times
 * that are compared come from a plane through those that were measured: decoding takes a fixed time and one for each
 * block that runs, by kind. So equal counts take equal time.
 */
import { Matrix, solve } from 'ml-matrix';
import type { Mask } from '../../shared/mask.ts';
import { denseMask, maskFromSkippedLayers } from '../../shared/mask.ts';
import type { LlamaConfig } from '../model/types.ts';
import { weightsRead } from '../model/weights-read.ts';
import type { Counts } from './timing.ts';
import { skippedCounts } from './timing.ts';

export type TimedCounts = Counts & { readonly ms: number };

/**
 * What the weights alone say: time in proportion to those that are read, for decoding is bound by memory. Beside noisy
 * measurements they keep a kind's saving near what it can be.
 */
export function weightPoints(config: LlamaConfig, dense_ms: number): TimedCounts[] {
  const quarter = Math.ceil(config.layerCount / 4);
  const timeOf = (counts: Counts): TimedCounts => {
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
export function timePlane(points: readonly TimedCounts[]): (counts: Counts) => number {
  const ridge = 1e-6;
  const rows = points.map(({ attention, ffn }) => [1, attention, ffn]);
  const system = new Matrix(rows);
  const normal = system.transpose().mmul(system);
  // Kinds that were never skipped have no column of their own; the ridge gives them a saving of 0.
  for (let i = 0; i < 3; i++) normal.set(i, i, normal.get(i, i) + ridge);
  const right = system.transpose().mmul(Matrix.columnVector(points.map(({ ms }) => ms)));
  const [fixed, attention, ffn] = solve(normal, right).to1DArray() as [number, number, number];
  return (counts) => fixed + attention * counts.attention + ffn * counts.ffn;
}

/**
 * The first mask along `masks` (ever more blocks out) that is no slower than `target_ms`, up to `tolerance` of it;
 * undefined when even the last one is.
 */
export function firstAsFast(
  masks: readonly Mask[],
  target_ms: number,
  predict: (counts: Counts) => number,
  tolerance = 0.005,
): Mask | undefined {
  return masks.find((mask) => predict(skippedCounts(mask)) <= target_ms * (1 + tolerance));
}
