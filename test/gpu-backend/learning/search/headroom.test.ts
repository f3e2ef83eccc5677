/** What routing gains and could gain, against figures worked out by hand. */
import { describe, expect, it } from 'vitest';
import {
  type HeadroomRow,
  headroomLines,
  headroomOf,
  leads,
} from '../../../../gpu-backend/learning/search/headroom.ts';
import { headroomSchema } from '../../../../shared/mask/held-out.ts';

const row = (kind: string, kl: number[], routed: number, lighter: number[] = []): HeadroomRow => ({
  kind,
  kl,
  routed,
  lighter,
  positions: 10,
  // Both halves of a prompt agree.
  klEven: kl.map((sum) => sum / 2),
});
const rows = [
  row('math', [5, 4], 1, [4.5, 4]),
  row('math', [5, 3], 1, [4.5, 4]),
  row('chat', [4, 6], 0, [3.5, 3]),
  row('chat', [4, 3], 0, [3.5, 3]),
];

describe('headroom', () => {
  it('has the KL of one mask, of routing, of the best afterwards, and by kind', () => {
    const found = headroomOf(rows);
    expect(headroomSchema.parse(found)).toEqual(found);
    expect(found).toMatchObject({ rows: 4, positions: 40, masks: 2 });
    expect(found.oneMask.kl).toBeCloseTo(18 / 40, 12);
    expect(found.routed.kl).toBeCloseTo(15 / 40, 12);
    expect(found.routed.change).toBeCloseTo(-3 / 18, 12);
    expect(found.bestAfterwards.kl).toBeCloseTo(14 / 40, 12);
    // Each is judged by the other row of its kind: both of math by mask 1, the chats by masks 1 and 0.
    expect(found.byKind.kl).toBeCloseTo((4 + 3 + 6 + 4) / 40, 12);
    expect(found.lead.mean_kl).toBeCloseTo(3 / 40, 12);
    const [low, high] = found.routed.changeInterval!;
    expect(low).toBeLessThan(-3 / 18);
    expect(high).toBeGreaterThanOrEqual(-3 / 18);
    expect(found.oneMask.changeInterval).toEqual([0, 0]);
  });

  it('has the best mask of each half of a prompt, known from the other half', () => {
    // The first prompt is better under mask 1 throughout; the second in its first half only, which is noise.
    const halves = [
      { ...row('a', [6, 4], 0), klEven: [3, 2] },
      { ...row('b', [6, 7], 0), klEven: [3, 1] },
    ];
    const found = headroomOf(halves);
    expect(found.bestAfterwards.kl).toBeCloseTo((4 + 6) / 20, 12);
    // Of the second, the first half is judged under mask 0 and the second half under mask 1.
    expect(found.bestByOtherHalf.kl).toBeCloseTo((4 + 3 + 6) / 20, 12);
    expect(found.bestByOtherHalf.change).toBeCloseTo(13 / 12 - 1, 12);
    // Where halves agree, nothing is noise.
    expect(headroomOf(rows).bestByOtherHalf).toEqual(headroomOf(rows).bestAfterwards);
    // A single position has no other half: it says nothing of its masks.
    const one = { ...row('a', [6, 4], 0), positions: 1, klEven: [6, 4] };
    expect(headroomOf([one]).bestByOtherHalf.kl).toBe(6);
    expect(headroomLines(found).join('\n')).toMatch(/best by the other half +KL 0\.6500 \[/);
  });

  it('says in blocks what routing gains', () => {
    // One mask comes from 18 to 16 with a block fewer out, and to 14 with two.
    expect(headroomOf(rows).blocks!.gained).toBeCloseTo(1.5, 12);
    const worse = rows.map((one) => ({ ...one, routed: one.kind === 'chat' ? 1 : 0 }));
    // Routing to the wrong mask costs 19: half a block more would cost as much.
    expect(headroomOf(worse).blocks).toEqual({ gained: -0.5, isMore: false });
    const same = rows.map((one) => ({ ...one, routed: 0 }));
    expect(headroomOf(same).blocks).toEqual({ gained: 0, isMore: false });
    const short = rows.map((one) => ({ ...one, lighter: one.lighter.slice(0, 1) }));
    expect(headroomOf(short).blocks).toEqual({ gained: 1, isMore: true });
    expect(headroomOf(rows.map((one) => ({ ...one, lighter: [] }))).blocks).toBeNull();
    // Where a block fewer out does not help, no number of blocks says how much worse routing is.
    expect(headroomOf(worse.map((one) => ({ ...one, lighter: [6, 7] }))).blocks).toBeNull();
  });

  it('of masks that cost nothing is no change', () => {
    const found = headroomOf(rows.map((one) => ({ ...one, kl: [0, 0], klEven: [0, 0] })));
    expect(headroomSchema.parse(found)).toEqual(found);
    expect(found.routed).toMatchObject({ kl: 0, change: 0, changeInterval: [0, 0] });
  });

  it('is none where each mask costs as much as one mask of its size, whichever rows are drawn', () => {
    const skipped = { masks: [0.5, 0.25, 0.75], lighter: [0.25] };
    const sized = [1, 2, 1, 2].map((routed) => row('a', [10, 5, 15], routed, [5]));
    const { lead, routed } = headroomOf(sized, skipped);
    expect(lead.mean_kl).toBeCloseTo(0, 12);
    // A row under a mask that skips more is no sign of chance.
    expect(lead.standardError_kl).toBeCloseTo(0, 12);
    for (const change of [routed.change, ...routed.changeInterval!]) expect(change).toBeCloseTo(0, 12);
  });

  it('has a price for what masks skip by the position: a long row pays more', () => {
    const skipped = { masks: [0.5, 0.25, 0.75], lighter: [] };
    const [short, long] = [row('a', [10, 7, 14], 0), { ...row('a', [30, 27, 34.5], 0), positions: 30 }];
    // For what it skips more, the long row loses least a position; the short one can then skip less.
    expect(headroomOf([short, long], skipped).bestAfterwards.kl).toBeCloseTo((7 + 34.5) / 40, 12);
  });

  it('with masks of several sizes holds routing against one mask that is as light', () => {
    // One mask leaves out a half, mask 1 nothing; a block fewer out leaves out a quarter.
    const skipped = { masks: [0.5, 0], lighter: [0.25] };
    const sized = [row('a', [8, 0], 1, [4]), row('b', [2, 0], 0, [1]), row('b', [2, 0], 0, [1])];
    const found = headroomOf(sized, skipped);
    expect(headroomSchema.parse(found)).toEqual(found);
    // Routing leaves out a third: a third of the way from 0.25 to 0.5, where one mask costs 6 and 12.
    expect(found.skipped!.routed).toBeCloseTo(1 / 3, 12);
    expect(found.skipped!.oneMask).toBe(0.5);
    expect(found.oneMask.kl).toBeCloseTo(8 / 30, 12);
    expect(found.oneMask).toMatchObject({ change: 0, changeInterval: [0, 0] });
    expect(found.routed.kl).toBeCloseTo(4 / 30, 12);
    // No mask leaves out more than one mask, so none of the prompts may leave out less.
    expect(found.bestAfterwards.kl).toBeCloseTo(12 / 30, 12);
    expect(headroomLines(found).join('\n')).toContain('routing leaves out 33.3 %');
    // Where routing leaves out more, one mask would go on costing as much for each block.
    const heavier = headroomOf(
      sized.map((one) => ({ ...one, routed: 1 })),
      { masks: [0.25, 0.5], lighter: [0.125] },
    );
    expect(heavier.oneMask.kl).toBeCloseTo((12 + 12) / 30, 12);
    expect(headroomOf(rows, { masks: [0.5, 0.5], lighter: [0.25, 0.125] }).skipped).toBeUndefined();
    // A record whose lighter masks are none says nothing by them.
    const wrong = headroomOf(sized, { masks: [0.5, 0], lighter: [0.5] });
    expect(wrong.oneMask.kl).toBeCloseTo(8 / 30, 12);
    expect(Number.isFinite(wrong.lead.mean_kl)).toBe(true);
  });

  it('a single row leads nobody', () => {
    const found = headroomOf(rows.slice(0, 1));
    expect(found.lead.standardError_kl).toBeNull();
    expect(leads(found)).toBe(false);
    expect(found.routed.interval).toBeNull();
    // Alone in its kind, a row says nothing of its kind.
    expect(found.byKind.kl).toBe(found.oneMask.kl);
  });

  it('a lead within its error is none', () => {
    expect(leads(headroomOf(rows))).toBe(true);
    const mixed = rows.map((one, i) => ({ ...one, kl: [5, i % 2 === 0 ? 1 : 8.9], routed: 1 }));
    expect(headroomOf(mixed).lead.mean_kl).toBeGreaterThan(0);
    expect(leads(headroomOf(mixed))).toBe(false);
    expect(() => headroomOf([])).toThrow(RangeError);
  });

  it('is printed with intervals and blocks', () => {
    const text = headroomLines(headroomOf(rows)).join('\n');
    expect(text).toMatch(/one mask for all +KL 0\.4500 \[/);
    expect(text).toMatch(/routing +KL 0\.3750 \[.*\] {2}-16\.7 % \[/);
    expect(text).toContain('At the routed KL one mask leaves out 1.5 blocks fewer.');
    expect(text).not.toContain('NaN');
  });
});
