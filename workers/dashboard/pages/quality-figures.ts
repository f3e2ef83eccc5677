/** Quality and cost of methods: where the figures come from, and which methods there is a reason to choose. */

import { z } from 'zod';
import { listSchema } from '../../../shared/admin/admin-wire.ts';
import { maskSetSummarySchema } from '../../../shared/admin/publication-wire.ts';
import { type EvaluatedRow, evaluatedRowSchema } from '../../../shared/admin/stats-wire.ts';
import { type MaskSet, maskSetSchema } from '../../../shared/mask/mask-set.ts';
import { admin, query } from '../api.ts';
import { publicationInUse } from '../hooks.ts';
import { shortVersion } from '../look.ts';

export type QualityRow = {
  /** The name of the mask set; null for a method without one. */
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

/** `names`: those of known sets, by version. */
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

/*
 * The held-out figures that mask sets carry, as one comparable row a method. A set names its figures itself, so what is
 * not a row of figures is left out.
 */

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

/* What there is to draw: the evaluation of each set that has one, and the figures that the sets carry themselves. */

export type Figures = {
  readonly title: string;
  readonly isEvaluation: boolean;
  readonly rows: readonly QualityRow[];
};

/** Each set is read whole; the newest say enough. */
const SET_COUNT_MAX = 12;

/** The evaluation of what is in use first, then those of newer sets, at last what all sets carry. */
export async function loadFigures(tenant: string, signal: AbortSignal): Promise<Figures[]> {
  const scope = query({ tenant });
  const [inUse, { data }] = await Promise.all([
    publicationInUse(tenant, signal),
    admin(listSchema(maskSetSummarySchema), `/mask-sets${scope}`, { signal }),
  ]);
  const sets = inUse === null ? data : [inUse, ...data];
  const versions = [...new Set(sets.map(({ version }) => version))].slice(0, SET_COUNT_MAX);
  const found = await Promise.all(
    versions.map(async (version) => {
      const path = `/mask-sets/${version}`;
      const [set, { data: evaluation }] = await Promise.all([
        admin(maskSetSchema, `${path}${scope}`, { signal }),
        admin(listSchema(evaluatedRowSchema), `${path}/evaluation${scope}`, { signal }),
      ]);
      return { version, set, evaluation };
    }),
  );
  const names = new Map(found.map(({ version, set }) => [version, set.name]));
  const evaluations = found.map(({ version, set, evaluation }) => ({
    title: `evaluation of ${set.name} ${shortVersion(version)}`,
    isEvaluation: true,
    rows: evaluatedRows(evaluation, names),
  }));
  const heldOut = found.flatMap(({ set }) => qualityRows(set));
  return [
    ...evaluations,
    { title: 'held-out figures of every set', isEvaluation: false, rows: heldOut },
  ].filter(({ rows }) => rows.length > 0);
}
