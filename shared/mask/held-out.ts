/**
 * The held-out figures of a mask set's routing: what several masks gain over one, and how far prompts are from their
 * centroids. `learn` writes them under `heldOut`; the dashboard shows them and compares live traffic with them.
 */
import { z } from 'zod';
import type { MaskSet } from './mask-set.ts';

const interval = z.tuple([z.number(), z.number()]).nullable();
const figure = z.strictObject({
  /** Nats a position. */
  kl: z.number(),
  /** 95 %, by resampling rows. */
  interval,
  /**
   * Relative change of the KL against one mask on the same rows (−0.05: 5 % lower); its interval is of the paired
   * difference.
   */
  change: z.number(),
  changeInterval: interval,
});

export const headroomSchema = z.strictObject({
  rows: z.int(),
  positions: z.int(),
  masks: z.int(),
  oneMask: figure,
  routed: figure,
  /** The best mask of each row, known only afterwards: an upper bound for routing among these masks. */
  bestAfterwards: figure,
  /**
   * For each half of a row's positions, the mask that is best on the other half: how much of `bestAfterwards` carries
   * over to other text of the same row. Half a row has few positions, so routing learned from many rows may be better.
   */
  bestByOtherHalf: figure,
  /** For each row the mask that is best on the other rows of its kind. */
  byKind: figure,
  /** By how much routing is better than one mask, nats a position; the error is null with a single row. */
  lead: z.strictObject({ mean_kl: z.number(), standardError_kl: z.number().nullable() }),
  /**
   * Routing's gain in blocks: how many blocks fewer one mask must skip to reach the routed KL. Negative where routing
   * loses; null if it was not measured. `isMore`: at least that many.
   */
  blocks: z.strictObject({ gained: z.number(), isMore: z.boolean() }).nullable(),
  /**
   * If masks have several sizes: the share of blocks, or of a token's time, that the mask for everybody skips, and that
   * the routed masks skip on these rows. The figures of one mask are then for the routed share.
   */
  skipped: z.strictObject({ oneMask: z.number(), routed: z.number() }).optional(),
});
export type Headroom = z.infer<typeof headroomSchema>;

/* For people: the terminal, the report and the dashboard say the same. */

/** docs/learn.md says what each name means. */
export function headroomRows(headroom: Headroom): (z.infer<typeof figure> & { readonly name: string })[] {
  return [
    { name: 'one mask for all', ...headroom.oneMask },
    { name: 'routing', ...headroom.routed },
    { name: 'best mask, afterwards', ...headroom.bestAfterwards },
    { name: 'best by the other half', ...headroom.bestByOtherHalf },
    { name: 'routing by kind', ...headroom.byKind },
  ];
}

/** What is known besides the rows, a sentence each. */
export const headroomNotes = ({ blocks, skipped }: Headroom): string[] => [
  ...(blocks === null ? [] : [blocksLine(blocks)]),
  ...(skipped === undefined ? [] : [skippedLine(skipped)]),
];

function blocksLine({ gained, isMore }: NonNullable<Headroom['blocks']>): string {
  const count = `${isMore ? 'at least ' : ''}${Math.abs(gained).toFixed(1)}`;
  return gained >= 0
    ? `At the routed KL one mask leaves out ${count} blocks fewer.`
    : `At the routed KL one mask leaves out ${count} blocks more.`;
}

function skippedLine({ oneMask, routed }: NonNullable<Headroom['skipped']>): string {
  const [one, all] = [oneMask, routed].map((share) => `${(100 * share).toFixed(1)} %`);
  return `Masks have several sizes: routing leaves out ${all}, one mask ${one}; its figures are at what routing leaves out.`;
}

/** Share of the prompts that are farther from their centroid than {@link Nearest.far}. */
export const FAR_SHARE = 0.05;

const nearestSchema = z.strictObject({
  rows: z.int(),
  /**
   * Euclidean distance of a prompt to its nearest centroid: the median, and the distance that {@link FAR_SHARE} of them
   * exceed.
   */
  median: z.number(),
  far: z.number(),
});
export type Nearest = z.infer<typeof nearestSchema>;

type SaidOfRouting = {
  readonly headroom: Headroom | null;
  readonly nearest: Nearest | null;
  /** Why all clusters share one mask; null if they do not. */
  readonly oneMaskReason: string | null;
};

/** A field is null if the set lacks it or has it in another form. */
export function saidOfRouting({ heldOut, learned }: Pick<MaskSet, 'heldOut' | 'learned'>): SaidOfRouting {
  const { oneMaskReason } = learned;
  return {
    headroom: headroomSchema.safeParse(heldOut.headroom).data ?? null,
    nearest: nearestSchema.safeParse(heldOut.nearest).data ?? null,
    oneMaskReason: typeof oneMaskReason === 'string' ? oneMaskReason : null,
  };
}
