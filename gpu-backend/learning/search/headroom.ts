/**
 * Headroom: what routing gains over one mask, and what it could gain. It compares the KL of one mask, of routing, of
 * the best mask of each row (known afterwards), and of the mask that is best for other rows of the same kind. All are
 * measured on rows from which neither masks nor their assignment were made.
 */
import { type Headroom, headroomNotes, headroomRows } from '../../../shared/mask/held-out.ts';
import { signedPercent, sumOf } from '../../measure.ts';
import { bootstrapInterval, pairedLead, weightedRatio } from './bootstrap.ts';
import { lowestPrice } from './share-masks.ts';

/** A row under every mask that routing may choose. */
export type HeadroomRow = {
  readonly kind: string;
  readonly positions: number;
  /** Sum of the KL over the positions by mask; the mask for everybody first. */
  readonly kl: readonly number[];
  /** The part of `kl` at every other position, starting with the first. */
  readonly klEven: readonly number[];
  /** The mask that routing chose, an index into `kl`. */
  readonly routed: number;
  /** Sums under the mask for everybody with one block fewer out, two fewer, and so on. */
  readonly lighter: readonly number[];
};

/** The share of a token's time, or of the blocks, that each mask skips, in the order of a row's figures. */
type SkippedShares = {
  readonly masks: readonly number[];
  readonly lighter: readonly number[];
};

/**
 * If masks have several sizes, routing is compared with one mask of the same mean sparsity as the routed masks, and the
 * best masks known afterwards are chosen with the same mean sparsity as one mask.
 *
 * @param skipped given if masks may have several sizes. @throws RangeError without rows.
 */
export function headroomOf(rows: readonly HeadroomRow[], skipped?: SkippedShares): Headroom {
  if (rows.length === 0) throw new RangeError('no rows to tell the headroom on');
  const positions = rows.map((row) => row.positions);
  const shares = skipped?.masks ?? rows[0]!.kl.map(() => 1);
  const ladder = ladderOf(rows, shares[0]!, skipped?.lighter ?? []);
  /** `costs`: each row's cost; `left`: the share that it skipped. */
  const figureOf = (costs: readonly number[], left: readonly number[]) => {
    const kl = (weights: ArrayLike<number>) => weightedRatio(weights, costs, positions);
    const change = (weights: ArrayLike<number>) => {
      const one = oneMaskAt(ladder, meanShare(left, positions, weights));
      return changeOf(weightedRatio(weights, costs, one));
    };
    return {
      kl: kl(once),
      interval: bootstrapInterval(rows.length, kl),
      change: change(once),
      changeInterval: bootstrapInterval(rows.length, change),
    };
  };
  const once = new Uint8Array(rows.length).fill(1);
  const under = (chosen: readonly number[]) =>
    figureOf(
      rows.map(({ kl }, row) => kl[chosen[row]!]!),
      chosen.map((mask) => shares[mask]!),
    );
  const routed = rows.map((row) => row.routed);
  const left = routed.map((mask) => shares[mask]!);
  const mean = meanShare(left, positions, once);
  const one = oneMaskAt(ladder, mean);
  const slope = slopeAt(ladder, mean, sumOf(positions));
  const { mean: mean_kl, standardError } = pairedLead(
    rows.map((row, i) => ({
      positions: row.positions,
      // Corrects for size: a row is not rated worse for skipping more than the mean, nor better for skipping less.
      sum: one[i]! - row.kl[row.routed]! + slope * row.positions * (left[i]! - mean),
    })),
  );
  return {
    rows: rows.length,
    positions: sumOf(positions),
    masks: rows[0]!.kl.length,
    oneMask: { ...figureOf(one, left), change: 0, changeInterval: rows.length < 2 ? null : [0, 0] },
    routed: under(routed),
    bestAfterwards: under(
      atOneMean(
        rows,
        shares,
        rows.map(({ kl }) => kl),
      ),
    ),
    bestByOtherHalf: figureOf(...byHalves(rows, shares)),
    byKind: under(atOneMean(rows, shares, costsByKind(rows))),
    lead: { mean_kl, standardError_kl: Number.isFinite(standardError) ? standardError : null },
    blocks: blocksGained(rows, sumOf(rows.map((row) => row.kl[row.routed]!))),
    ...(isLevel(shares) ? {} : { skipped: { oneMask: shares[0]!, routed: mean } }),
  };
}

/** Shares that differ by less are equal. */
const ROUNDING = 1e-9;
const isLevel = (shares: readonly number[]): boolean =>
  shares.every((share) => Math.abs(share - shares[0]!) < ROUNDING);

const meanShare = (
  left: readonly number[],
  positions: readonly number[],
  weights: ArrayLike<number>,
): number =>
  weightedRatio(
    weights,
    left.map((share, row) => share * positions[row]!),
    positions,
  );

/**
 * The mask for everybody, lighter ones, and the dense model: the shares that they skip, falling, and their cost for
 * each row.
 */
type Ladder = { readonly shares: readonly number[]; readonly costs: readonly (readonly number[])[] };

function ladderOf(rows: readonly HeadroomRow[], one: number, lighter: readonly number[]): Ladder {
  const all = [one, ...lighter, 0];
  // A set's record is not checked, so only masks that skip ever less are used.
  const steps = [...all.keys()].filter((i) => i === 0 || all[i]! < Math.min(...all.slice(0, i)) - ROUNDING);
  return {
    shares: steps.map((i) => all[i]!),
    costs: rows.map(({ kl, lighter: costs }) => {
      const own = [kl[0]!, ...costs.slice(0, lighter.length), 0];
      return steps.map((i) => own[i]!);
    }),
  };
}

/** Index of the first mask of the ladder that skips no more than `share`. */
function stepBelow({ shares }: Ladder, share: number): number {
  const step = shares.findIndex((next, i) => i > 0 && next <= share);
  return step < 0 ? shares.length - 1 : step;
}

/**
 * The cost for each row of one mask that skips `share`: interpolated between two masks of the ladder, or extrapolated
 * from its first step.
 */
function oneMaskAt(ladder: Ladder, share: number): number[] {
  const { shares, costs } = ladder;
  if (Math.abs(share - shares[0]!) < ROUNDING) return costs.map((row) => row[0]!);
  const step = stepBelow(ladder, share);
  const part = (shares[step - 1]! - share) / (shares[step - 1]! - shares[step]!);
  return costs.map((row) => (1 - part) * row[step - 1]! + part * row[step]!);
}

/** Slope of one mask's cost by the share that it skips, nats a position. */
function slopeAt(ladder: Ladder, share: number, positions: number): number {
  const { shares, costs } = ladder;
  const step = stepBelow(ladder, share);
  const rise = sumOf(costs.map((row) => row[step - 1]! - row[step]!));
  return rise / (shares[step - 1]! - shares[step]!) / positions;
}

/**
 * For each row the mask with the lowest cost by `guesses`, minus a price for what it skips. The price is the lowest at
 * which all rows together skip as much as one mask.
 */
function atOneMean(
  rows: readonly HeadroomRow[],
  shares: readonly number[],
  guesses: readonly (readonly number[])[],
): number[] {
  const choose = (price: number) =>
    rows.map(({ positions }, row) => {
      const priced = guesses[row]!.map((cost, mask) => cost - price * positions * shares[mask]!);
      return priced.indexOf(Math.min(...priced));
    });
  const more = (chosen: readonly number[]) =>
    sumOf(rows.map(({ positions }, row) => positions * (shares[chosen[row]!]! - shares[0]!)));
  const price = lowestPrice((price) => more(choose(price)) >= -ROUNDING * rows.length);
  // A high price is always enough, since every row can take the first mask.
  return choose(price ?? 0);
}

/**
 * For each half of a row's positions, chooses the mask that costs the other half least. A row has few positions, so its
 * best mask, known afterwards, fits their noise; this shows what such a choice is worth on other text of the same row.
 *
 * @returns each row's cost, and the share that it skipped.
 */
function byHalves(
  rows: readonly HeadroomRow[],
  shares: readonly number[],
): [costs: number[], left: number[]] {
  const halves = [0, 1].map((half) => ({
    positions: rows.map(({ positions }) => (positions + 1 - half) >> 1),
    kl: rows.map(({ kl, klEven }) =>
      kl.map((sum, mask) => (half === 0 ? klEven[mask]! : sum - klEven[mask]!)),
    ),
  }));
  const chosenOn = halves.map(({ positions, kl }) =>
    atOneMean(
      rows,
      shares,
      rows.map((row, i) => kl[i]!.map((sum, mask) => scaled(sum, positions[i]!, row.positions, mask))),
    ),
  );
  const judged = halves.map((half, i) => ({ ...half, chosen: chosenOn[1 - i]! }));
  return [
    rows.map((_, row) => sumOf(judged.map(({ kl, chosen }) => kl[row]![chosen[row]!]!))),
    rows.map((row, i) =>
      sumOf(judged.map(({ positions, chosen }) => (positions[i]! * shares[chosen[i]!]!) / row.positions)),
    ),
  ];
}

/** The cost of a mask on `of` positions, scaled to `positions`; without any, only the first mask costs nothing. */
const scaled = (kl: number, of: number, positions: number, mask: number): number =>
  of === 0 ? Math.sign(mask) * Number.MAX_VALUE : (kl * positions) / of;

/** The relative change for a quotient of costs; 0 / 0 is no change. */
const changeOf = (quotient: number): number => (Number.isFinite(quotient) ? quotient - 1 : 0);

/**
 * The cost of each mask for the other rows of a row's kind, scaled to the row's positions; for a row alone in its kind
 * only the first mask costs nothing.
 */
function costsByKind(rows: readonly HeadroomRow[]): number[][] {
  const totals = new Map<string, { positions: number; kl: number[] }>();
  for (const { kind, positions, kl } of rows) {
    const total = totals.get(kind) ?? { positions: 0, kl: kl.map(() => 0) };
    totals.set(kind, {
      positions: total.positions + positions,
      kl: kl.map((value, mask) => total.kl[mask]! + value),
    });
  }
  return rows.map(({ kind, positions, kl }) => {
    const total = totals.get(kind)!;
    const others = total.positions - positions;
    return kl.map((value, mask) => scaled(total.kl[mask]! - value, others, positions, mask));
  });
}

/**
 * Routing's gain as a number of blocks: where routing's KL is on the line through the KLs of one mask with 0, 1, 2, …
 * blocks returned.
 */
function blocksGained(rows: readonly HeadroomRow[], routed: number): Headroom['blocks'] {
  const steps = rows[0]!.lighter.map((_, step) => sumOf(rows.map(({ lighter }) => lighter[step]!)));
  if (steps.length === 0) return null;
  const kls = [sumOf(rows.map(({ kl }) => kl[0]!)), ...steps];
  const fallOf = (step: number) => kls[step]! - kls[step + 1]!;
  if (routed >= kls[0]!) {
    // One mask would have to skip more, but only lighter masks were measured: the first step is extrapolated.
    return fallOf(0) > 0 ? { gained: (kls[0]! - routed) / fallOf(0), isMore: false } : null;
  }
  const step = kls.findIndex((kl, i) => i > 0 && kl <= routed) - 1;
  if (step < 0) return { gained: steps.length, isMore: true };
  return { gained: step + (kls[step]! - routed) / fallOf(step), isMore: false };
}

/** Whether routing leads by more than its error; otherwise the set gets one mask for all clusters. */
export const leads = ({ lead }: Pick<Headroom, 'lead'>): boolean =>
  lead.standardError_kl !== null && lead.mean_kl > lead.standardError_kl;

/* For people. */

const nats = (value: number): string => value.toFixed(4);

/** One line a figure: name, KL and its interval, change against one mask and its interval. */
export function headroomLines(headroom: Headroom): string[] {
  const { masks, rows, positions } = headroom;
  return [
    `Headroom of ${masks} masks on ${rows} rows, ${positions} positions; changes are against one mask:`,
    ...headroomRows(headroom).map(({ name, kl, interval, change, changeInterval }) => {
      const spread = interval === null ? '' : ` [${interval.map(nats).join(', ')}]`;
      const paired = changeInterval === null ? '' : ` [${changeInterval.map(signedPercent).join(', ')}]`;
      return `  ${name.padEnd(24)} KL ${nats(kl)}${spread}  ${signedPercent(change)}${paired}`;
    }),
    ...headroomNotes(headroom).map((line) => `  ${line}`),
  ];
}
