/** What the dashboard computes before it draws, and how its playground asks the edge. */
import { afterEach, describe, expect, test, vi } from 'vitest';
import { z } from 'zod';
import { readMaskSet } from '../../gpu-backend/publication/publish.ts';
import { centroidDistances, packCentroids } from '../../shared/mask/centroids.ts';
import { admin, edgeNow_ms } from '../../workers/dashboard/api.ts';
import { readItems } from '../../workers/dashboard/hooks.ts';
import { digitsOf, pValue, sharePercent } from '../../workers/dashboard/look.ts';
import {
  evaluatedRows,
  groupByMask,
  METHODS_SHOWN_MAX,
  paretoFront,
  projectCentroids,
  type QualityRow,
  qualityRows,
  sharesOverTime,
  versionsIn,
} from '../../workers/dashboard/pages/figures.ts';
import {
  askEdge,
  forgetPlaygroundKeys,
  type Progress,
  perToken_ms,
  streamChat,
} from '../../workers/dashboard/pages/playground-stream.ts';
import { madeUpEvaluation } from '../support/evaluation.ts';

/** A reproducible stream of numbers in -1 to 1. */
function numbers(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state * 1_103_515_245 + 12_345) % 2 ** 31;
    return state / 2 ** 30 - 1;
  };
}

describe('the map', () => {
  const next = numbers(7);
  const rows = Array.from({ length: 6 }, () => Array.from({ length: 20 }, next));
  const { centroids, explained, place } = projectCentroids(rows);

  test('keeps distances between centroids as well as two dimensions can', () => {
    expect(explained).toBeGreaterThan(0.4);
    expect(explained).toBeLessThan(1);
    const flat = projectCentroids(rows.map(([x, y]) => [x!, y!, 0, 0]));
    expect(flat.explained).toBeCloseTo(1);
    const apart = (points: readonly (readonly number[])[], a: number, b: number) =>
      Math.hypot(points[a]![0]! - points[b]![0]!, points[a]![1]! - points[b]![1]!);
    const drawn = flat.centroids.map(({ x, y }) => [x, y]);
    for (let i = 1; i < rows.length; i++) expect(apart(drawn, 0, i)).toBeCloseTo(apart(rows, 0, i));
  });

  test('places a point by its distances where its vector would lie', () => {
    const packed = packCentroids(rows);
    rows.forEach((row, index) => {
      const at = place([...centroidDistances(Float32Array.from(row), packed)])!;
      expect(at.x).toBeCloseTo(centroids[index]!.x, 4);
      expect(at.y).toBeCloseTo(centroids[index]!.y, 4);
    });
    // Between two centroids lies the middle of their places: the projection is linear.
    const middle = rows[0]!.map((value, i) => (value + rows[1]![i]!) / 2);
    const at = place([...centroidDistances(Float32Array.from(middle), packed)])!;
    expect(at.x).toBeCloseTo((centroids[0]!.x + centroids[1]!.x) / 2, 4);
    expect(at.y).toBeCloseTo((centroids[0]!.y + centroids[1]!.y) / 2, 4);
    expect(place([1, 2])).toBeUndefined();
  });

  test('draws one cluster in the middle', () => {
    expect(projectCentroids([[1, 2, 3]])).toMatchObject({ centroids: [{ x: 0, y: 0 }], explained: 1 });
  });
});

test('shares of one version add up to one at every step, and a step without requests is a gap', () => {
  const at = (start: string, cluster: number | null, requests: number, version = 'v_1') => ({
    start,
    cluster,
    requests,
    errors: 0,
    version,
  });
  const routing = [
    at('2026-01-01T00:00:00Z', 10, 3),
    at('2026-01-01T00:00:00Z', 2, 1),
    at('2026-01-01T02:00:00Z', 2, 5),
    at('2026-01-01T02:00:00Z', null, 5),
    at('2026-01-01T01:00:00Z', 2, 7, 'v_2'),
  ];
  const range = { from_ms: Date.parse('2026-01-01T00:00:00Z'), step_ms: 3_600_000, steps: 3 };
  const { requests, clusters } = sharesOverTime(routing, 'v_1', range);
  expect(requests).toBe(14);
  expect(clusters.map(({ cluster }) => cluster)).toEqual([null, 2, 10]);
  expect(clusters.map(({ shares }) => shares)).toEqual([
    [0, null, 0.5],
    [0.25, null, 0.5],
    [0.75, null, 0],
  ]);
  expect(versionsIn(routing)).toEqual(['v_1', 'v_2']);
});

test('clusters that share a mask are drawn once', () => {
  const groups = groupByMask([{ mask: 'm_a' }, { mask: 'm_b' }, { mask: 'm_a' }]);
  expect(groups.map(({ members }) => members.map(({ index }) => index))).toEqual([[0, 2], [1]]);
});

describe('quality', () => {
  const row = (method: string, sparsity: number, kl: number | null): QualityRow => ({
    set: 's',
    method,
    matched: null,
    surrogate: false,
    sparsity,
    kl,
    agreement: null,
    perplexity: null,
    ms_per_token: null,
  });

  test('the front holds what nothing beats at less cost or in quality', () => {
    const rows = [
      row('a', 0, 0),
      row('b', 0.2, 0.5),
      row('c', 0.2, 0.7),
      row('d', 0.1, 0.6),
      row('e', 0.3, null),
    ];
    const front = paretoFront(rows, ({ sparsity }) => 1 - sparsity, 'kl');
    expect(front.map(({ method }) => method)).toEqual(['b', 'a']);
  });

  test('an evaluation has a row for every method, named by its set where the masks are of one', () => {
    const { rows, equalTime } = madeUpEvaluation('v_1');
    const names = new Map([['v_1', 'mine']]);
    const found = evaluatedRows([...rows, ...equalTime], names);
    expect(found.slice(0, 2)).toEqual([
      {
        set: null,
        method: 'dense',
        matched: 'count',
        surrogate: true,
        sparsity: 0,
        kl: 0,
        agreement: 1,
        perplexity: 22.8,
        ms_per_token: 5.9,
      },
      {
        set: 'mine',
        method: 'learned',
        matched: 'count',
        surrogate: true,
        sparsity: 0.117,
        kl: 0.26,
        agreement: 0.78,
        perplexity: 25.6,
        ms_per_token: 5.2,
      },
    ]);
    expect(found.at(-1)).toMatchObject({ set: null, method: 'blockpruner', matched: 'time' });
    const front = paretoFront(found, ({ ms_per_token }) => ms_per_token, 'kl');
    expect(front.map(({ method }) => method)).toContain('learned');
  });

  test('the preset brings figures, dense among them', async () => {
    const set = await readMaskSet('gpu-backend/presets/smollm2-135m-instruct/mask-set.json');
    const rows = qualityRows(set);
    expect(rows.find(({ method }) => method === 'dense')).toMatchObject({ sparsity: 0, kl: 0 });
    const others = rows.filter(({ method }) => method !== 'dense');
    expect(others.length).toBeGreaterThan(0);
    for (const { kl, sparsity } of others) {
      expect(kl).toBeGreaterThan(0);
      expect(sparsity).toBeGreaterThan(0);
    }
  });

  test('a set with figures of 60,000 methods brings no more of them than a page can draw', async () => {
    const set = await readMaskSet('gpu-backend/presets/smollm2-135m-instruct/mask-set.json');
    const methods = Array.from({ length: 60_000 }, (_, i) => [`method ${i}`, { kl: 1, perplexity: i + 1 }]);
    const rows = qualityRows({ ...set, heldOut: Object.fromEntries(methods) });
    expect(rows).toHaveLength(METHODS_SHOWN_MAX);
  });
});

test.each([
  [0, '0 %'],
  [0.001, '0.1 %'],
  [0.01, '1 %'],
  [0.5, '50 %'],
  [0.999, '99.9 %'],
  [0.9999, '99.99 %'],
  [1, '100 %'],
])('a share of %d is neither nothing nor all unless it is: %s', (share, text) => {
  expect(sharePercent(share)).toBe(text);
});

test.each([
  [null, '–'],
  [0.04321, '0.0432'],
  [0.0001, '0.0001'],
  [0.000_01, '< 0.0001'],
  [0, '< 0.0001'],
])('a probability of %d is never shown as nothing: %s', (p, text) => {
  expect(pValue(p)).toBe(text);
});

test.each([
  [0.0002, 0.0008, 5],
  [-0.01, 0.03, 3],
  [1, 24, 0],
  [-300, 400, 0],
  [null, null, 3],
  [2, 2, 3],
])('an interval of %d to %d has %d digits behind the point', (low, high, digits) => {
  expect(digitsOf(low, high)).toBe(digits);
});

test.each([
  [7_200_000, 7_200_000],
  [-86_400_000, -86_400_000],
  [500, 0],
])(
  'the time at an edge that is %d ms ahead of the browser is taken from its answers',
  async (ahead_ms, counted_ms) => {
    const date = new Date(Date.now() + ahead_ms).toUTCString();
    vi.stubGlobal('fetch', async () => Response.json({}, { headers: { date } }));
    await admin(z.object({}), '/tenants');
    vi.unstubAllGlobals();
    expect(Math.abs(edgeNow_ms() - Date.now() - counted_ms)).toBeLessThan(2000);
  },
);

describe('the playground', () => {
  afterEach(() => {
    vi.unstubAllGlobals();
    forgetPlaygroundKeys();
  });
  const { signal } = new AbortController();

  /** An edge that makes keys, `key1` and on, and answers completions as it is told. Returns the keys that it was asked with. */
  function stubEdge(answer: (key: string) => Response | Promise<Response>): string[] {
    const asked: string[] = [];
    let made = 0;
    vi.stubGlobal('fetch', async (path: string, { headers }: { headers: Record<string, string> }) => {
      if (path === '/admin/v1/keys') {
        const at = '2031-01-01T00:00:00.000Z';
        return Response.json({
          id: `k_${++made}`,
          kind: 'tenant',
          tenant: 'acme',
          name: 'Playground',
          prefix: 'key',
          created_at: at,
          expires_at: at,
          revoked_at: null,
          replaced_by: null,
          key: `key${made}`,
        });
      }
      const key = headers.authorization!.replace('Bearer ', '');
      asked.push(key);
      return await answer(key);
    });
    return asked;
  }

  const PROMPT = { model: 'm', system: '', text: 'Hello', tokensMax: 9, temperature: 0 };
  async function run(): Promise<Progress> {
    const steps: Progress[] = [];
    const prompt = { ...PROMPT, version: undefined, mask: undefined };
    await streamChat('acme', prompt, 'masked', (progress) => void steps.push(progress), signal);
    return steps.at(-1)!;
  }
  const chunk = (text: string) => `data: ${JSON.stringify({ choices: [{ delta: { content: text } }] })}\n\n`;

  test('keeps its key, replaces one that was revoked, and has none left after logging out', async () => {
    const refused = { error: { message: 'The API key is not valid.', code: 'invalid_api_key' } };
    let revoked = '';
    const asked = stubEdge((key) =>
      key === revoked ? Response.json(refused, { status: 401 }) : Response.json({}),
    );
    for (let i = 0; i < 2; i++) await askEdge('acme', '/v1/models', { signal });
    revoked = 'key1';
    await askEdge('acme', '/v1/models', { signal });
    expect(asked).toEqual(['key1', 'key1', 'key1', 'key2']);
    forgetPlaygroundKeys();
    await askEdge('acme', '/v1/models', { signal });
    expect(asked.at(-1)).toBe('key3');
  });

  test('says that an answer broke off, and never takes a part of it for all', async () => {
    stubEdge(() => new Response(chunk('Once upon')));
    await expect(run()).rejects.toThrow('The answer broke off before its end.');
    const broken = new ReadableStream({
      pull: (controller) => controller.error(new TypeError('network error')),
    });
    stubEdge(() => new Response(broken));
    await expect(run()).rejects.toThrow('The answer broke off before its end.');
    stubEdge(() => Promise.reject(new TypeError('Failed to fetch')));
    await expect(run()).rejects.toThrow('The edge cannot be reached.');
  });

  test('divides by the tokens that there were, also where a chunk held several', async () => {
    const usage = { choices: [], usage: { completion_tokens: 5 } };
    const end = `data: ${JSON.stringify(usage)}\n\ndata: [DONE]\n\n`;
    const chunks = [chunk('a'), chunk('bcde'), end];
    const body = new ReadableStream({
      async pull(controller) {
        await new Promise((resolve) => setTimeout(resolve, 5));
        const next = chunks.shift();
        if (next === undefined) controller.close();
        else controller.enqueue(new TextEncoder().encode(next));
      },
    });
    stubEdge(() => new Response(body));
    const progress = await run();
    expect(progress).toMatchObject({ text: 'abcde', tokens: 5, isDone: true });
    expect(perToken_ms(progress)).toBeCloseTo((progress.last_ms! - progress.first_ms!) / 4);
    expect(perToken_ms(progress)).toBeGreaterThan(0);
  });
});

test('what a later release wrote into a list is named by its id, be it a name or a number', () => {
  const item = z.object({ id: z.unknown(), created_at: z.iso.datetime() });
  const rows = ['acme', 17, null].map((id) => ({ id, created_at: 'soon' }));
  const good = { id: 18, created_at: '2026-01-01T00:00:00Z' };
  const { data, unreadable } = readItems(item, [{ object: 'list', data: [...rows, good] }]);
  expect(data).toEqual([good]);
  expect(unreadable.map((line) => line.split(' (')[0])).toEqual(['acme', '17', 'one item']);
});
