// What a mask's id depends on: model, blocks, and the table of surrogates if there is one.
import { expect, test } from 'vitest';
import {
  DENSE_MASK_ID,
  denseMask,
  type ModelHash,
  maskFromBits,
  maskFromSkippedLayers,
  maskId,
  SURROGATES_ID_PATTERN,
  type SurrogatesId,
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
