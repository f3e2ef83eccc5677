/** Prompts into groups: what is held out stays out, small clusters borrow, collapse is told with its cause. */
import { describe, expect, it } from 'vitest';
import { finish, finishInTurns } from '../../../../gpu-backend/event-loop.ts';
import { assignRows, embedRows } from '../../../../gpu-backend/learning/data/clusters.ts';
import { openEncoder } from '../../../../gpu-backend/learning/data/encoders.ts';
import { type Clusters, kMeans, packPoints } from '../../../../gpu-backend/learning/data/kmeans.ts';
import { groupPrompts } from '../../../../gpu-backend/learning/data/prompt-groups.ts';
import {
  type CalibrationRow,
  distinctRows,
  parseRow,
} from '../../../../gpu-backend/learning/data/read-data.ts';
import { routingHealth, silhouette } from '../../../../gpu-backend/learning/data/routing-health.ts';
import { HELD_OUT_SHARE, splitRows } from '../../../../gpu-backend/learning/data/samples.ts';
import { createRandom } from '../../../../gpu-backend/random.ts';
import { testHome } from '../../../support/installed-model.ts';

const row = (text: string, kind = 'k') => parseRow(JSON.stringify({ text, kind }), kind, 'f:1');
const rows = [
  ...Array.from({ length: 300 }, (_, i) => row(`What is ${i} plus ${3 * i}?`, 'sums')),
  ...Array.from({ length: 60 }, (_, i) =>
    row(`Réservez une chambre d'hôtel à Paris, numéro ${i}.`, 'french'),
  ),
];
const { encoder } = await openEncoder('static', {
  home: testHome,
  threads: 1,
  hooks: { onProgress: () => {}, log: () => {} },
});
const texts = (some: readonly { routeText: string }[]) => new Set(some.map(({ routeText }) => routeText));

describe('the held-out split', () => {
  it('goes by the prompt, not by its place', () => {
    const doubled = Array.from({ length: 400 }, (_, i) => row(`prompt ${i % 200}`));
    const { fit, heldOut } = finish(splitRows(doubled, 0.1));
    expect([...texts(fit)].filter((text) => texts(heldOut).has(text))).toEqual([]);
    expect(heldOut.length).toBeGreaterThan(15);
    expect(heldOut.length).toBeLessThan(90);
    expect(texts(finish(splitRows(doubled.toReversed(), 0.1)).heldOut)).toEqual(texts(heldOut));
    expect(finish(distinctRows(doubled))).toHaveLength(200);
  });

  it.each<[string, (rows: readonly CalibrationRow[]) => Generator<void, unknown>]>([
    ['of repeated rows', distinctRows],
    ['of held-out rows', (some) => splitRows(some, 0.1)],
  ])('and the search %s hear Ctrl-C: with millions of rows they take seconds', async (_, search) => {
    const stop = new AbortController();
    const many = Array.from({ length: 20_000 }, (_, i) => rows[i % rows.length]!);
    setImmediate(() => stop.abort(new Error('Ctrl-C')));
    await expect(finishInTurns(search(many), stop.signal)).rejects.toThrow('Ctrl-C');
  });

  it('keeps prompts of search, choice and held-out figures apart, and knows the cluster of each', async () => {
    const {
      everybody,
      clusterOf,
      clusters,
      positions,
      rows: counts,
    } = await groupPrompts(rows, encoder, 3, 1);
    const [search, choice, heldOut] = [everybody.search, everybody.choice, everybody.heldOut].map(texts);
    expect(heldOut!.size).toBe(counts.heldOut);
    expect(search!.size + choice!.size).toBe(counts.fit);
    for (const text of choice!) expect(search!.has(text) || heldOut!.has(text)).toBe(false);
    for (const text of search!) expect(heldOut!.has(text)).toBe(false);
    const fit = [...everybody.search, ...everybody.choice];
    for (const [cluster, size] of clusters.sizes.entries())
      expect(fit.filter((row) => clusterOf.get(row) === cluster)).toHaveLength(size);
    for (const row of everybody.heldOut) expect(clusterOf.get(row)).toBeLessThan(3);
    expect(positions).toHaveLength(3);
  });

  it('places centroids by a part of many prompts, and knows the cluster of each', async () => {
    const many = Array.from({ length: 40_000 }, (_, i) => row(`${i}`));
    const onCircle = {
      spec: encoder.spec,
      embed: async (batch: readonly string[]) =>
        batch.map((text) => Float32Array.of(Math.sin(Number(text)), Math.cos(Number(text)))),
    };
    const { clusters, rows: counts } = await groupPrompts(many, onCircle, 8, 1);
    expect(clusters.assignment).toHaveLength(counts.fit);
    expect(counts.fit).toBeGreaterThan(2 ** 15);
    // Eight arcs of similar length.
    expect(Math.min(...clusters.sizes)).toBeGreaterThan(counts.fit / 16);
  });

  it('stops between pieces of the work: no piece leaves Ctrl-C unheard for long', async () => {
    const many = Array.from({ length: 20_000 }, (_, i) => row(`${i}`));
    const stoppedWhile = async (encode: (text: string) => Float32Array, rows: typeof many) => {
      const stop = new AbortController();
      let texts = 0;
      const soon = {
        spec: encoder.spec,
        embed: async (batch: readonly string[], signal?: AbortSignal) => {
          signal?.throwIfAborted();
          if (texts === 0) setImmediate(() => stop.abort(new Error('stopped')));
          texts += batch.length;
          return batch.map(encode);
        },
      };
      await expect(groupPrompts(rows, soon, 64, 1, stop.signal)).rejects.toThrow('stopped');
      return texts;
    };
    const onCircle = (text: string) => Float32Array.of(Math.sin(Number(text)), Math.cos(Number(text)));
    expect(await stoppedWhile(onCircle, many)).toBeLessThan(many.length);
    // One batch is all of these, so they are clustered when the signal comes.
    expect(await stoppedWhile(onCircle, many.slice(0, 1000))).toBeLessThanOrEqual(1000);
  });

  it('refuses data of which all is held out', async () => {
    const heldOut = finish(splitRows(rows, HELD_OUT_SHARE)).heldOut.slice(0, 1);
    await expect(groupPrompts(heldOut, encoder, 1, 1)).rejects.toMatchObject({
      code: 'invalid_data',
      message: expect.stringContaining('all rows (1) are held out'),
    });
  });

  it('auto takes fine clusters where there are prompts enough, and fewer where there are not', async () => {
    const many = Array.from({ length: 460 }, (_, i) => row(`Tell me about number ${i} and ${(7 * i) % 31}.`));
    const counted = async (some: typeof rows) =>
      (await groupPrompts(some, encoder, 'auto', 1)).counts.map((one) => one.clusters);
    expect(await counted(many)).toEqual([16]);
    expect(await counted(many.slice(0, 70))).toEqual([2]);
    expect(await counted(many.slice(0, 20))).toEqual([]);
  });

  it('auto takes no more clusters than there are distinct prompts', async () => {
    const again = Array.from({ length: 600 }, (_, i) =>
      parseRow(JSON.stringify({ question: `What is ${i % 6}?`, answer: `Answer ${i}.` }), 'k', 'f:1'),
    );
    const { clusters } = await groupPrompts(again, encoder, 'auto', 1);
    expect(clusters.sizes.length).toBeGreaterThan(1);
    expect(clusters.sizes.length).toBeLessThanOrEqual(6);
    const same = again.filter((_, i) => i % 6 === 1);
    expect((await groupPrompts(same, encoder, 'auto', 1)).clusters.sizes).toHaveLength(1);
  });

  it('auto takes the number of clusters that stand apart', async () => {
    const { clusters, counts } = await groupPrompts(rows, encoder, 'auto', 1);
    expect(counts.map((one) => one.clusters)).toEqual([2, 4, 8]);
    const worth = counts.map(({ silhouette, balance }) => silhouette * balance);
    expect(clusters.sizes.length).toBe(counts[worth.indexOf(Math.max(...worth))]!.clusters);
    // Judged on prompts that the clusters were not made from.
    const { heldOut } = finish(splitRows(rows, HELD_OUT_SHARE));
    const largest = (of: Uint16Array, k: number) =>
      Math.max(...Array.from({ length: k }, (_, c) => of.filter((one) => one === c).length)) / of.length;
    const { clusters: two } = await groupPrompts(rows, encoder, 2, 1);
    expect(counts[0]!.largestShare).toBe(
      largest(finish(assignRows(await embedRows(heldOut, encoder), two)), 2),
    );
  });
});

describe('routing health', () => {
  const random = createRandom(3);
  const cloud = (x: number, count: number, spread: number) =>
    Array.from({ length: count }, () =>
      Float32Array.of(x + spread * random.normal(), spread * random.normal()),
    );
  const health = (points: Float32Array[], clusterCount: number) => {
    const packed = packPoints(points);
    return routingHealth(packed, kMeans(packed, { clusterCount, seed: 1 }), 1);
  };

  it('two clouds far apart are balanced, and nothing has collapsed', () => {
    const found = health([...cloud(0, 50, 0.1), ...cloud(5, 50, 0.1)], 2);
    expect(found).toMatchObject({ largestShare: 0.5, entropy_bits: 1, balance: 1, collapse: null });
    expect(found.silhouette).toBeGreaterThan(0.9);
  });

  it('one cloud with an outlier has collapsed', () => {
    const found = health([...cloud(0, 99, 0.1), Float32Array.of(50, 0)], 2);
    expect(found.largestShare).toBeCloseTo(0.99, 9);
    expect(found.collapse).toMatch(/^99 % of the prompts go to one cluster: the data are nearly of one kind/);
  });

  it('clusters that an encoder hardly tells apart have collapsed for another cause', () => {
    const points = packPoints([...cloud(0, 90, 1), ...cloud(0, 10, 1)]);
    const clusters: Clusters = {
      dimensions: 2,
      centroids: Float32Array.of(0, 0, 0.05, 0),
      assignment: Uint16Array.from({ length: 100 }, (_, i) => (i < 90 ? 0 : 1)),
      sizes: Uint32Array.of(90, 10),
      inertia: 200,
    };
    const { collapse } = routingHealth(points, clusters, 1);
    expect(collapse).toMatch(/^90 % of the prompts go to one cluster, and centroids 0 and 1 nearly coincide/);
  });

  it('the silhouette is that of its definition', () => {
    const points = packPoints([0, 1, 5, 7].map((x) => Float32Array.of(x)));
    // (b − a) / max(a, b) of 0, 1 | 5, 7.
    const expected = ((6 - 1) / 6 + (5 - 1) / 5 + (4.5 - 2) / 4.5 + (6.5 - 2) / 6.5) / 4;
    expect(silhouette(points, [0, 0, 1, 1], 2, 1)).toBeCloseTo(expected, 6);
  });
});
