/** How many weights a decoded token reads: what decoding is bound by on most machines. */
import type { Mask } from '../../shared/mask.ts';
import type { LlamaConfig } from './types.ts';

/** In multiply-adds, surrogates not counted: a skipped attention still reads K's and V's. */
export function weightsRead(config: LlamaConfig, mask: Mask): number {
  const { hiddenSize: H, ffnSize: F, headCount: N, kvHeadCount: G, headSize: D, vocabularySize: V } = config;
  return mask.runs.reduce((sum, runs, block) => {
    if (block % 2 === 1) return sum + (runs ? 3 * H * F : 0);
    return sum + 2 * H * G * D + (runs ? 2 * H * N * D : 0);
  }, H * V);
}
