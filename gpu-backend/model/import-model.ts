/**
 * From a weights file on this machine to an installed model. Everything is checked and written in a hidden folder
 * first; the model appears by one rename, and a failure leaves nothing behind.
 */
import { mkdir, rm, stat, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { emitModel, MODEL_FILE, WEIGHTS_FILE } from './emit.ts';
import { openGguf } from './formats/gguf.ts';
import { openSafetensorsFolder } from './formats/hf-folder.ts';
import type { ImportHooks, ModelManifest, OpenModelFile, WeightKind } from './model-source.ts';
import { MANIFEST_FORMAT } from './model-source.ts';
import type { InstalledModel } from './store.ts';
import {
  incomingFolder,
  MANIFEST_FILE,
  modelsFolder,
  openInstalled,
  putInPlace,
  sha256OfFiles,
  syncFolder,
} from './store.ts';
import type { ImportedTokenizer } from './tokenizer/gguf-tokenizer.ts';
import { tokenizerFromGguf } from './tokenizer/gguf-tokenizer.ts';
import { tokenizerFromFolder } from './tokenizer/hf-tokenizer.ts';
import { TOKENIZER_CONFIG_FILE, TOKENIZER_FILE } from './tokenizer/tokenizer.ts';
import { tryModelText } from './trial.ts';

export type LocalModel = {
  readonly kind: 'gguf' | 'folder';
  readonly path: string;
  /** Where it came from, for the manifest. */
  readonly source: string;
};

export type ImportOptions = ImportHooks & {
  readonly home: string;
  readonly name: string;
  readonly weights: WeightKind;
  /** Import again even when the same model is there. */
  readonly force: boolean;
};

/** Call with the store locked. @throws MaskrouteError `corrupt_model`, `unsupported_model`. */
export async function importModel(local: LocalModel, options: ImportOptions): Promise<InstalledModel> {
  const { weights, tokenizer } = await openLocal(local);
  try {
    const hash = await hashWeights(weights.weightFiles, options);
    const present = await sameModel(options, hash);
    if (present !== undefined) return present;
    const folder = incomingFolder(options.home, options.name);
    await rm(folder, { recursive: true, force: true });
    await mkdir(folder, { recursive: true });
    try {
      await writeSynced(folder, TOKENIZER_FILE, tokenizer.tokenizerJson);
      await writeSynced(folder, TOKENIZER_CONFIG_FILE, tokenizer.tokenizerConfig);
      // Quick checks before the long work.
      await tryModelText(folder, tokenizer);
      await convert(weights, options, folder);
      const manifest = await describe(local, weights, tokenizer, hash, options, folder);
      await writeSynced(folder, MANIFEST_FILE, manifest);
      await syncFolder(folder);
      options.signal?.throwIfAborted();
      await putInPlace(options.home, options.name, folder);
      return { folder: join(modelsFolder(options.home), options.name), manifest };
    } catch (error) {
      await rm(folder, { recursive: true, force: true });
      throw error;
    }
  } finally {
    await weights.close();
  }
}

type OpenedModel = { weights: OpenModelFile; tokenizer: ImportedTokenizer };

async function openLocal({ kind, path }: LocalModel): Promise<OpenedModel> {
  switch (kind) {
    case 'gguf': {
      const weights = await openGguf(path);
      return withTokenizer(weights, async () =>
        tokenizerFromGguf(weights.metadata, weights.config.vocabularySize),
      );
    }
    case 'folder': {
      const weights = await openSafetensorsFolder(path);
      return withTokenizer(weights, () => tokenizerFromFolder(path, weights.config.vocabularySize));
    }
  }
}

async function withTokenizer(
  weights: OpenModelFile,
  read: () => Promise<ImportedTokenizer>,
): Promise<OpenedModel> {
  try {
    return { weights, tokenizer: await read() };
  } catch (error) {
    await weights.close();
    throw error;
  }
}

async function hashWeights(paths: readonly string[], { onProgress, signal }: ImportHooks): Promise<string> {
  const sizes = await Promise.all(paths.map(async (path) => (await stat(path)).size));
  const total = sizes.reduce((sum, size) => sum + size, 0);
  let done = 0;
  const onBytes = (bytes: number) => {
    done += bytes;
    onProgress({ phase: 'verify', done, total, unit: 'bytes' });
  };
  return sha256OfFiles(paths, onBytes, signal);
}

/** The model that is there already, when it came from the same weights and is held in the same way. */
async function sameModel(options: ImportOptions, hash: string): Promise<InstalledModel | undefined> {
  if (options.force) return undefined;
  const installed = await openInstalled(options.home, options.name).catch(() => undefined);
  const same = installed?.manifest.hash === hash && installed.manifest.weights === options.weights;
  return same ? installed : undefined;
}

async function convert(weights: OpenModelFile, options: ImportOptions, folder: string): Promise<void> {
  await emitModel(weights, options.weights, folder, (fraction) => {
    // Emission has no signal of its own: an exception here ends it between two layers.
    options.signal?.throwIfAborted();
    options.onProgress({ phase: 'convert', done: 100 * fraction, total: 100, unit: 'percent' });
  });
  await syncFile(folder, MODEL_FILE);
}

/** Sums up what the folder holds. */
async function describe(
  local: LocalModel,
  weights: OpenModelFile,
  tokenizer: ImportedTokenizer,
  hash: string,
  options: ImportOptions,
  folder: string,
): Promise<ModelManifest> {
  const files: ModelManifest['files'] = {};
  for (const name of [MODEL_FILE, WEIGHTS_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG_FILE]) {
    const path = join(folder, name);
    files[name] = {
      bytes: (await stat(path)).size,
      sha256: await sha256OfFiles([path], () => {}, options.signal),
    };
  }
  return {
    format: MANIFEST_FORMAT,
    name: options.name,
    hash,
    source: local.source,
    weights: options.weights,
    config: weights.config,
    chatTemplate: tokenizer.chatTemplate,
    bosTokenId: tokenizer.bosTokenId,
    eosTokenIds: [...tokenizer.eosTokenIds],
    addBos: tokenizer.addBos,
    files,
    importedAt: new Date().toISOString(),
  };
}

async function writeSynced(folder: string, name: string, content: unknown): Promise<void> {
  await writeFile(join(folder, name), JSON.stringify(content), { flush: true });
}

const syncFile = (folder: string, name: string): Promise<void> => syncFolder(join(folder, name));
