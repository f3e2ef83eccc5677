/** What evaluation tests run on: a small whole model, and its naive twin. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Sample } from '../../../../gpu-backend/learning/data/samples.ts';
import { openScoring } from '../../../../gpu-backend/learning/search/score-masks.ts';
import type { WeightKind } from '../../../../gpu-backend/model/model-source.ts';
import type { InstalledModel } from '../../../../gpu-backend/model/store.ts';
import { installTinyModel } from '../../../support/tiny-model.ts';

export const SAMPLES: Sample[] = [
  { tokenIds: Int32Array.from({ length: 14 }, (_, i) => 3 + ((i * 37) % 250)), scoreFrom: 0 },
  { tokenIds: Int32Array.from({ length: 12 }, (_, i) => 3 + ((i * 11 + 5) % 250)), scoreFrom: 6 },
];

export type TinyHome = Disposable & { readonly home: string; readonly model: InstalledModel };

/** A home folder with one installed model. */
export async function tinyHome(weights: WeightKind = 'f32'): Promise<TinyHome> {
  const home = mkdtempSync(join(tmpdir(), 'maskroute-evaluation-'));
  const folder = join(home, 'models', 'tiny');
  const model = await installTinyModel(folder, weights);
  writeFileSync(join(folder, 'model.json'), JSON.stringify(model.manifest));
  return { home, model, [Symbol.dispose]: () => rmSync(home, { recursive: true }) };
}

export async function openTinyScorer({ model }: Pick<TinyHome, 'model'>) {
  const opened = await openScoring(model, { threads: 1 });
  return { ...opened, [Symbol.asyncDispose]: opened.close };
}
