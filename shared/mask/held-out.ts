/**
 * What a mask set says of its routing, from prompts that nothing was learned on: what several masks gain over one, and how
 * far prompts lie from their centroids. `learn` writes it under `heldOut`, the dashboard shows it and compares live traffic
 * with it.
 */
import { z } from 'zod';
import type { MaskSet } from './mask-set.ts';

const interval = z.tuple([z.number(), z.number()]).nullable();
const figure = z.strictObject({
  /** Nats a position. */
  kl: z.number(),
  /** 95 %, by resampling rows. */
  interval,
  /** KL against one mask on the same rows, −0.05: 5 % lower; its interval is of the paired difference. */
  change: z.number(),
  changeInterval: interval,
});

export const headroomSchema = z.strictObject({
  rows: z.int(),
  positions: z.int(),
  masks: z.int(),
  oneMask: figure,
  routed: figure,
  /** The best mask of each row, known only afterwards: no routing among these masks is better. */
  bestAfterwards: figure,
  /**
   * The mask that is best on the other half of a row's positions, for each half: what remains of the best afterwards on other text
   * of the same row. Half a row has few positions, so routing that learned from many rows may be better. Sets that were learned
   * before it was measured do not say it.
   */
  bestByOtherHalf: figure.optional(),
  /** For each row the mask that is best on the other rows of its kind. */
  byKind: figure,
  /** How far routing leads one mask, nats a position; the error is null where there is a single row. */
  lead: z.strictObject({ mean_kl: z.number(), standardError_kl: z.number().nullable() }),
  /**
   * How many blocks fewer one mask has to leave out to come to the routed KL: what routing gains, in blocks. Negative
   * where routing loses; null where it was not measured. `isMore`: at least so many.
   */
  blocks: z.strictObject({ gained: z.number(), isMore: z.boolean() }).nullable(),
  /**
   * Where masks have several sizes: what the mask for everybody leaves out, of the blocks or of a token's time, and what the
   * routing left out on these rows. The figures of one mask are then at what the routing left out.
   */
  skipped: z.strictObject({ oneMask: z.number(), routed: z.number() }).optional(),
});
export type Headroom = z.infer<typeof headroomSchema>;

/** For people. */
export function blocksLine({ gained, isMore }: NonNullable<Headroom['blocks']>): string {
  const count = `${isMore ? 'at least ' : ''}${Math.abs(gained).toFixed(1)}`;
  return gained >= 0
    ? `At the routed KL one mask leaves out ${count} blocks fewer.`
    : `At the routed KL one mask leaves out ${count} blocks more.`;
}

export function skippedLine({ oneMask, routed }: NonNullable<Headroom['skipped']>): string {
  const [one, all] = [oneMask, routed].map((share) => `${(100 * share).toFixed(1)} %`);
  return `Masks have several sizes: routing leaves out ${all}, one mask ${one}; its figures are at what routing leaves out.`;
}

/** The share of prompts that lie farther away than {@link Nearest.far}. */
export const FAR_SHARE = 0.05;

const nearestSchema = z.strictObject({
  rows: z.int(),
  /** Euclidean distance of a prompt to its nearest centroid: the median, and what {@link FAR_SHARE} of them exceed. */
  median: z.number(),
  far: z.number(),
});
export type Nearest = z.infer<typeof nearestSchema>;

type SaidOfRouting = {
  readonly headroom: Headroom | null;
  readonly nearest: Nearest | null;
  /** Why there is one mask for all clusters. */
  readonly oneMaskReason: string | null;
};

/** Null is what a set does not say, or says in another form. */
export function saidOfRouting({ heldOut, learned }: Pick<MaskSet, 'heldOut' | 'learned'>): SaidOfRouting {
  const { oneMaskReason } = learned;
  return {
    headroom: headroomSchema.safeParse(heldOut.headroom).data ?? null,
    nearest: nearestSchema.safeParse(heldOut.nearest).data ?? null,
    oneMaskReason: typeof oneMaskReason === 'string' ? oneMaskReason : null,
  };
}
