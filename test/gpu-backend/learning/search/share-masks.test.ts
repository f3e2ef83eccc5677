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

describe('the number of masks', () => {
  const options = { clusterCount: 8, base: 0, maskCount: 4 };

  it('is one where masks differ by chance alone', () => {
    let ones = 0;
    for (let seed = 1; seed <= 10; seed++) {
      const random = createRandom(seed);
      const rows = Array.from({ length: 160 }, (_, i) => ({
        ...{ cluster: i % 8, positions: 60 },
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
      ...{ cluster: i % 8, positions: 60 },
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

  it('is one without rows to tell by', () => {
    expect(shareMasks([], { ...options, base: 2 })).toEqual({ masks: [2], clusters: Array(8).fill(2) });
  });
});

describe('the mask for everybody', () => {
  const rows = (lead: number, spread: number): RowCosts[] =>
    Array.from({ length: 20 }, (_, i) => ({
      ...{ cluster: 0, positions: 10 },
      kl: [5, 5 - lead + (i % 2 === 0 ? spread : -spread)],
    }));

  it('changes for one that leads by more than chance', () => {
    expect(bestForAll(rows(0.5, 0.1), 0)).toBe(1);
    expect(bestForAll(rows(0.5, 4), 0)).toBe(0);
    expect(bestForAll(rows(-0.5, 0.1), 0)).toBe(0);
    expect(bestForAll([], 0)).toBe(0);
  });
});
