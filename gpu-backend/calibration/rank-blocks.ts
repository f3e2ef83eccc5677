/** Masks by what they leave out: blocks by number, and how many blocks a sparsity is. */
import { denseMask, type Mask } from '../../shared/mask.ts';

export function maskWithout(blockCount: number, skipped: readonly number[]): Mask {
  const mask = denseMask(blockCount);
  for (const block of skipped) mask.runs[block] = 0;
  return mask;
}

/** Blocks to skip for a sparsity, at the nearest whole number (half up): 12.5 % of 60 blocks are 8. */
export const skipCountFor = (blockCount: number, sparsity: number): number =>
  Math.min(blockCount, Math.round(blockCount * sparsity));
