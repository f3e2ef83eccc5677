/** Clusters shared out among masks by measured KL: never worse than one mask, little text trusted little. */
import { describe, expect, it } from 'vitest';
import {
  bestForAll,
  countThatPays,
  type RowCosts,
  shareMasks,
  validateCounts,
} from '../../../../gpu-backend/learning/search/share-masks.ts';
import { createRandom } from '../../../../gpu-backend/random.ts';

type Shape = { readonly rows: number; readonly clusters: number; readonly masks: number };

/** Rows whose costs are drawn; some clusters may have none. */
function drawnRows({ rows, clusters, masks }: Shape, seed: number): RowCosts[] {
  const random = createRandom(seed);
  const suits = Array.from({ length: clusters }, () => random.below(masks));
  return Array.from({ length: rows }, () => {
    const cluster = random.below(clusters);
    const positions = 1 + random.below(90);
    const kl = Array.from(
      { length: masks },
      (_, mask) => positions * (0.3 + (suits[cluster] === mask ? -0.05 : 0) + 0.3 * random.next()),
    );
    return { cluster, positions, kl };
  });
}

const SHAPES: Shape[] = [
  { rows: 200, clusters: 16, masks: 6 },
  { rows: 12, clusters: 64, masks: 5 },
  { rows: 1, clusters: 3, masks: 2 },
  { rows: 80, clusters: 1, masks: 4 },
  { rows: 300, clusters: 256, masks: 9 },
];

describe.each(SHAPES)('$rows rows of $clusters clusters under $masks masks', (shape) => {
  it.each([1, 2, 3, 4, 5, 6])(
    'draw %i: no cluster is worse off on its own rows than under one mask',
    (seed) => {
      const rows = drawnRows(shape, seed);
      for (let base = 0; base < shape.masks; base++) {
        for (let maskCount = 1; maskCount <= shape.masks; maskCount++) {
          const { masks, clusters } = shareMasks(rows, { clusterCount: shape.clusters, base, maskCount });
          expect(masks[0]).toBe(base);
          expect(masks.length).toBeLessThanOrEqual(maskCount);
          expect(new Set(masks).size).toBe(masks.length);
          expect(new Set([base, ...clusters])).toEqual(new Set(masks));
          const [own, alone] = [new Float64Array(shape.clusters), new Float64Array(shape.clusters)];
          for (const row of rows) {
            own[row.cluster]! += row.kl[clusters[row.cluster]!]!;
            alone[row.cluster]! += row.kl[base]!;
          }
          const worse = clusters.filter((_, cluster) => own[cluster]! > alone[cluster]! + 1e-9);
          expect(worse).toEqual([]);
          const occupied = new Set(rows.map(({ cluster }) => cluster));
          expect(clusters.filter((mask, cluster) => mask !== base && !occupied.has(cluster))).toEqual([]);
        }
      }
    },
  );
});

describe('shrinkage', () => {
  /** One cluster likes mask 1 and all others dislike it as much. */
  const rowsWith = (ownRows: number): RowCosts[] => [
    ...Array.from({ length: ownRows }, () => ({ cluster: 0, positions: 50, kl: [10, 8] })),
    ...Array.from({ length: 40 }, () => ({ cluster: 1, positions: 50, kl: [10, 12] })),
  ];

  it.each([
    [1, 0],
    [4, 0],
    [12, 1],
  ])('a cluster of %i rows that speak for mask 1 gets mask %i', (ownRows, mask) => {
    const { clusters } = shareMasks(rowsWith(ownRows), { clusterCount: 2, base: 0, maskCount: 2 });
    expect(clusters).toEqual([mask, 0]);
  });
});

it('few masks go where they take most off all text, not where they take most off a position', () => {
  const rowsOf = (cluster: number, count: number, kl: number[]): RowCosts[] =>
    Array.from({ length: count }, () => ({ cluster, positions: 50, kl }));
  const rows = [...rowsOf(0, 400, [10, 9, 10]), ...rowsOf(1, 20, [10, 10, 1])];
  const of = (maskCount: number) => shareMasks(rows, { clusterCount: 2, base: 0, maskCount }).clusters;
  expect([of(2), of(3)]).toEqual([
    [1, 0],
    [1, 2],
  ]);
});

describe('what is expected of a mask', () => {
  /** Nothing is told apart by cluster 0's rows; cluster 2 has none. */
  const rows: RowCosts[] = Array.from({ length: 10 }, (_, i) => ({
    cluster: i % 2,
    positions: 50,
    kl: i % 2 === 0 ? [10, 10] : [10, 14],
  }));
  const shared = (expected?: (number[] | undefined)[]) =>
    shareMasks(rows, { clusterCount: 3, base: 0, maskCount: 2, expected }).clusters;

  it('decides where rows say nothing, and gives way to rows that speak against it', () => {
    expect(shared([undefined, [-0.02, -0.02, -0.02]])).toEqual([1, 0, 1]);
    expect(shared([undefined, [0.02, -0.02, 0.02]])).toEqual([0, 0, 0]);
  });

  it('is what everybody says where nothing else is known', () => {
    expect(shared()).toEqual([0, 0, 0]);
    expect(shared([undefined, undefined])).toEqual([0, 0, 0]);
  });
});

describe('masks of several sizes', () => {
  /** Mask 0 leaves out a quarter, 1 is dense, 2 leaves out a half; clusters on a line, the last ones fragile. */
  const skipped = [0.25, 0, 0.5];
  const line = (count: number) => ({
    count,
    dimensions: 1,
    values: Float32Array.from({ length: count }, (_, cluster) => cluster / count),
  });
  const sizesOf = (clusters: number) => ({
    skipped,
    centroids: line(clusters),
    prompts: new Array<number>(clusters).fill(1),
  });
  const rowsOf = (clusters: number, seed: number, fragility: (cluster: number) => number): RowCosts[] => {
    const random = createRandom(seed);
    return Array.from({ length: 40 * clusters }, (_, i) => {
      const positions = 20 + random.below(60);
      const scale = fragility(i % clusters) * (0.8 + 0.4 * random.next()) * positions;
      return { cluster: i % clusters, positions, kl: [0.4 * scale, 0, 0.9 * scale] };
    });
  };
  const leftOut = (rows: readonly RowCosts[], clusters: readonly number[]) =>
    rows.reduce((sum, row) => sum + row.positions * skipped[clusters[row.cluster]!]!, 0) /
    rows.reduce((sum, row) => sum + row.positions, 0);

  it.each([1, 2, 3, 4])(
    'draw %i: tolerant clusters leave out more and fragile ones less, at no lower mean',
    (seed) => {
      const rows = rowsOf(10, seed, (cluster) => 0.5 + 0.1 * cluster);
      const sizes = sizesOf(10);
      const { clusters, masks, price } = shareMasks(rows, { clusterCount: 10, base: 0, maskCount: 3, sizes });
      expect(leftOut(rows, clusters)).toBeGreaterThanOrEqual(0.24);
      expect(price).toBeGreaterThan(0);
      expect(masks).toContain(2);
      const out = clusters.map((mask) => skipped[mask]!);
      expect(out).toEqual(out.toSorted((a, b) => b - a));
      const costOf = (own: (row: RowCosts) => number) =>
        rows.reduce((sum, row) => sum + row.kl[own(row)]!, 0);
      expect(costOf(({ cluster }) => clusters[cluster]!)).toBeLessThan(0.95 * costOf(() => 0));
    },
  );

  it('leave out what was asked for over all prompts, not over those that were measured', () => {
    const rows = rowsOf(10, 1, (cluster) => 0.5 + 0.1 * cluster);
    const prompts = Array.from({ length: 10 }, (_, cluster) => (cluster < 5 ? 1 : 20));
    const meanOf = (weights: readonly number[], clusters: readonly number[]) =>
      clusters.reduce((sum, mask, c) => sum + weights[c]! * skipped[mask]!, 0) /
      weights.reduce((sum, weight) => sum + weight, 0);
    const options = { clusterCount: 10, base: 0, maskCount: 3 };
    const { clusters } = shareMasks(rows, { ...options, sizes: { ...sizesOf(10), prompts } });
    expect(meanOf(prompts, clusters)).toBeGreaterThanOrEqual(0.24);
    // Fragile prompts are most of them, so the fewer tolerant ones do not leave out enough for all.
    expect(meanOf(prompts.toReversed(), clusters)).toBeGreaterThan(0.24);
    expect(clusters.slice(5).some((mask) => mask !== 1)).toBe(true);
  });

  it('of clusters that are equally fragile are all one', () => {
    const rows = rowsOf(10, 5, () => 1);
    const sizes = sizesOf(10);
    const { clusters } = shareMasks(rows, { clusterCount: 10, base: 0, maskCount: 3, sizes });
    expect(clusters.filter((mask) => mask !== 0).length).toBeLessThanOrEqual(2);
  });

  it('suit the neighbours where a cluster has no rows, and are judged at their price', () => {
    const all = rowsOf(10, 6, (cluster) => 0.5 + 0.1 * cluster);
    const rows = all.filter(({ cluster }) => cluster !== 0 && cluster !== 9);
    const sizes = sizesOf(10);
    const options = { clusterCount: 10, base: 0, maskCount: 3, sizes };
    const { clusters } = shareMasks(rows, options);
    expect([clusters[0], clusters[9]]).toEqual([2, 1]);
    const validated = validateCounts(rows, options, 1);
    expect(countThatPays(validated)).toBeGreaterThan(1);
    expect(validated[0]!.lead.mean).toBe(0);
  });

  it('are not used where they cost more than one mask at the price that makes up the mean', () => {
    const at = (cluster: number, kl: number[]): RowCosts[] =>
      Array.from({ length: 100 }, () => ({ cluster, positions: 50, kl: kl.map((nats) => 50 * nats) }));
    // The second cluster goes from dense to heavy at a price where the first is content with the mask for everybody.
    const rows = [...at(0, [0.1, 0, 2]), ...at(1, [1, 0, 1.2])];
    const { clusters } = shareMasks(rows, { clusterCount: 2, base: 0, maskCount: 3, sizes: sizesOf(2) });
    expect(clusters).toEqual([0, 0]);
  });

  it('are not used where only less than under one mask would be left out', () => {
    const rows = rowsOf(4, 7, () => 1).map(({ kl, ...row }) => ({ ...row, kl: [kl[0]!, kl[1]!] }));
    const sizes = { ...sizesOf(4), skipped: skipped.slice(0, 2) };
    const { clusters } = shareMasks(rows, { clusterCount: 4, base: 0, maskCount: 2, sizes });
    expect(clusters).toEqual([0, 0, 0, 0]);
  });
});

describe('the number of masks', () => {
  const options = { clusterCount: 8, base: 0, maskCount: 4 };

  it('is one where masks differ by chance alone', () => {
    let ones = 0;
    for (let seed = 1; seed <= 10; seed++) {
      const random = createRandom(seed);
      const rows = Array.from({ length: 160 }, (_, i) => ({
        cluster: i % 8,
        positions: 60,
        kl: Array.from(
          { length: 4 },
          (_, mask) => 60 * (0.3 + (mask === 0 ? 0 : 0.01) + 0.2 * random.next()),
        ),
      }));
      if (countThatPays(validateCounts(rows, options, 1)) === 1) ones++;
    }
    expect(ones).toBeGreaterThanOrEqual(9);
  });

  it('is that of the kinds of cluster that there are', () => {
    const random = createRandom(5);
    const rows = Array.from({ length: 240 }, (_, i) => ({
      cluster: i % 8,
      positions: 60,
      kl: Array.from(
        { length: 4 },
        (_, mask) => 60 * (0.3 + (mask === (i % 8) % 3 ? -0.1 : 0) + 0.1 * random.next()),
      ),
    }));
    const validated = validateCounts(rows, options, 1);
    expect(countThatPays(validated)).toBe(3);
    expect(validated).toEqual(validateCounts(rows, options, 1));
    expect(validated[2]!.kl).toBeLessThan(validated[0]!.kl);
    expect(validated[0]!.lead.mean).toBe(0);
  });

  it('is the fewest of those that are equally good', () => {
    const of = (kl: number) => ({ kl, lead: { mean: 1 - kl, standardError: 0.1 } });
    expect(countThatPays([of(1), of(0.5), of(0.5)])).toBe(2);
    expect(countThatPays([])).toBe(1);
  });

  it('is one without rows to tell by', () => {
    expect(shareMasks([], { ...options, base: 2 })).toEqual({
      masks: [2],
      clusters: Array(8).fill(2),
      price: 0,
    });
  });
});

describe('the mask for everybody', () => {
  const rows = (lead: number, spread: number): RowCosts[] =>
    Array.from({ length: 20 }, (_, i) => ({
      cluster: 0,
      positions: 10,
      kl: [5, 5 - lead + (i % 2 === 0 ? spread : -spread)],
    }));

  it('changes for one that leads by more than chance', () => {
    expect(bestForAll(rows(0.5, 0.1), 0)).toBe(1);
    expect(bestForAll(rows(0.5, 4), 0)).toBe(0);
    expect(bestForAll(rows(-0.5, 0.1), 0)).toBe(0);
    expect(bestForAll([], 0)).toBe(0);
  });

  it('is the best of all that lead', () => {
    const three = rows(0.5, 0.1).map(({ kl, ...row }) => ({ ...row, kl: [...kl, kl[0]! - 0.2] }));
    expect(bestForAll(three, 0)).toBe(1);
  });
});
