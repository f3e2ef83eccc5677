/**
 * Puts a table of surrogates into an installed model: its matrices beside the weights, quantized as the weights are,
 * and a graph whose skip branches use them. The model's own weights are not touched; a new folder shares their files
 * and takes the old one's place by one rename, so an engine that has it open goes on.
 */
import { copyFile, link, readdir } from 'node:fs/promises';
import { join } from 'node:path';
import type { StoredLayer, StoredLlama } from './architectures/llama.ts';
import { storeLinear } from './architectures/projections.ts';
import { transpose } from './architectures/rotation.ts';
import type { StoredSurrogate } from './architectures/surrogate.ts';
import { BATCHED_MODEL_FILE, MODEL_FILE, writeGraphs } from './emit.ts';
import type { ModelManifest, WeightKind } from './model-source.ts';
import { describeFiles, type InstalledModel, install, MANIFEST_FILE, openInstalled } from './store.ts';
import { readStoredLlama } from './stored-llama.ts';
import { checkSurrogatesModel, readSurrogates, type SurrogateTable, toInstalledBasis } from './surrogates.ts';
import { WeightsFile } from './weights-file.ts';

/** The table as it came, and its matrices as the graph reads them. */
export const SURROGATES_FILE = 'surrogates.safetensors';
const SURROGATE_WEIGHTS_FILE = 'surrogates.bin';
const REPLACED: ReadonlySet<string> = new Set([
  MODEL_FILE,
  BATCHED_MODEL_FILE,
  MANIFEST_FILE,
  SURROGATES_FILE,
  SURROGATE_WEIGHTS_FILE,
]);

/**
 * Call with the store locked. The same table again changes nothing.
 * @throws MaskrouteError `surrogates_mismatch` when the table is for another model, `invalid_request`.
 */
export async function installSurrogates(
  home: string,
  name: string,
  path: string,
  { preset }: { readonly preset: boolean },
): Promise<InstalledModel> {
  const installed = await openInstalled(home, name);
  const { manifest } = installed;
  const surrogates = await readSurrogates(path);
  checkSurrogatesModel(surrogates, manifest);
  if (manifest.surrogates?.id === surrogates.id) return installed;
  return await install(home, name, async (folder) => {
    await shareFiles(installed.folder, folder);
    await copyFile(path, join(folder, SURROGATES_FILE));
    await writeSurrogateGraph(installed.folder, folder, manifest, surrogates.table);
    const { id, table, fitted } = surrogates;
    const written = await describeFiles(folder, [
      MODEL_FILE,
      BATCHED_MODEL_FILE,
      SURROGATES_FILE,
      SURROGATE_WEIGHTS_FILE,
    ]);
    return {
      ...manifest,
      surrogates: { id, rank: table.rank, fitted, preset },
      files: { ...manifest.files, ...written },
    };
  });
}

/** Everything that stays, copies of weights for training too; hard links, or copies where the disk has none. */
async function shareFiles(from: string, to: string): Promise<void> {
  for (const entry of await readdir(from, { withFileTypes: true })) {
    if (!entry.isFile() || entry.name.startsWith('.') || REPLACED.has(entry.name)) continue;
    const [source, target] = [join(from, entry.name), join(to, entry.name)];
    await link(source, target).catch(() => copyFile(source, target));
  }
}

/** The graph in `from`, with surrogates, and their matrices, into `folder`, which shares the weights. */
export async function writeSurrogateGraph(
  from: string,
  folder: string,
  { config, weights }: Pick<ModelManifest, 'config' | 'weights'>,
  table: SurrogateTable,
): Promise<void> {
  const stored = await readStoredLlama(from, config);
  const layers = storeSurrogates(join(folder, SURROGATE_WEIGHTS_FILE), stored, weights, table);
  writeGraphs(folder, config, { ...stored, layers });
}

function storeSurrogates(
  path: string,
  stored: StoredLlama,
  weights: WeightKind,
  table: SurrogateTable,
): StoredLayer[] {
  const { a, b, bias, first, hiddenSize: H, rank } = toInstalledBasis(table, weights);
  // They weigh little: four bits would save nothing worth their error.
  const kind = weights === 'f32' ? 'f32' : 'q8';
  const file = new WeightsFile(path, SURROGATE_WEIGHTS_FILE);
  const store = (block: number): StoredSurrogate => {
    const matrix = (values: Float32Array) => values.subarray(block * H * rank, (block + 1) * H * rank);
    const vector = (values: Float32Array) => file.append(values.subarray(block * H, (block + 1) * H));
    return {
      down: storeLinear(file, kind, transpose(matrix(a), H, rank), rank, H),
      up: storeLinear(file, kind, transpose(matrix(b), rank, H), H, rank),
      bias: vector(bias),
      first: vector(first),
    };
  };
  try {
    return stored.layers.map((layer, index) => ({
      ...layer,
      surrogates: { attention: store(2 * index), ffn: store(2 * index + 1) },
    }));
  } finally {
    file.close();
  }
}
