/** What is known of some clusters, told of others. */
import { describe, expect, it } from 'vitest';
import {
  alongLines,
  byDistance,
  ridgeOnCentroids,
} from '../../../../gpu-backend/learning/search/centroid-ridge.ts';

const pointsOf = (...points: readonly (readonly number[])[]) => ({
  count: points.length,
  dimensions: points[0]!.length,
  values: Float32Array.from(points.flat()),
});

describe('what clusters near each other share', () => {
  // Two places with two clusters each, one of which has no text; and one that is far from everything.
  const centroids = pointsOf([0, 0], [0.1, 0], [2, 0], [2.1, 0], [0, 30]);
  const figures = [[1, 5], undefined, [3, -5], undefined, undefined];
  const rows = [100, 0, 100, 0, 0];

  it('is told of clusters without text by those nearby, and far from all text it is the mean', () => {
    const found = ridgeOnCentroids(figures, rows, byDistance(centroids), 1)!;
    expect(found[0]![0]).toBeCloseTo(1, 1);
    expect(found[1]![0]).toBeCloseTo(1, 1);
    expect(found[3]![1]).toBeCloseTo(-5, 0);
    expect(found[4]![0]).toBeCloseTo(2, 6);
    expect(found[4]![1]).toBeCloseTo(0, 6);
  });

  it('counts less where few prompts say it', () => {
    const distance = (count: number) => {
      const found = ridgeOnCentroids(figures, [count, 0, count, 0, 0], byDistance(centroids), 1)!;
      return found[2]![0]! - found[0]![0]!;
    };
    expect(distance(100)).toBeCloseTo(2, 1);
    expect(distance(1)).toBeLessThan(distance(10));
    expect(distance(10)).toBeLessThan(distance(100));
  });

  it('is unknown where fewer than two clusters have text', () => {
    const one = [[1], undefined, undefined, undefined, undefined];
    expect(ridgeOnCentroids(one, [9, 0, 0, 0, 0], byDistance(centroids), 1)).toBeUndefined();
  });
});

it('along lines, what rises from one cluster to the next goes on rising', () => {
  const centroids = pointsOf([0], [1], [2], [3]);
  const rows = [1000, 1000, 1000, 0];
  const found = ridgeOnCentroids([[0], [1], [2], undefined], rows, alongLines(centroids, rows), 1)!;
  expect(found[3]![0]).toBeCloseTo(3, 1);
});
