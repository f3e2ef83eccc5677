/**
 * A whole learning run that takes seconds: the tiny model, two kinds of prompt, little of everything. As a program
 * (`small-run.ts FOLDER OUT`) it is such a run in a process of its own, to be killed.
 */
import { existsSync, readFileSync } from 'node:fs';
import { mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { type LearnOptions, learn } from '../../../gpu-backend/learning/learn.ts';
import type { LearnEffort } from '../../../gpu-backend/learning/search/effort.ts';
import type { InstalledModel } from '../../../gpu-backend/model/store.ts';
import { testHome } from '../../support/installed-model.ts';
import { installTinyModel } from '../../support/tiny-model.ts';

const mask = {
  searchPositions: 120,
  glanceParts: 1,
  gateSteps: 2,
  rounds: 1,
  exchanges: 4,
  triesMax: 3,
};
export const SMALL_EFFORT: LearnEffort = {
  one: { ...mask, greedyEvaluations: 10 },
  group: mask,
  masksMax: 2,
  compose: { masks: 2, blocks: 6, positions: 120 },
  sizes: [],
  sizeExchanges: 4,
  turns: 2,
  choicePositions: 60,
  sharePositions: 240,
  heldOutPositions: 120,
  tokensMax: 48,
  targets: 'dense',
  scored: 'all',
};

/** Two kinds that no encoder would mix up. */
export async function writeSmallData(folder: string): Promise<string[]> {
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
  await mkdir(folder, { recursive: true });
  const kinds = Object.entries({ sums, trips });
  for (const [name, rows] of kinds) {
    await writeFile(join(folder, `${name}.jsonl`), rows.map((row) => JSON.stringify(row)).join('\n'));
  }
  return kinds.map(([name]) => join(folder, `${name}.jsonl`));
}

/** Made once in a folder: later runs, those in processes of their own too, find it there. */
async function smallModel(folder: string): Promise<InstalledModel> {
  const manifestFile = join(folder, 'model.json');
  if (existsSync(manifestFile)) return { folder, manifest: JSON.parse(readFileSync(manifestFile, 'utf8')) };
  const model = await installTinyModel(folder, 'q8', { contextTokens: 128 });
  await writeFile(manifestFile, JSON.stringify(model.manifest));
  return model;
}

export async function smallRun(folder: string, out: string): Promise<LearnOptions> {
  return {
    model: await smallModel(join(folder, 'model')),
    data: { files: ['sums', 'trips'].map((kind) => join(folder, 'data', `${kind}.jsonl`)) },
    encoder: 'static',
    clusterCount: 2,
    budget: { sparsity: 0.25, cost: 'blocks' },
    search: { effort: SMALL_EFFORT },
    machine: { home: testHome, threads: 1 },
    output: { folder: join(folder, out), name: 'small' },
    seed: 1,
    hooks: { onProgress: () => {}, onDownload: () => {}, log: () => {} },
  };
}

if (import.meta.main) {
  const [folder, out] = process.argv.slice(2) as [string, string];
  let results = 0;
  const run = await smallRun(folder, out);
  await learn({ ...run, hooks: { ...run.hooks, onProgress: () => process.send?.(++results) } });
}
