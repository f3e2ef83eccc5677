/** What a mask set says of its own quality: the figures that `learn` measured on prompts that it never saw. */
import type { MaskSet } from './mask-set.ts';

/**
 * Top-1 agreement with the dense model, 0 to 1; null when the set does not say. Figures are kept by method; the
 * set's own stand under `learned`, or under the name of the method that it was learned with.
 */
export function heldOutAgreement({ heldOut, learned }: Pick<MaskSet, 'heldOut' | 'learned'>): number | null {
  for (const name of ['learned', String(learned.method)]) {
    const figures = heldOut[name];
    if (typeof figures !== 'object' || figures === null || Array.isArray(figures)) continue;
    const { agreement } = figures;
    if (typeof agreement === 'number' && agreement >= 0 && agreement <= 1) return agreement;
  }
  return null;
}
