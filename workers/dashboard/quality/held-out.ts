/**
 * The held-out figures that mask sets carry, as rows that can be compared: one a method. A set names its figures
 * itself, so what is no row of figures is left out.
 */
import { z } from 'zod';
import type { MaskSet } from '../../../shared/mask-set.ts';
import type { QualityRow } from './rows.ts';

const figure = z
  .number()
  .nullish()
  .transform((value) => value ?? null);
const figuresSchema = z.object({
  method: z.string().optional(),
  sparsity: z.number().optional(),
  surrogate: z.boolean().optional(),
  kl: figure,
  agreement: figure,
  perplexity: figure,
  msPerToken: figure,
});

export function qualityRows(set: MaskSet): QualityRow[] {
  return Object.entries(set.heldOut).flatMap(([name, value]) => {
    // What `evaluate` writes is a list of rows that name their method; what `learn` writes is keyed by it.
    if (Array.isArray(value))
      return name === 'rows' ? value.flatMap((row) => toRow(set, undefined, row)) : [];
    return toRow(set, name, value);
  });
}

function toRow(set: MaskSet, name: string | undefined, value: unknown): QualityRow[] {
  const parsed = figuresSchema.safeParse(value);
  if (!parsed.success) return [];
  const { kl, agreement, perplexity, msPerToken } = parsed.data;
  if (kl === null && agreement === null && perplexity === null) return [];
  const method = parsed.data.method ?? name ?? 'unnamed';
  const isDense = method === 'dense';
  return [
    {
      set: set.name,
      matched: null,
      method,
      surrogate: parsed.data.surrogate ?? (!isDense && set.surrogate),
      sparsity: parsed.data.sparsity ?? (isDense ? 0 : set.reachedSparsity),
      kl: kl ?? (isDense ? 0 : null),
      agreement: agreement ?? (isDense ? 1 : null),
      perplexity,
      ms_per_token: msPerToken,
    },
  ];
}
