/** Quality and cost of a method, wherever the figures come from; and which of many rows there is a reason to choose. */
import type { EvaluatedRow } from '../../../shared/evaluation.ts';

export type QualityRow = {
  /** The name of the mask set; null for a method of none. */
  readonly set: string | null;
  readonly method: string;
  /** How an evaluation chose what is out: as many blocks as in a learned set, or as a token takes as long; else null. */
  readonly matched: EvaluatedRow['matched'] | null;
  readonly surrogate: boolean;
  /** 0 to 1. */
  readonly sparsity: number;
  readonly kl: number | null;
  readonly agreement: number | null;
  readonly perplexity: number | null;
  readonly ms_per_token: number | null;
};

/** `names`: of the sets that are known, by version. */
export const evaluatedRows = (
  rows: readonly EvaluatedRow[],
  names: ReadonlyMap<string, string>,
): QualityRow[] =>
  rows.map(({ method, matched, maskSet, surrogate, sparsity, kl, agreement, perplexity, msPerToken }) => ({
    set: maskSet === null || matched === 'time' ? null : (names.get(maskSet) ?? maskSet),
    ...{ method, matched, surrogate, sparsity, kl, agreement, perplexity },
    ms_per_token: msPerToken,
  }));

export type Measure = 'kl' | 'agreement' | 'perplexity';

/**
 * The rows that no other row beats in both, `cost` and `measure`: the ones that there is a reason to choose.
 * Rows without either figure take no part.
 */
export function paretoFront(
  rows: readonly QualityRow[],
  cost: (row: QualityRow) => number | null,
  measure: Measure,
): QualityRow[] {
  const sign = measure === 'agreement' ? -1 : 1;
  const known = rows.filter((row) => cost(row) !== null && row[measure] !== null);
  const isBeaten = (row: QualityRow) =>
    known.some((other) => {
      const cheaper = cost(other)! - cost(row)!;
      const better = sign * (other[measure]! - row[measure]!);
      return cheaper <= 0 && better <= 0 && (cheaper < 0 || better < 0);
    });
  return known.filter((row) => !isBeaten(row)).sort((a, b) => cost(a)! - cost(b)!);
}
