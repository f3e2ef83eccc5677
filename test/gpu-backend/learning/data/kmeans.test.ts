import { describe, expect, it } from 'vitest';
import { finish } from '../../../../gpu-backend/event-loop.ts';
import type { Points } from '../../../../gpu-backend/learning/data/kmeans.ts';
import { kMeans, kMeansBySample, packPoints } from '../../../../gpu-backend/learning/data/kmeans.ts';
import { createRandom } from '../../../../gpu-backend/random.ts';

/** `perBlob` points around each of the given centres. */
function blobs(centres: number[][], perBlob: number, spread: number): Points {
  const random = createRandom(7);
  return packPoints(
    centres.flatMap((centre) =>
      Array.from({ length: perBlob }, () => Float32Array.from(centre, (x) => x + spread * random.normal())),
    ),
  );
}

const distance = (a: Float32Array, b: Float32Array) => a.reduce((sum, x, i) => sum + (x - b[i]!) ** 2, 0);

describe('k-means', () => {
  it('finds well separated groups', () => {
    const points = blobs(
      [
        [0, 0],
        [10, 0],
        [0, 10],
        [10, 10],
      ],
      25,
      0.5,
    );
    const { assignment, sizes } = kMeans(points, { clusterCount: 4, seed: 1 });
    expect([...sizes]).toEqual([25, 25, 25, 25]);
    for (let blob = 0; blob < 4; blob++) {
      expect(new Set(assignment.slice(25 * blob, 25 * (blob + 1))).size).toBe(1);
    }
  });

  it('ends where each point is nearest to its centroid and each centroid is the mean of its points', () => {
    const points = blobs([[0, 0, 0]], 300, 1);
    const { centroids, assignment, inertia } = kMeans(points, {
      clusterCount: 5,
      seed: 3,
      iterationsMax: 500,
    });
    const point = (i: number) => points.values.slice(3 * i, 3 * i + 3);
    const centroid = (c: number) => centroids.slice(3 * c, 3 * c + 3);
    let total = 0;
    for (let i = 0; i < points.count; i++) {
      const distances = [0, 1, 2, 3, 4].map((c) => distance(point(i), centroid(c)));
      expect(assignment[i]).toBe(distances.indexOf(Math.min(...distances)));
      total += Math.min(...distances);
    }
    expect(inertia).toBeCloseTo(total, 3);
    for (let c = 0; c < 5; c++) {
      const own = Array.from(assignment.keys()).filter((i) => assignment[i] === c);
      const mean = [0, 1, 2].map((d) => own.reduce((sum, i) => sum + point(i)[d]!, 0) / own.length);
      expect(distance(centroid(c), Float32Array.from(mean))).toBeLessThan(1e-9);
    }
  });

  it('places centroids by a sample, and every point belongs to its nearest', () => {
    const random = createRandom(4);
    const rows = Array.from({ length: 400 }, (_, i) =>
      Float32Array.of(10 * (i % 4) + random.next(), random.next()),
    );
    const [points, sample] = [packPoints(rows), packPoints(rows.slice(0, 40))];
    const { assignment, sizes, inertia, centroids } = finish(
      kMeansBySample(points, sample, { clusterCount: 4, seed: 1 }),
    );
    expect([...sizes]).toEqual([100, 100, 100, 100]);
    expect(new Set(assignment.slice(0, 4)).size).toBe(4);
    assignment.forEach((cluster, i) => {
      expect(cluster).toBe(assignment[i % 4]);
    });
    expect(centroids).toEqual(kMeans(sample, { clusterCount: 4, seed: 1 }).centroids);
    // A twelfth for each of two coordinates, and what the sample's means are off.
    expect(inertia / 400).toBeCloseTo(1 / 6, 1);
  });

  it('gives equal results for equal seeds, and no worse ones for more starts', () => {
    const points = blobs(
      [
        [0, 0],
        [4, 1],
        [2, 5],
      ],
      60,
      1.5,
    );
    const run = (seed: number, starts: number) => kMeans(points, { clusterCount: 7, seed, starts });
    expect(run(5, 3)).toEqual(run(5, 3));
    expect(run(5, 12).inertia).toBeLessThanOrEqual(run(5, 1).inertia);
  });

  it('leaves no cluster empty, even among many equal points', () => {
    const rows = [...Array(50).fill([0, 0]), [1, 0], [0, 1], [9, 9]].map((row) => Float32Array.from(row));
    for (let seed = 0; seed < 20; seed++) {
      const { sizes } = kMeans(packPoints(rows), { clusterCount: 4, seed, starts: 1 });
      expect([...sizes].sort((a, b) => a - b)).toEqual([1, 1, 1, 50]);
    }
  });

  it('says so when there are fewer distinct points than clusters', () => {
    const rows = [[1], [1], [2]].map((row) => Float32Array.from(row));
    expect(() => kMeans(packPoints(rows), { clusterCount: 3, seed: 0 })).toThrow(/only 2 distinct/);
  });
});
