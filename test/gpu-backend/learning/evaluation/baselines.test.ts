/** Every static baseline on a small model against its definition written down in plain loops. */
import { afterAll, beforeAll, describe, expect, it, vi } from 'vitest';
import { searchOrders } from '../../../../gpu-backend/learning/evaluation/baselines/search-orders.ts';
import {
  candidatesAStep,
  greedyRemoval,
  maskAlong,
  staticOrders,
} from '../../../../gpu-backend/learning/evaluation/baselines/static-orders.ts';
import type { StaticMethod } from '../../../../gpu-backend/learning/evaluation/result.ts';
import { scoreRows } from '../../../../gpu-backend/learning/evaluation/score-rows.ts';
import { maskWithout } from '../../../../gpu-backend/learning/search/budget.ts';
import type { SampleScores, Scorer } from '../../../../gpu-backend/learning/search/score-masks.ts';
import { addScores } from '../../../../gpu-backend/learning/search/score-masks.ts';
import { CPU, type Device } from '../../../../gpu-backend/onnx/device.ts';
import { denseMask, type Mask, maskBits } from '../../../../shared/mask/mask.ts';
import { naiveModel, naiveScores } from './naive-scores.ts';
import { openTinyScorer, SAMPLES, type TinyHome, tinyHome } from './tiny.ts';

const LAYERS = 4;
const BLOCKS = 2 * LAYERS;
const OUT = 3;
/** Plain loops take a second, and many times that on a machine that is busy. */
const PATIENT = { timeout: 60_000 };

let tiny: TinyHome;
let orders: Map<StaticMethod, readonly (readonly number[])[]>;
let evaluations: Map<StaticMethod, number>;

beforeAll(async () => {
  tiny = await tinyHome();
  await using open = await openTinyScorer(tiny);
  const methods = ['shortgpt', 'llm-drop', 'sleb', 'blockpruner', 'finercut', 'last-k', 'random'] as const;
  const { home, model } = tiny;
  const found = await searchOrders(
    { evaluated: { home, model, threads: 1 }, scorer: open.scorer, samples: SAMPLES },
    { methods, flavours: [null], skipCountMax: OUT, evaluationsMax: 1000 },
    { onEvaluation: () => {} },
  );
  const removals = [...found.get(null)!];
  orders = new Map(removals.map(([method, [first]]) => [method, first!.order]));
  evaluations = new Map(removals.map(([method, [first]]) => [method, first!.evaluations]));
}, 60_000);
afterAll(() => tiny[Symbol.dispose]());

/** The residual stream before each block and after the last, of every token. */
async function naiveStreams(): Promise<Float64Array[][]> {
  const tokens: Float64Array[][] = [];
  for (const { tokenIds } of SAMPLES) {
    const model = await naiveModel();
    for (const id of tokenIds) {
      const streams: Float64Array[] = [];
      model.next(id, denseMask(BLOCKS), (stream) => streams.push(stream.slice()));
      tokens.push(streams);
    }
  }
  return tokens;
}

function cosine(a: Float64Array, b: Float64Array): number {
  const dot = (x: Float64Array, y: Float64Array) => x.reduce((sum, value, i) => sum + value * y[i]!, 0);
  return dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b));
}

/** Units by the mean cosine of the stream before and after them, the most alike first. */
function mostAlike(tokens: Float64Array[][], spans: readonly (readonly [number, number])[]): number[] {
  const means = spans.map(
    ([from, to]) =>
      tokens.reduce((sum, streams) => sum + cosine(streams[from]!, streams[to]!), 0) / tokens.length,
  );
  return spans.map((_, i) => i).sort((a, b) => means[b]! - means[a]!);
}

const known = new Map<string, Promise<SampleScores>>();
/** Plain loops over both samples, once a mask. */
function naiveCosts(mask: Mask): Promise<SampleScores> {
  const bits = maskBits(mask);
  const costs =
    known.get(bits) ?? Promise.all(SAMPLES.map((sample) => naiveScores(sample, mask))).then(addScores);
  known.set(bits, costs);
  return costs;
}

/** Exhaustive greedy search by plain loops. */
async function naiveGreedy(units: number[][], steps: number, by: 'kl' | 'loss'): Promise<number[][]> {
  const out: number[][] = [];
  for (let step = 0; step < steps; step++) {
    let best: { unit: number[]; cost: number } | undefined;
    for (const unit of units.filter((candidate) => !out.includes(candidate))) {
      const mask = maskWithout(BLOCKS, [...out, unit].flat());
      const cost = (await naiveCosts(mask))[by];
      if (best === undefined || cost < best.cost) best = { unit, cost };
    }
    out.push(best!.unit);
  }
  return out;
}

const layer = (index: number) => [2 * index, 2 * index + 1];
const blocks = Array.from({ length: BLOCKS }, (_, block) => [block]);

it('what one device answered is not taken for what another would', async () => {
  let asked = 0;
  const scores = { positions: 1, kl: 0, klEven: 0, equalTops: 1, loss: 1 };
  const scorer = {
    reference: async () => {
      asked++;
      return { scores };
    },
  } as unknown as Scorer;
  const score = async (device: Device) => {
    const evaluated = { home: tiny.home, model: tiny.model, threads: 1, device };
    const samples = SAMPLES.slice(0, 1);
    await scoreRows({ evaluated, scorer, samples, onProgress: () => {} }, [[denseMask(BLOCKS)]]);
    return asked;
  };
  const gpu = { kind: 'webgpu', adapter: 'a card', isSoftware: false } as const;
  const before = await score(CPU);
  expect(await score(CPU)).toBe(before);
  expect(await score({ ...gpu, floatType: 'f32' })).toBe(before + 1);
  expect(await score({ ...gpu, floatType: 'f16' })).toBe(before + 2);
  expect(await score({ ...gpu, floatType: 'f16' })).toBe(before + 2);
});

describe('static baselines', () => {
  it('ShortGPT: layers by block influence, 1 − cos(in, out)', async () => {
    const spans = Array.from({ length: LAYERS }, (_, i) => [2 * i, 2 * i + 2] as const);
    expect(orders.get('shortgpt')).toEqual(mostAlike(await naiveStreams(), spans).map(layer));
  });

  it('LLM-Drop: attention blocks by cosine, their residual included', async () => {
    const spans = Array.from({ length: LAYERS }, (_, i) => [2 * i, 2 * i + 1] as const);
    expect(orders.get('llm-drop')).toEqual(mostAlike(await naiveStreams(), spans).map((i) => [2 * i]));
  });

  it('SLEB: greedy over layers by loss, the first and the last stay', PATIENT, async () => {
    expect(orders.get('sleb')).toEqual(await naiveGreedy([layer(1), layer(2)], 2, 'loss'));
    expect(evaluations.get('sleb')).toBe(3);
  });

  it('SLEB takes nothing out of one layer or two, which it leaves alone', async () => {
    const context = { skipCountMax: 2, evaluationsMax: 9, similarities: vi.fn(), costs: vi.fn() };
    for (const layerCount of [1, 2])
      expect(await staticOrders('sleb', { ...context, layerCount })).toEqual([{ order: [], evaluations: 0 }]);
    expect(maskBits(maskAlong([], 1, 4))).toBe('f');
  });

  it('BlockPruner: greedy over blocks by loss', PATIENT, async () => {
    expect(orders.get('blockpruner')).toEqual(await naiveGreedy(blocks, OUT, 'loss'));
    expect(evaluations.get('blockpruner')).toBe(8 + 7 + 6);
  });

  it('FinerCut: greedy over blocks by KL', PATIENT, async () => {
    expect(orders.get('finercut')).toEqual(await naiveGreedy(blocks, OUT, 'kl'));
  });

  it('last-k: the deepest layers; random: every block once', () => {
    expect(orders.get('last-k')).toEqual([3, 2, 1, 0].map(layer));
    expect(orders.get('random')!.flat().sort()).toEqual(blocks.flat());
  });

  it('layer methods meet an odd count at the next whole layer', () => {
    const bits = (count: number) => maskBits(maskAlong([layer(3), layer(2)], count, BLOCKS));
    expect([1, 2, 3, 4].map(bits)).toEqual(['fc', 'fc', 'f0', 'f0']);
  });
});

describe('a greedy search on a budget', () => {
  const costs = [5, 1, 4, 2, 3, 9, 8, 7];
  const search = (evaluationsMax: number) =>
    greedyRemoval({
      blockCount: BLOCKS,
      units: blocks,
      steps: 4,
      evaluationsMax,
      cost: async ({ runs }) => costs.reduce((sum, cost, block) => sum + (runs[block] === 0 ? cost : 0), 0),
    });

  it('takes no more evaluations than it has', async () => {
    expect((await search(1000)).evaluations).toBe(8 + 7 + 6 + 5);
    expect((await search(14)).evaluations).toBe(14);
    expect((await search(14)).order).toEqual((await search(1000)).order);
  });

  it('tries equally many candidates at each step', () => {
    expect(candidatesAStep(60, 15, 400)).toBe(24);
    expect(candidatesAStep(60, 24, 10_000)).toBe(60);
    // At least one, though so small a budget hardly searches.
    expect(candidatesAStep(60, 24, 10)).toBe(1);
  });
});
