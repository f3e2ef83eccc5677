/**
 * The store of installed models: `models/<name>/` in the home folder, each with model.json, the graphs, the weights and the
 * tokenizer. A finished folder is installed by a rename, so a visible model is complete. Folders whose name begins with a
 * dot are work in progress, or were left by a killed import, and are never read.
 */
import { createHash } from 'node:crypto';
import { mkdir, open, readdir, rename, rm, stat, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { check } from '../../shared/wire/parse-body.ts';
import { makeFolder, openRegular, readJson, sizeOf, withLock } from '../files.ts';
import { corruptModel, type ModelManifest, modelManifestSchema } from './model-source.ts';

export const MANIFEST_FILE = 'model.json';
/** Far above the size of a manifest, whose largest part is the chat template. */
const MANIFEST_BYTES_MAX = 4 * 1024 * 1024;
const NAME_PATTERN = /^[A-Za-z0-9][A-Za-z0-9._-]*$/;
/** What the store puts around it, such as `-q8-columns`, still makes a file's name. */
const GIVEN_NAME_CHARS_MAX = 124;
const INCOMING = '.incoming-';
const OUTGOING = '.outgoing-';

export type InstalledModel = { readonly folder: string; readonly manifest: ModelManifest };
/** A folder in the store that is not a usable model, and why. */
type BrokenModel = { readonly name: string; readonly problem: string };

export const modelsFolder = (home: string): string => join(home, 'models');

/** A model name from the name of a folder or file: other characters than letters, digits, `.`, `_` and `-` become `-`. */
export function toModelName(text: string): string {
  const name = text
    .replace(/[^A-Za-z0-9._-]+/g, '-')
    .slice(0, GIVEN_NAME_CHARS_MAX)
    .replace(/^[^A-Za-z0-9]+|[^A-Za-z0-9]+$/g, '');
  if (!NAME_PATTERN.test(name)) {
    throw new MaskrouteError('invalid_request', `"${text}" cannot become a model name; rename it.`);
  }
  return name;
}

/** All installed models and folders that cannot be used, sorted by name. */
export async function listInstalled(home: string): Promise<(InstalledModel | BrokenModel)[]> {
  const names = (await readdirOrNone(modelsFolder(home))).filter((name) => NAME_PATTERN.test(name)).sort();
  return Promise.all(
    names.map((name) =>
      openInstalled(home, name).catch((error: Error): BrokenModel => ({ name, problem: error.message })),
    ),
  );
}

/**
 * Opens an installed model. Checks the sizes of its files, but not their content, which `verifyInstalled` does.
 * @throws MaskrouteError `model_not_found`, `corrupt_model`.
 */
export async function openInstalled(home: string, name: string): Promise<InstalledModel> {
  const folder = join(modelsFolder(home), name);
  if (!NAME_PATTERN.test(name) || !(await exists(folder))) throw await notFound(home, name);
  const manifest = await readManifest(folder);
  for (const [file, { bytes }] of Object.entries(manifest.files)) {
    const size = await sizeOf(join(folder, file));
    if (size !== bytes) {
      const what = size === undefined ? 'is missing' : `has ${size} bytes instead of ${bytes}`;
      throw corruptModel(`${file} of ${name} ${what}; pull it again with --force`);
    }
  }
  // Commands find a model by its folder, which somebody may have renamed or copied.
  return { folder, manifest: { ...manifest, name } };
}

/** Reads every file of a model and compares hashes. @throws MaskrouteError `corrupt_model`. */
export async function verifyInstalled({ folder, manifest }: InstalledModel): Promise<void> {
  for (const [file, { sha256 }] of Object.entries(manifest.files)) {
    const found = await sha256OfFiles([join(folder, file)]);
    if (found !== sha256) throw corruptModel(`the content of ${file} of ${manifest.name} has changed`);
  }
}

/**
 * Makes a model in a hidden folder and installs it, replacing an older model of that name. `fill` writes the files and
 * returns the manifest; when it throws, nothing is left behind. The caller holds the store's lock.
 */
export async function install(
  home: string,
  name: string,
  fill: (folder: string) => Promise<ModelManifest>,
): Promise<InstalledModel> {
  const models = modelsFolder(home);
  const folder = join(models, `${INCOMING}${name}-${process.pid}`);
  await rm(folder, { recursive: true, force: true });
  await mkdir(folder, { recursive: true });
  try {
    const manifest = await fill(folder);
    await writeFile(join(folder, MANIFEST_FILE), JSON.stringify(manifest), { flush: true });
    await syncToDisk(folder);
    await putInPlace(models, name, folder);
    return { folder: join(models, name), manifest };
  } catch (error) {
    await rm(folder, { recursive: true, force: true });
    throw error;
  }
}

/** If the process is killed between the two renames, `recoverStore` brings the older model back. */
async function putInPlace(models: string, name: string, finished: string): Promise<void> {
  const target = join(models, name);
  const outgoing = join(models, OUTGOING + name);
  if (await exists(target)) await rename(target, outgoing);
  await rename(finished, target);
  await syncToDisk(models);
  await rm(outgoing, { recursive: true, force: true });
}

/** Runs `work` with a temporary folder in the store, which is deleted afterwards. */
export async function withScratch<T>(home: string, work: (folder: string) => Promise<T>): Promise<T> {
  const folder = join(modelsFolder(home), `${INCOMING}scratch-${process.pid}`);
  await mkdir(folder, { recursive: true });
  try {
    return await work(folder);
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

/** Sizes and hashes of files, for a manifest. */
export async function describeFiles(
  folder: string,
  names: readonly string[],
  signal?: AbortSignal,
): Promise<ModelManifest['files']> {
  const files: ModelManifest['files'] = {};
  for (const name of names) {
    const path = join(folder, name);
    files[name] = { bytes: (await stat(path)).size, sha256: await sha256OfFiles([path], signal) };
  }
  return files;
}

/** Deletes what killed imports left. The caller holds the store's lock, so no import is running. */
export async function recoverStore(home: string): Promise<void> {
  const models = modelsFolder(home);
  for (const entry of await readdirOrNone(models)) {
    const path = join(models, entry);
    if (entry.startsWith(INCOMING)) await rm(path, { recursive: true, force: true });
    if (entry.startsWith(OUTGOING)) {
      const target = join(models, entry.slice(OUTGOING.length));
      if (await exists(target)) await rm(path, { recursive: true, force: true });
      else await rename(path, target);
    }
  }
}

/** SHA-256 of the concatenated files, in hex. `onBytes` gets the bytes of each chunk. */
export async function sha256OfFiles(
  paths: readonly string[],
  signal?: AbortSignal,
  onBytes?: (bytes: number) => void,
): Promise<string> {
  const hash = createHash('sha256');
  for (const path of paths) {
    const file = await openRegular(path);
    const stream = file.createReadStream({ highWaterMark: 1024 * 1024, ...(signal && { signal }) });
    for await (const chunk of stream as AsyncIterable<Buffer>) {
      hash.update(chunk);
      onBytes?.(chunk.length);
    }
  }
  return hash.digest('hex');
}

/** fsync of a file or folder. */
async function syncToDisk(path: string): Promise<void> {
  const handle = await open(path, 'r');
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}

async function readManifest(folder: string): Promise<ModelManifest> {
  const path = join(folder, MANIFEST_FILE);
  let json: unknown;
  try {
    json = await readJson(path, MANIFEST_BYTES_MAX, (reason) => new Error(`it ${reason}`));
  } catch (error) {
    throw corruptModel(`${path} cannot be read (${(error as Error).message})`, error);
  }
  if ((json as { format?: unknown } | null)?.format !== modelManifestSchema.shape.format.value) {
    const message = `${path} was written by another version of Maskroute; pull the model again.`;
    throw new MaskrouteError('corrupt_model', message);
  }
  const checked = check(modelManifestSchema, json, 'the manifest');
  if (checked.kind === 'bad') throw corruptModel(`${path}: ${checked.message}`);
  return checked.value;
}

async function notFound(home: string, name: string): Promise<MaskrouteError> {
  const names = (await readdirOrNone(modelsFolder(home))).filter((entry) => NAME_PATTERN.test(entry)).sort();
  const there = names.length === 0 ? 'none is installed yet' : `installed: ${names.join(', ')}`;
  return new MaskrouteError(
    'model_not_found',
    `No model named ${JSON.stringify(name.slice(0, 128))} (${there}). Install one with: maskroute model pull NAME`,
    { param: 'model' },
  );
}

const exists = async (path: string): Promise<boolean> => (await sizeOf(path)) !== undefined;

async function readdirOrNone(path: string): Promise<string[]> {
  try {
    return await readdir(path);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return [];
    throw error;
  }
}

/* One import at a time. */

/** Runs `work` under the store's lock. Calls `onWait` once when it must wait for another import. */
export async function withStoreLock<T>(
  home: string,
  options: { readonly onWait: () => void; readonly signal?: AbortSignal | undefined },
  work: () => Promise<T>,
): Promise<T> {
  const models = modelsFolder(home);
  await makeFolder(models);
  return withLock(join(models, '.lock'), options, work);
}
