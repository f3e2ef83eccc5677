/**
 * Masks and clusters learned together on a model whose costs are known: every kind of prompt has a price for each block
 * that is out. Searches, turns, the choice and the held-out decision are the real ones.
 */
import { describe, expect, it } from 'vitest';
import { groupPrompts, type Prompts } from '../../../../gpu-backend/learning/data/prompt-groups.ts';
import type { CalibrationRow } from '../../../../gpu-backend/learning/data/read-data.ts';
import { parseRow } from '../../../../gpu-backend/learning/data/read-data.ts';
import type { Sample } from '../../../../gpu-backend/learning/data/samples.ts';
import type { SampleBatch } from '../../../../gpu-backend/learning/gates/batches.ts';
import { createBudget, maskWithout } from '../../../../gpu-backend/learning/search/budget.ts';
import { type LearnEffort, withoutSearch } from '../../../../gpu-backend/learning/search/effort.ts';
import { learnMasks } from '../../../../gpu-backend/learning/search/learn-masks.ts';
import {
  type LearnProgress,
  planStages,
  trackProgress,
} from '../../../../gpu-backend/learning/search/progress.ts';
import type { TextMaker } from '../../../../gpu-backend/learning/search/texts.ts';
import { createWorkbench } from '../../../../gpu-backend/learning/search/workbench.ts';
import { createRandom } from '../../../../gpu-backend/random.ts';
import type { Encoder } from '../../../../shared/embedding/encoder.ts';
import { type Mask, maskBits } from '../../../../shared/mask/mask.ts';
import { SMALL_EFFORT } from '../small-run.ts';

const LAYERS = 4;
const BLOCKS = 2 * LAYERS;
const POSITIONS = 50;
const any = { min: 0, max: LAYERS };
const budget = createBudget({
  layerCount: LAYERS,
  targetSparsity: 0.25,
  attention: any,
  ffn: any,
  weights: { attention: 1, ffn: 1 },
});

/** Text enough for all rows. */
const EFFORT = {
  ...SMALL_EFFORT,
  sharePositions: 5000,
  heldOutPositions: 5000,
  compose: { masks: 0, blocks: 0, positions: 0 },
};

type StageProgress = Extract<LearnProgress, { work: unknown }>;

/** Nats that each block costs a kind while it is out. */
type Prices = Readonly<Record<string, readonly number[]>>;
const DIFFERENT: Prices = {
  sums: [0.1, 0.1, 0.9, 0.9, 0.6, 0.6, 0.6, 0.6],
  trips: [0.9, 0.9, 0.1, 0.1, 0.6, 0.6, 0.6, 0.6],
};
/** All blocks but four cost the same; trips cost five times as much. */
const TOLERANT = [0.1, 0.1, 0.12, 0.12, 0.2, 0.2, 0.2, 0.2];
const FRAGILE: Prices = { sums: TOLERANT, trips: TOLERANT.map((price) => 5 * price) };
const EQUAL: Prices = { sums: DIFFERENT.sums!, trips: DIFFERENT.sums! };

/** More kinds than masks are searched for, and what composes masks for them. */
const THREE = {
  kinds: ['sums', 'trips', 'walks'],
  prices: { ...DIFFERENT, walks: [0.6, 0.6, 0.6, 0.6, 0.1, 0.1, 0.9, 0.9] },
};
const COMPOSE = { masks: 4, blocks: BLOCKS, positions: 5000 };

/** The numbers of the stages; no stage comes back, and none does more than it said. */
function stagesInOrder(progress: readonly StageProgress[]): number[] {
  expect(progress.every(({ done, total, work }) => done <= total && work.done <= work.total)).toBe(true);
  const numbers = progress.map(({ at }) => at.number);
  expect(numbers).toEqual(numbers.toSorted((a, b) => a - b));
  return numbers;
}

/** Two kinds lie at two ends of a line and a third beside it, their prompts spread a little. */
const ENDS: Readonly<Record<string, number>> = { sums: 1, trips: -1, walks: 0 };
const encoder = {
  async embed(texts: readonly string[]) {
    return texts.map((text) => {
      const [kind, number] = text.split(' ');
      return Float32Array.of(ENDS[kind!]!, Number(number) / 100, kind === 'walks' ? 1 : 0);
    });
  },
} as unknown as Encoder;
const rowsOf = (kinds: readonly string[], count: number): CalibrationRow[] =>
  kinds.flatMap((kind) =>
    Array.from({ length: count }, (_, i) =>
      parseRow(JSON.stringify({ text: `${kind} ${i}`, kind }), kind, 'f:1'),
    ),
  );

function scripted(
  prompts: Prompts,
  { prices = DIFFERENT, spread = 0.05, known: masks }: Case,
  effort: LearnEffort,
) {
  const kindOf = new Map<Sample, CalibrationRow>();
  const sampleOf = new Map<CalibrationRow, Sample>();
  for (const row of prompts.clusterOf.keys()) {
    const sample = { tokenIds: new Int32Array(POSITIONS + 1), scoreFrom: 0 };
    kindOf.set(sample, row);
    sampleOf.set(row, sample);
  }
  const draw: TextMaker['draw'] = (_name, rows, positions) =>
    rows.slice(0, Math.ceil(positions / POSITIONS)).map((row) => ({ row, sample: sampleOf.get(row)! }));
  const rowsIn = new Map<SampleBatch, readonly CalibrationRow[]>();
  const texts: TextMaker = {
    draw,
    text(name, rows) {
      const batch = { scoredRows: new Int32Array(POSITIONS * rows.length) } as unknown as SampleBatch;
      rowsIn.set(batch, rows);
      return { name, batches: [batch] };
    },
  };
  const mean = (batch: SampleBatch, value: (kind: readonly number[]) => number) => {
    const rows = rowsIn.get(batch)!;
    return rows.reduce((sum, { kind }) => sum + value(prices[kind]!), 0) / rows.length;
  };
  const costOf = (kind: readonly number[], gates: ArrayLike<number>) =>
    kind.reduce((sum, price, block) => sum + price * (1 - gates[block]!), 0);
  const known = new Map<string, readonly number[]>();
  const progress: StageProgress[] = [];
  const plan = planStages(effort, {
    blocks: BLOCKS,
    groups: 2,
    batchTokens: POSITIONS,
    rowTokens: POSITIONS,
    known: masks?.length ?? 0,
    shareRows: prompts.everybody.choice.length,
    composeRows: prompts.everybody.search.length,
    heldOutRows: prompts.everybody.heldOut.length,
  });
  const onProgress = (one: LearnProgress) => {
    if ('done' in one) progress.push(one);
  };
  const track = trackProgress(onProgress, plan, () => known.size);
  const bench = createWorkbench({
    budget,
    seed: 1,
    signal: undefined,
    texts,
    onResult: track.onResult,
    journal: {
      async result(name, compute) {
        const values = known.get(name) ?? (await compute());
        known.set(name, values);
        return values;
      },
    },
    loss: async (batch, gates) => mean(batch, (kind) => costOf(kind, gates)),
    step: async (batch, gates) => ({
      loss: mean(batch, (kind) => costOf(kind, gates)),
      gradients: Float32Array.from({ length: BLOCKS }, (_, block) => mean(batch, (kind) => -kind[block]!)),
    }),
  });
  const score = async (sample: Sample, masks: readonly Mask[]) =>
    masks.map((mask) => {
      const { kind, routeText } = kindOf.get(sample)!;
      const noise = createRandom(
        [...`${routeText}${maskBits(mask)}`].reduce((h, c) => 31 * h + c.charCodeAt(0), 7) >>> 0,
      );
      const kl = costOf(prices[kind]!, mask.runs) + (mask.runs.includes(0) ? spread * noise.next() : 0);
      const sums = { kl: POSITIONS * kl, klEven: (POSITIONS / 2) * kl, loss: POSITIONS * (1 + kl) };
      return { positions: POSITIONS, equalTops: 1, ...sums };
    });
  return { bench, prompts, texts, score, track, atOnce: 1, effort, known: masks, progress };
}

type Case = {
  kinds?: string[];
  prices?: Prices;
  spread?: number;
  maskCount?: number;
  rows?: number;
  sizes?: number[];
  known?: Mask[];
  effort?: Partial<LearnEffort>;
};

async function learned({ kinds = ['sums', 'trips'], ...rest }: Case = {}) {
  const prompts = await groupPrompts(rowsOf(kinds, rest.rows ?? 60), encoder, 6, 1);
  const effort = { ...EFFORT, sizes: rest.sizes ?? [], ...rest.effort };
  const { progress, ...context } = scripted(prompts, rest, effort);
  return { prompts, progress, found: await learnMasks({ ...context, maskCount: rest.maskCount }) };
}

describe('masks and clusters', () => {
  it('of two kinds that need other blocks end with a mask for each kind', async () => {
    const { prompts, found } = await learned();
    const { reason, headroom, turns, validated } = found.sharing!;
    expect(reason).toBeNull();
    expect(found.masks.length).toBeGreaterThanOrEqual(2);
    for (const [row, cluster] of prompts.clusterOf) {
      const { runs } = found.masks[found.clusters[cluster]!]!.mask;
      const out = row.kind === 'sums' ? [0, 1] : [2, 3];
      expect([...runs.keys()].filter((block) => runs[block] === 0)).toEqual(out);
    }
    expect(headroom!.routed.change).toBeLessThan(-0.2);
    expect(headroom!.bestAfterwards.kl).toBeLessThanOrEqual(headroom!.routed.kl);
    expect(headroom!.blocks!.gained).toBeGreaterThan(0);
    expect(validated[1]!.kl).toBeLessThan(validated[0]!.kl);
    // The groups of the second turn were searched in the first.
    expect(turns).toBeLessThanOrEqual(EFFORT.turns);
  });

  it('tell the stage, its number, and how much of the whole is done', async () => {
    const { progress, found } = await learned();
    const numbers = stagesInOrder(progress);
    // Reading and embedding come before.
    expect([numbers[0], numbers.at(-1)]).toEqual([3, progress[0]!.at.count]);
    const stages = progress.map(({ stage, at }) => `${at.number} ${stage}`);
    const second = found.sharing!.turns === 2 ? ['6 masks', '7 share'] : [];
    const wanted = ['3 one mask', '4 masks', '5 share', ...second, '8 measure'];
    expect([...new Set(stages)]).toEqual(wanted);
    const work = progress.map(({ work: { done } }) => done);
    expect(work).toEqual(work.toSorted((a, b) => a - b));
    const { done, total } = progress.at(-1)!.work;
    expect(done).toBe(total);
  });

  it.each<[string, Case, RegExp]>([
    [
      'of kinds that need the same blocks',
      { prices: EQUAL },
      /^no (other mask|number of masks)|(took|added) .* nats (off|to)/,
    ],
    [
      'of one kind alone',
      { kinds: ['sums'] },
      /^no (other mask|number of masks)|(took|added) .* nats (off|to)/,
    ],
    [
      'that are told apart by noise',
      { prices: EQUAL, spread: 0.8 },
      /^no (other mask|number of masks)|(took|added) .* nats (off|to)/,
    ],
    ['where one mask was asked for', { maskCount: 1 }, /^one mask was asked for$/],
    ['where no prompt is held out', { rows: 4 }, /no prompt is held out|^no (other mask|number of masks)/],
  ])('%s share one mask, and say why', async (_what, given, why) => {
    const { found } = await learned(given);
    expect(found.sharing!.reason).toMatch(why);
    expect(found.masks).toHaveLength(1);
    expect(new Set(found.clusters)).toEqual(new Set([0]));
    expect(found.heldOut.every(({ learned, one }) => learned === one)).toBe(true);
  });

  it('of tolerant and fragile prompts get masks of several sizes, at the mean that was asked for', async () => {
    const { prompts, found, progress } = await learned({
      prices: FRAGILE,
      spread: 0.02,
      sizes: [0, 0.5, 1.5],
    });
    const { reason, headroom } = found.sharing!;
    expect(reason).toBeNull();
    const outOf = (kind: string) => {
      const rows = [...prompts.clusterOf].filter(([row]) => row.kind === kind);
      const out = rows.map(
        ([, cluster]) => found.masks[found.clusters[cluster]!]!.mask.runs.filter((bit) => bit === 0).length,
      );
      return out.reduce((sum, count) => sum + count, 0) / out.length;
    };
    expect(outOf('sums')).toBeGreaterThan(2);
    expect(outOf('trips')).toBeLessThan(2);
    expect((outOf('sums') + outOf('trips')) / 2).toBeGreaterThan(1.9);
    expect(headroom!.routed.change).toBeLessThan(-0.1);
    expect(headroom!.skipped!.oneMask).toBe(0.25);
    expect(progress.map(({ stage }) => stage)).toContain('sizes');
    stagesInOrder(progress);
  });

  it('of more kinds than masks are searched for get composed masks', async () => {
    const searched = await learned(THREE);
    const composed = await learned({ ...THREE, effort: { compose: COMPOSE } });
    const suited = ({ prompts, found }: typeof composed) =>
      new Set(
        [...prompts.clusterOf]
          .filter(([{ kind }, cluster]) => {
            const { runs } = found.masks[found.clusters[cluster]!]!.mask;
            const out = { sums: [0, 1], trips: [2, 3], walks: [4, 5] }[kind];
            return out!.every((block) => runs[block] === 0);
          })
          .map(([{ kind }]) => kind),
      ).size;
    expect(suited(searched)).toBeLessThan(3);
    expect(suited(composed)).toBe(3);
    expect(composed.found.sharing!.pool.map(({ source }) => source)).toContain('composed for some clusters');
    expect(composed.found.sharing!.headroom!.routed.change).toBeLessThan(
      searched.found.sharing!.headroom!.routed.change,
    );
    const { progress } = composed;
    expect(progress.map(({ stage }) => stage)).toContain('compose');
    stagesInOrder(progress);
  });

  it('begin with the masks of an earlier set: none are searched for, others are composed from them', async () => {
    const without = (...out: number[]) => maskWithout(BLOCKS, out);
    const { found, progress } = await learned({
      ...THREE,
      known: [without(0, 2), without(0, 1)],
      effort: withoutSearch({ ...EFFORT, compose: COMPOSE }),
    });
    expect(found.candidates.map(({ source, mask }) => [source, maskBits(mask)])).toEqual([
      ['the earlier set', maskBits(without(0, 2))],
    ]);
    const { pool, turns, reason } = found.sharing!;
    expect([turns, reason]).toEqual([0, null]);
    expect(new Set(pool.map(({ source }) => source))).toEqual(
      new Set(['the earlier set', 'composed for some clusters']),
    );
    const masks = found.masks.map(({ mask }) => maskBits(mask));
    for (const mask of [without(0, 1), without(2, 3), without(4, 5)]) expect(masks).toContain(maskBits(mask));
    expect([...new Set(progress.map(({ stage, at }) => `${at.number} ${stage}`))]).toEqual([
      ...['3 one mask', '4 share', '5 compose', '6 measure'],
    ]);
    expect(progress[0]!.at.count).toBe(6);
    stagesInOrder(progress);
  });

  it('no more masks than are asked for', async () => {
    const { found } = await learned({ maskCount: 2 });
    expect(found.masks).toHaveLength(2);
  });
});
