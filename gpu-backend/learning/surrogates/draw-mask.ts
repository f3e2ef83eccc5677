/**
 * Draws random masks similar to useful ones. Distillation trains a table for every mask, so each step takes another.
 * Blocks that are cheap to replace are drawn more often; blocks above a cost never.
 */
import { lowestFirst } from '../../measure.ts';
import type { Random } from '../../random.ts';

/** The share of all blocks to skip is drawn between these. */
const [SPARSITY_MIN, SPARSITY_MAX] = [0.1, 0.35];
/** A block that costs more alone is never skipped. */
const COST_MAX = 0.5;
/**
 * Exponents of 1/cost, one drawn for each mask: how strongly cheap blocks are preferred. Mostly strongly, as searches
 * find masks of cheap blocks and the table's capacity is limited; sometimes weakly, as every block needs a surrogate.
 */
const PREFERENCES = [3, 3, 1] as const;
/** Costs below this are measurement noise. */
const COST_MIN = 0.002;

/** `[2L]`: 1 runs, 0 skipped. `costs`: of replacing each block alone, nats, `[2L]`. */
export function drawMask(costs: readonly number[], random: Random): Uint8Array {
  const sparsity = SPARSITY_MIN + (SPARSITY_MAX - SPARSITY_MIN) * random.next();
  const count = Math.max(1, Math.round(sparsity * costs.length));
  // From an even split to attention alone: both are used in practice.
  const attentionShare = random.next() < 0.5 ? 0.5 : 0.25 + 0.75 * random.next();
  const attention = Math.round(attentionShare * count);
  const preference = PREFERENCES[Math.floor(random.next() * PREFERENCES.length)]!;
  const runs = new Uint8Array(costs.length).fill(1);
  skip(runs, costs, 0, attention, preference, random);
  skip(runs, costs, 1, count - attention, preference, random);
  return runs;
}

/**
 * Skips `count` blocks of one kind, drawn without replacement, cheap ones more likely (Efraimidis and Spirakis, 2006).
 */
function skip(
  runs: Uint8Array,
  costs: readonly number[],
  kind: 0 | 1,
  count: number,
  preference: number,
  random: Random,
): void {
  const keys = new Map<number, number>();
  for (let block = kind; block < costs.length; block += 2) {
    const noise = -Math.log(1 - random.next());
    if (costs[block]! > COST_MAX) continue;
    keys.set(block, noise * Math.max(costs[block]!, COST_MIN) ** preference);
  }
  for (const block of lowestFirst(keys.keys(), (one) => keys.get(one)!).slice(0, count)) runs[block] = 0;
}

/** Most blocks that {@link drawAround} exchanges. */
const EXCHANGES_MAX = 3;

/** One of the masks in use, unchanged or with some blocks exchanged for cheap ones of the same kind. */
export function drawAround(
  masks: readonly Uint8Array[],
  costs: readonly number[],
  random: Random,
): Uint8Array {
  const runs = Uint8Array.from(masks[Math.floor(random.next() * masks.length)]!);
  const exchanges = Math.floor(random.next() * (EXCHANGES_MAX + 1));
  for (let i = 0; i < exchanges; i++) {
    const skipped = costs.map((_, block) => block).filter((block) => runs[block] === 0);
    if (skipped.length === 0) break;
    const back = skipped[Math.floor(random.next() * skipped.length)]!;
    const kind = (back % 2) as 0 | 1;
    // Skipped blocks cannot be drawn again.
    const open = costs.map((cost, block) => (runs[block] === 1 ? cost : Number.POSITIVE_INFINITY));
    skip(runs, open, kind, 1, PREFERENCES[0], random);
    runs[back] = 1;
  }
  return runs;
}

/** Skips the `attention` and `ffn` blocks that are cheapest alone; tables are judged under such masks. */
export function rankedMask(costs: readonly number[], attention: number, ffn: number): Uint8Array {
  const runs = new Uint8Array(costs.length).fill(1);
  const close = (kind: 0 | 1, count: number) => {
    const blocks = [...costs.keys()].filter((block) => block % 2 === kind);
    for (const block of lowestFirst(blocks, (one) => costs[one]!).slice(0, count)) runs[block] = 0;
  };
  close(0, attention);
  close(1, ffn);
  return runs;
}
