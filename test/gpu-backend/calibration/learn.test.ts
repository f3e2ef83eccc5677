/** The whole offline pipeline on the real model, with little of everything. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type LearnOptions, learn } from '../../../gpu-backend/calibration/learn.ts';
import { seededRandom } from '../../../gpu-backend/calibration/random.ts';
import { parseRow } from '../../../gpu-backend/calibration/read-data.ts';
import { drawSamples, encodeRow } from '../../../gpu-backend/calibration/samples.ts';
import { splitRows } from '../../../gpu-backend/calibration/split.ts';
import { openModelText } from '../../../gpu-backend/model/model-text.ts';
import { maskSetSchema } from '../../../shared/mask-set.ts';
import { installedModel, testHome } from '../../support/installed-model.ts';

let folder = '';
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'maskroute-learn-'));
});
afterAll(() => rmSync(folder, { recursive: true }));

/** Two kinds that no encoder would mix up. */
function dataFiles(): string[] {
  const sums = Array.from({ length: 30 }, (_, i) => ({
    question: `Tom has ${i + 3} apples and buys ${2 * i + 1} more. How many apples does he have?`,
    answer: `He has ${3 * i + 4} apples.`,
  }));
  const trips = ['Paris', 'Rome', 'Oslo', 'Cairo', 'Lima'].flatMap((city) =>
    ['hotel room', 'flight', 'train ticket', 'table for two', 'rental car', 'guided tour'].map((what) => ({
      messages: [
        { role: 'user', content: `Please book me a ${what} in ${city} for tomorrow.` },
        { role: 'assistant', content: `Your ${what} in ${city} is booked.` },
      ],
    })),
  );
  return Object.entries({ sums, trips }).map(([name, rows]) => {
    const path = join(folder, `${name}.jsonl`);
    writeFileSync(path, rows.map((row) => JSON.stringify(row)).join('\n'));
    return path;
  });
}

const options = async (out: string): Promise<LearnOptions> => ({
  model: await installedModel(),
  data: dataFiles(),
  clusterCount: 2,
  sparsity: 0.125,
  encoder: 'static',
  encoderOptions: { home: testHome, threads: 2, hooks: { onProgress: () => {}, log: () => {} } },
  effort: { positions: 8, choicePositions: 8, heldOutPositions: 8, tokensMax: 48, candidatesPerSkip: 1 },
  out: join(folder, out),
  name: 'test-set',
  onProgress: () => {},
});

describe('learn', () => {
  it('killed half-way and started again goes on, and gives a mask set that holds together', async () => {
    const killed = new AbortController();
    let first = 0;
    const base = await options('resumed');
    await expect(
      learn({
        ...base,
        signal: killed.signal,
        onProgress: (progress) => {
          if (progress.stage === 'search' && ++first === 65) killed.abort();
        },
      }),
    ).rejects.toThrow();
    const state = JSON.parse(readFileSync(join(base.out, 'state.json'), 'utf8'));
    expect(Object.keys(state.clusters)).toEqual(['0']);

    const done: number[] = [];
    const { maskSet, report } = await learn({
      ...base,
      onProgress: (progress) => {
        if (progress.stage === 'search') done.push(progress.done);
      },
    });
    expect(done[0]).toBe(61);
    expect(done.at(-1)).toBe(120);
    expect(report.clusters[0]!.alone).toEqual(state.clusters[0].alone);
    expect(() => readFileSync(join(base.out, 'state.json'))).toThrow();

    const written = maskSetSchema.parse(JSON.parse(readFileSync(join(base.out, 'mask-set.json'), 'utf8')));
    expect(written).toEqual(maskSet);
    expect(maskSet).toMatchObject({ targetSparsity: 0.125, surrogate: false, model: { blockCount: 60 } });
    expect(maskSet.reachedSparsity).toBeCloseTo(8 / 60, 10);
    expect(report.information_bits.fit).toBeCloseTo(1, 1);
    for (const cluster of report.clusters) {
      expect([...cluster.skipAttention, ...cluster.skipFfn]).toHaveLength(8);
      // The first attention and FFN carry this model: without them nothing is left.
      expect(cluster.skipAttention).not.toContain(0);
      expect(cluster.skipFfn).not.toContain(0);
      expect(cluster.heldOut!.kl).toBeGreaterThan(0);
    }
  }, 120_000);
});

describe('samples', () => {
  it('are the prompt under the template and the answer as the model ends it; only what differs is scored', async () => {
    const { folder: modelFolder, manifest } = await installedModel();
    const text = await openModelText(modelFolder, manifest);
    const eos = manifest.eosTokenIds[0]!;
    const row = parseRow('{"question":"Hi there","answer":"Hello!"}', 'k', 'f:1');
    const ids = encodeRow(row, text, eos);
    expect(text.tokenizer.decode(ids, { showSpecial: true })).toMatch(
      /<\|im_start\|>user\nHi there<\|im_end\|>\n<\|im_start\|>assistant\nHello!<\|im_end\|>$/,
    );
    const [sample] = drawSamples([row], text, eos, seededRandom(1), { positions: 10, tokensMax: 100 });
    expect(text.tokenizer.decode(sample!.tokenIds.slice(sample!.scoreFrom), { showSpecial: true })).toMatch(
      /^Hi there<\|im_end\|>/,
    );
    const plain = parseRow('{"text":"Once upon a time"}', 'k', 'f:1');
    expect(text.tokenizer.decode(encodeRow(plain, text, eos))).toBe('Once upon a time');
  });
});

it('the held-out split goes by the prompt, not by its place', () => {
  const rows = Array.from({ length: 400 }, (_, i) => parseRow(`{"text":"prompt ${i % 200}"}`, 'k', 'f:1'));
  const { fit, heldOut } = splitRows(rows, 0.1);
  const texts = (some: typeof rows) => new Set(some.map((row) => row.routeText));
  expect([...texts(fit)].filter((text) => texts(heldOut).has(text))).toEqual([]);
  expect(heldOut.length).toBeGreaterThan(15);
  expect(heldOut.length).toBeLessThan(90);
  expect(texts(splitRows(rows.toReversed(), 0.1).heldOut)).toEqual(texts(heldOut));
});
