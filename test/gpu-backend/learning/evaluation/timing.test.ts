/** Times of counts that were not measured, and the mask that is as fast as another. */
import { describe, expect, it } from 'vitest';
import type { Removal } from '../../../../gpu-backend/learning/evaluation/baselines/static-orders.ts';
import { maskAlong } from '../../../../gpu-backend/learning/evaluation/baselines/static-orders.ts';
import type { Contestant } from '../../../../gpu-backend/learning/evaluation/contestants.ts';
import type { LineUp } from '../../../../gpu-backend/learning/evaluation/line-up.ts';
import { equalTimeContestants } from '../../../../gpu-backend/learning/evaluation/line-up.ts';
import { firstAsFast, timePlane, weightPoints } from '../../../../gpu-backend/learning/evaluation/timing.ts';
import { countsOf } from '../../../../gpu-backend/learning/search/budget.ts';
import { TINY_CONFIG } from '../../../support/random-llama.ts';

const time = ({ attention, ffn }: { attention: number; ffn: number }) => 10 - 0.05 * attention - 0.2 * ffn;
const point = (attention: number, ffn: number) => ({ attention, ffn, ms: time({ attention, ffn }) });

describe('times of counts', () => {
  it('lie on the plane through those that were measured', () => {
    const predict = timePlane([point(0, 0), point(8, 0), point(4, 4), point(15, 0), point(8, 8)]);
    expect(predict({ attention: 10, ffn: 3 })).toBeCloseTo(time({ attention: 10, ffn: 3 }), 4);
  });

  it('save what their weights are worth where nothing was measured', () => {
    const predict = timePlane([{ attention: 0, ffn: 0, ms: 10 }, ...weightPoints(TINY_CONFIG, 10)]);
    expect(predict({ attention: 0, ffn: 2 })).toBeLessThan(predict({ attention: 2, ffn: 0 }));
    expect(predict({ attention: 2, ffn: 0 })).toBeLessThan(10);
  });
});

describe('a method at a time', () => {
  const order = [
    [0, 1],
    [2, 3],
    [4, 5],
    [6, 7],
  ];
  const along = order.map((_, i) => maskAlong(order, 2 * (i + 1), 8));

  it('has as few blocks out as make it no slower', () => {
    expect(countsOf(firstAsFast(along, time({ attention: 2, ffn: 2 }), time)!)).toEqual({
      attention: 2,
      ffn: 2,
    });
    expect(countsOf(firstAsFast(along, 9.4, time)!)).toEqual({ attention: 3, ffn: 3 });
  });

  it('is left out when all of it is slower', () => {
    expect(firstAsFast(along, 1, time)).toBeUndefined();
  });
});

it('a static method with the counts of a learned mask is as fast as it, whatever was measured', () => {
  const blockCount = 8;
  const learned: Contestant = {
    method: 'learned',
    matched: 'count',
    maskSet: 'v',
    clusters: 2,
    targetSparsity: 0.25,
    surrogate: false,
    evaluations: null,
    // Two attention blocks out for each row, not the same ones.
    masks: [[maskAlong([[0], [2]], 2, blockCount)], [maskAlong([[2], [6]], 2, blockCount)]],
  };
  const attention: Removal = { order: [[6], [4], [2], [0]], evaluations: 1 };
  const lineUp: LineUp = {
    rowCount: 2,
    blockCount,
    sets: [],
    baselines: ['finercut'],
    sparsities: [0.25],
    flavours: [null],
    orders: new Map([[null, new Map([['finercut', [attention]]])]]),
  };
  const slope_ms = 0.2;
  const [found] = equalTimeContestants(lineUp, [learned], () => (counts) => 10 - slope_ms * counts.attention);
  expect(found).toMatchObject({ method: 'finercut', matched: 'time', maskSet: 'v' });
  expect(found!.masks.flat().map(countsOf)).toEqual(Array(2).fill({ attention: 2, ffn: 0 }));
});
