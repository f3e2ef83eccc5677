/**
 * What routing gains over one mask, and what it could gain: KL of one mask, of the routing, of the best mask known
 * afterwards, and of the mask that is best for other rows of the same kind. All on the same rows, which neither masks
 * nor their assignment were made on.
 */
import { blocksLine, type Headroom } from '../../../shared/mask/held-out.ts';
import { bootstrapInterval, pairedLead, weightedRatio } from './bootstrap.ts';

/** A row under every mask that routing may choose. */
export type HeadroomRow = {
  readonly kind: string;
  readonly positions: number;
  /** Sum of the KL over the positions by mask; the mask for everybody first. */
  readonly kl: readonly number[];
  /** The mask that routing chose, an index into `kl`. */
  readonly routed: number;
  /** Sums under the mask for everybody with one block fewer out, two fewer, and so on. */
  readonly lighter: readonly number[];
};

/** @throws RangeError without rows. */
export function headroomOf(rows: readonly HeadroomRow[]): Headroom {
  if (rows.length === 0) throw new RangeError('no rows to tell the headroom on');
  const positions = rows.map((row) => row.positions);
  const one = rows.map(({ kl }) => kl[0]!);
  const routed = rows.map(({ kl, routed }) => kl[routed]!);
  const figureOf = (sums: readonly number[]) => {
    const kl = (weights: ArrayLike<number>) => weightedRatio(weights, sums, positions);
    const change = (weights: ArrayLike<number>) => changeOf(weightedRatio(weights, sums, one));
    const once = new Uint8Array(rows.length).fill(1);
    return {
      ...{ kl: kl(once), interval: bootstrapInterval(rows.length, kl) },
      ...{ change: change(once), changeInterval: bootstrapInterval(rows.length, change) },
    };
  };
  const { mean, standardError } = pairedLead(
    rows.map((row, i) => ({ positions: row.positions, sum: one[i]! - routed[i]! })),
  );
  return {
    rows: rows.length,
    positions: sumOf(positions),
    masks: rows[0]!.kl.length,
    oneMask: figureOf(one),
    routed: figureOf(routed),
    bestAfterwards: figureOf(rows.map(({ kl }) => Math.min(...kl))),
    byKind: figureOf(costsByKind(rows)),
    lead: { mean_kl: mean, standardError_kl: Number.isFinite(standardError) ? standardError : null },
    blocks: blocksGained(rows, sumOf(routed)),
  };
}

/** Of a quotient of costs; two costs of 0 are equal. */
const changeOf = (quotient: number): number => (Number.isFinite(quotient) ? quotient - 1 : 0);

/** Each row under the mask with the lowest KL on the other rows of its kind; alone in its kind, under one mask. */
function costsByKind(rows: readonly HeadroomRow[]): number[] {
  const masks = rows[0]!.kl.map((_, mask) => mask);
  const totals = new Map<string, number[]>();
  for (const { kind, kl } of rows) {
    const total = totals.get(kind);
    totals.set(
      kind,
      masks.map((mask) => (total?.[mask] ?? 0) + kl[mask]!),
    );
  }
  return rows.map(({ kind, kl }) => {
    const others = masks.map((mask) => totals.get(kind)![mask]! - kl[mask]!);
    // What is left of a sum after its only part was taken off is 0 for all, and the first mask wins.
    return kl[others.indexOf(Math.min(...others))]!;
  });
}

/** Along the line through the KLs of one mask with 0, 1, 2, … blocks fewer out. */
function blocksGained(rows: readonly HeadroomRow[], routed: number): Headroom['blocks'] {
  const steps = rows[0]!.lighter.map((_, step) => sumOf(rows.map(({ lighter }) => lighter[step]!)));
  if (steps.length === 0) return null;
  const kls = [sumOf(rows.map(({ kl }) => kl[0]!)), ...steps];
  const fallOf = (step: number) => kls[step]! - kls[step + 1]!;
  if (routed >= kls[0]!) {
    // One mask would have to leave out more; it was measured with less, so its first step stands for the slope.
    return fallOf(0) > 0 ? { gained: (kls[0]! - routed) / fallOf(0), isMore: false } : null;
  }
  const step = kls.findIndex((kl, i) => i > 0 && kl <= routed) - 1;
  if (step < 0) return { gained: steps.length, isMore: true };
  return { gained: step + (kls[step]! - routed) / fallOf(step), isMore: false };
}

/** Routing has to lead by more than its error: else a set is published with one mask. */
export const leads = ({ lead }: Pick<Headroom, 'lead'>): boolean =>
  lead.standardError_kl !== null && lead.mean_kl > lead.standardError_kl;

const sumOf = (values: readonly number[]): number => values.reduce((sum, value) => sum + value, 0);

/* For people. */

const percent = (share: number): string => `${share > 0 ? '+' : ''}${(100 * share).toFixed(1)} %`;
const nats = (value: number): string => value.toFixed(4);

/** One line a figure: name, KL and its interval, change against one mask and its interval. */
export function headroomLines({
  oneMask,
  routed,
  bestAfterwards,
  byKind,
  blocks,
  ...rest
}: Headroom): string[] {
  const line = (name: string, { kl, interval, change, changeInterval }: Headroom['routed']) => {
    const spread = interval === null ? '' : ` [${interval.map(nats).join(', ')}]`;
    const paired = changeInterval === null ? '' : ` [${changeInterval.map(percent).join(', ')}]`;
    return `  ${name.padEnd(24)} KL ${nats(kl)}${spread}  ${percent(change)}${paired}`;
  };
  return [
    `Headroom of ${rest.masks} masks on ${rest.rows} rows, ${rest.positions} positions; changes are against one mask:`,
    line('one mask', oneMask),
    line('routing', routed),
    line('best mask, afterwards', bestAfterwards),
    line('routing by kind', byKind),
    ...(blocks === null ? [] : [`  ${blocksLine(blocks)}`]),
  ];
}
