/** What static methods take out, one after the other, and the mask after so many blocks. */
import type { Mask } from '../../../shared/mask.ts';
import { maskWithout } from '../../calibration/rank-blocks.ts';

export const layerUnit = (layer: number): number[] => [2 * layer, 2 * layer + 1];
export const layerUnits = (layers: readonly number[]): number[][] => layers.map(layerUnit);
export const blockUnits = (blocks: readonly number[]): number[][] => blocks.map((block) => [block]);
export const range = (count: number): number[] => Array.from({ length: count }, (_, i) => i);

/** Indices by falling value; ties go to the lower index. */
export const highestFirst = (values: readonly number[]): number[] =>
  range(values.length).sort((a, b) => values[b]! - values[a]! || a - b);

/**
 * The mask that is nearest to `skipCount` blocks out along an order of units (half up): methods that take whole
 * layers meet an odd count halfway. Past the end of the order all of it is out.
 */
export function maskAlong(
  order: readonly (readonly number[])[],
  skipCount: number,
  blockCount: number,
): Mask {
  const perUnit = order[0]?.length ?? 1;
  return maskWithout(blockCount, order.slice(0, Math.round(skipCount / perUnit)).flat());
}
