/** What each mask set's routing gains over its one mask on the scored rows, and what it could gain. */
import { z } from 'zod';
import type { Mask, SurrogatesId } from '../../../shared/mask/mask.ts';
import { isDense, maskBits, maskFromBits, withSurrogates } from '../../../shared/mask/mask.ts';
import { type MaskSet, maskSetVersion } from '../../../shared/mask/mask-set.ts';
import { countsOf } from '../search/budget.ts';
import { headroomOf } from '../search/headroom.ts';
import type { SampleScores } from '../search/score-masks.ts';
import type { LineUp, RoutedSet } from './line-up.ts';
import type { Evaluation } from './result.ts';
import { clusterMasks, oneMask } from './scored-rows.ts';

/** A mask set, and the masks under which its headroom is measured. */
type HeadroomSubject = {
  readonly set: MaskSet;
  readonly surrogate: boolean;
  /** Distinct masks, the mask for everybody first. */
  readonly masks: readonly Mask[];
  /** The mask of each row, an index into `masks`. */
  readonly routed: readonly number[];
  /** The mask for everybody with one block fewer out, two fewer, and so on, where the set's record has them. */
  readonly lighter: readonly Mask[];
};

/**
 * The sets that have several masks and whose record holds the mask for everybody. Sets whose mask for everybody is dense (a
 * set made by hand may have one) are left out: routing can only cost more.
 */
export const headroomSubjects = ({ sets, flavours }: LineUp): HeadroomSubject[] =>
  flavours.flatMap((flavour) => sets.flatMap((routed) => subjectOf(routed, flavour) ?? []));

function subjectOf({ set, clusters }: RoutedSet, flavour: SurrogatesId | null): HeadroomSubject | undefined {
  const one = oneMask(set);
  const own = clusterMasks(set);
  if (one === undefined || isDense(one)) return undefined;
  if (own.every((mask) => maskBits(mask) === maskBits(one))) return undefined;
  const bits = [...new Set([one, ...own].map(maskBits))];
  const toMask = (text: string) => withSurrogates(maskFromBits(set.model.blockCount, text), flavour);
  return {
    set,
    surrogate: flavour !== null,
    masks: bits.map(toMask),
    lighter: lighterBits(set).map(toMask),
    routed: clusters.map((cluster) => bits.indexOf(maskBits(own[cluster]!))),
  };
}

/** The record has no schema: entries that are not masks of this model are ignored. */
function lighterBits({ learned, model }: MaskSet): string[] {
  const { lighterMasks } = learned;
  if (!Array.isArray(lighterMasks)) return [];
  const texts = lighterMasks.filter((text): text is string => typeof text === 'string');
  try {
    for (const text of texts) maskFromBits(model.blockCount, text);
    return texts;
  } catch {
    return [];
  }
}

export function setHeadroom(
  { set, surrogate, masks, routed, lighter }: HeadroomSubject,
  rows: readonly { readonly kind: string }[],
  scoreOf: (row: number, mask: Mask) => SampleScores,
): Evaluation['headroom'][number] {
  const under = (row: number, some: readonly Mask[]) => some.map((mask) => scoreOf(row, mask).kl);
  const even = (row: number) => masks.map((mask) => scoreOf(row, mask).klEven);
  const headroom = headroomOf(
    rows.map(({ kind }, row) => ({
      kind,
      positions: scoreOf(row, masks[0]!).positions,
      routed: routed[row]!,
      kl: under(row, masks),
      klEven: even(row),
      lighter: under(row, lighter),
    })),
    { masks: masks.map(skippedOf(set)), lighter: lighter.map(skippedOf(set)) },
  );
  return { maskSet: maskSetVersion(set), name: set.name, surrogate, ...headroom };
}

const blockWeightsSchema = z.object({ attention: z.number().positive(), ffn: z.number().positive() });

/** The share that a mask leaves out: of a token's time where the set's record has block times, else of the blocks. */
function skippedOf({ learned }: MaskSet): (mask: Mask) => number {
  const { attention, ffn } = blockWeightsSchema.safeParse(learned.blockWeights).data ?? {
    attention: 1,
    ffn: 1,
  };
  return (mask) => {
    const out = countsOf(mask);
    return (2 * (out.attention * attention + out.ffn * ffn)) / (mask.runs.length * (attention + ffn));
  };
}
