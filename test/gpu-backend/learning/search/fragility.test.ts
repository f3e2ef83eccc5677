/** How fragile clusters are, from their own text and that of their neighbours. */
import { describe, expect, it } from 'vitest';
import { type ClusterText, fragilityOf } from '../../../../gpu-backend/learning/search/fragility.ts';

const MASKS = 3;
/** Clusters on a line from -1 to 1. */
const line = (count: number) => ({
  count,
  dimensions: 2,
  values: Float32Array.from({ length: 2 * count }, (_, i) =>
    i % 2 === 0 ? (2 * (i / 2)) / (count - 1) - 1 : 0,
  ),
});
/** `cost` by cluster, nats a position; each mask costs its number times as much. */
const textOf = (rows: readonly number[], cost: (cluster: number) => number): ClusterText => ({
  rows,
  positions: rows.map((count) => 50 * count),
  kl: rows.map((count, cluster) =>
    Array.from({ length: MASKS }, (_, mask) => 50 * count * mask * cost(cluster)),
  ),
});

describe('fragility', () => {
  it('is that of the own text where there is much of it', () => {
    const found = fragilityOf(
      textOf([500, 500, 500], (cluster) => 0.2 + 0.1 * cluster),
      line(3),
    );
    for (const [cluster, want] of [2 / 3, 1, 4 / 3].entries()) expect(found[cluster]).toBeCloseTo(want, 2);
  });

  it('of a cluster without text lies between those of its neighbours', () => {
    const rows = [40, 40, 0, 40, 40];
    const found = fragilityOf(
      textOf(rows, (cluster) => 0.1 + 0.1 * cluster),
      line(5),
    );
    expect(found[2]).toBeGreaterThan(found[1]!);
    expect(found[2]).toBeLessThan(found[3]!);
  });

  it('with little text is nearer to 1', () => {
    const [few, many] = [1, 100].map((count) =>
      fragilityOf(
        textOf([count, count, count], (cluster) => 0.1 + 0.1 * cluster),
        line(3),
      ),
    );
    expect(few![0]).toBeGreaterThan(many![0]!);
    expect(few![0]).toBeLessThan(1);
  });

  it.each([
    ['no text', textOf([0, 0, 0], () => 1)],
    ['text of one cluster', textOf([0, 9, 0], () => 1)],
    ['masks that cost nothing', textOf([4, 4, 4], () => 0)],
  ])('is 1 with %s', (_what, text) => {
    expect(fragilityOf(text, line(3))).toEqual([1, 1, 1]);
  });

  it('never says that a mask costs nothing', () => {
    const found = fragilityOf(
      textOf([900, 900, 0], (cluster) => 10 * cluster),
      line(3),
    );
    expect(Math.min(...found)).toBe(0.25);
  });
});
