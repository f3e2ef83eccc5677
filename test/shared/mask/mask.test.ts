// What a mask's id depends on: model, blocks, and the table of surrogates if there is one. And which centroid is nearest.
import { expect, test } from 'vitest';
import {
  centroidDistances,
  nearestAllowed,
  nearestCentroid,
  packCentroids,
} from '../../../shared/mask/centroids.ts';
import {
  DENSE_MASK_ID,
  denseMask,
  type ModelHash,
  maskFromBits,
  maskFromSkippedLayers,
  maskId,
  SURROGATES_ID_PATTERN,
  type SurrogatesId,
  skippedLayers,
  withSurrogates,
} from '../../../shared/mask/mask.ts';
import { type MaskSet, maskSetSchema } from '../../../shared/mask/mask-set.ts';

const MODEL = 'ab'.repeat(32) as ModelHash;
const TABLE = `s_${'1'.repeat(24)}` as SurrogatesId;
const holes = maskFromSkippedLayers(8, { skipAttention: [1], skipFfn: [2] });

test('the id of plain skipping stays what it was', () => {
  expect(maskId(MODEL, maskFromBits(60, 'fffffffffffff7f'))).toBe('m_95ab924f6795f0f8decd5584');
});

test('surrogates change the id, another table changes it again, and dense stays dense', () => {
  const other = `s_${'2'.repeat(24)}` as SurrogatesId;
  const ids = [holes, withSurrogates(holes, TABLE), withSurrogates(holes, other)].map((mask) =>
    maskId(MODEL, mask),
  );
  expect(new Set(ids).size).toBe(3);
  expect(maskId(MODEL, withSurrogates(holes, null))).toBe(ids[0]);
  expect(maskId(MODEL, withSurrogates(denseMask(8), TABLE))).toBe(DENSE_MASK_ID);
  expect(TABLE).toMatch(SURROGATES_ID_PATTERN);
});

const set = (surrogates: string | undefined, mask: string, surrogate = surrogates !== undefined) => ({
  format: 'maskroute-mask-set-v1',
  name: 'test',
  model: { name: 'm', hash: MODEL, blockCount: 8 },
  encoder: { id: 'static', revision: '1', pooling: 'mean', dimensions: 1 },
  clusters: [{ centroid: [1], bits: 'd7', mask, share: 1 }],
  targetSparsity: 0.25,
  reachedSparsity: 0.25,
  surrogate,
  ...(surrogates === undefined ? {} : { surrogates }),
  learned: {},
  heldOut: {},
  createdAt: '2026-01-01T00:00:00.000Z',
});

test('a mask set names its table exactly when it uses surrogates, and its ids are checked with it', () => {
  const bits = maskFromBits(8, 'd7');
  const [plain, replaced] = [maskId(MODEL, bits), maskId(MODEL, withSurrogates(bits, TABLE))];
  const problems = (value: unknown) =>
    maskSetSchema.safeParse(value).error?.issues.map(({ message }) => message);
  expect(problems(set(undefined, plain))).toBeUndefined();
  expect(problems(set(TABLE, replaced))).toBeUndefined();
  expect(problems(set(TABLE, plain))?.[0]).toMatch(/its bits say/);
  expect(problems(set(undefined, replaced))?.[0]).toMatch(/its bits say/);
  expect(problems(set(undefined, plain, true))?.[0]).toMatch(/no table/);
  expect(problems(set(TABLE, replaced, false))?.[0]).toMatch(/uses none/);
  expect((maskSetSchema.parse(set(TABLE, replaced)) as MaskSet).surrogates).toBe(TABLE);
});

test('skipped layers are said as they were named', () => {
  const skipped = { skipAttention: [0, 3], skipFfn: [1] };
  expect(skippedLayers(maskFromSkippedLayers(8, skipped))).toEqual(skipped);
  for (const layer of [-1, 4, 0.5]) {
    expect(() => maskFromSkippedLayers(8, { skipAttention: [], skipFfn: [layer] })).toThrow(RangeError);
  }
});

test('the nearest centroid is that of the least Euclidean distance, the first of equals, among those allowed', () => {
  const rows = [
    [4, 3],
    [-4, 0],
    [4, 3],
    [0, 0],
  ];
  const centroids = packCentroids(rows);
  const vector = Float32Array.of(3, 4);
  const nearest = { cluster: 0, distance: Math.SQRT2, similarity: 24 / 25 };
  expect(nearestCentroid(vector, centroids)).toEqual(nearest);
  expect(nearestAllowed(vector, centroids, (cluster) => cluster > 0)).toEqual({ ...nearest, cluster: 2 });
  expect(nearestAllowed(vector, centroids, () => false)).toBeNull();
  const distances = rows.map(([x, y]) => Math.hypot(3 - x!, 4 - y!));
  expect([...centroidDistances(vector, centroids)]).toEqual(distances);
  // The zero vector has no direction.
  expect(nearestAllowed(vector, centroids, (cluster) => cluster === 3)!.similarity).toBe(0);
  expect(nearestAllowed(new Float32Array(2), centroids, (cluster) => cluster === 1)!.similarity).toBe(0);
});

test('vectors and centroids of different lengths are refused', () => {
  expect(() => packCentroids([[1, 2], [3]])).toThrow(RangeError);
  const centroids = packCentroids([[1, 2]]);
  for (const length of [1, 3]) {
    expect(() => nearestCentroid(new Float32Array(length), centroids)).toThrow(RangeError);
    expect(() => centroidDistances(new Float32Array(length), centroids)).toThrow(RangeError);
  }
  expect(() => nearestCentroid(new Float32Array(0), packCentroids([]))).toThrow(RangeError);
});
