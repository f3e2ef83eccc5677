/** A folder with config.json and safetensors weights, in one file or several, as a `WeightSource`. */
import { readdir } from 'node:fs/promises';
import { join } from 'node:path';
import { checkTensors } from '../families.ts';
import {
  corruptModel,
  type OpenModelFile,
  quoted,
  readModelJson,
  requireModelJson,
} from '../model-source.ts';
import { configFromHuggingFace } from './hf-config.ts';
import { openSafetensors, requireReadable, type SafetensorsFile } from './safetensors.ts';

const CONFIG_BYTES_MAX = 4 * 1024 * 1024;
const INDEX_BYTES_MAX = 32 * 1024 * 1024;
const INDEX_FILE = 'model.safetensors.index.json';
const SHARD_COUNT_MAX = 1000;

/** @throws MaskrouteError `corrupt_model`, `unsupported_model`, `invalid_argument` for a file that is not a regular one. */
export async function openSafetensorsFolder(folder: string): Promise<OpenModelFile> {
  const config = configFromHuggingFace(await requireModelJson(folder, 'config.json', CONFIG_BYTES_MAX));
  const names = await weightFileNames(folder);
  const files: SafetensorsFile[] = [];
  const close = async () => {
    await Promise.all(files.map((file) => file.close()));
  };
  try {
    for (const name of names) files.push(await openSafetensors(join(folder, name), folder));
    const fileOf = new Map<string, SafetensorsFile>();
    for (const file of files) {
      for (const name of file.names) {
        if (fileOf.has(name)) throw corruptModel(`tensor ${quoted(name)} comes twice`);
        if (!isIgnored(name, config.tiedEmbeddings)) fileOf.set(name, file);
      }
    }
    for (const [name, file] of fileOf) requireReadable(name, file);
    const shapes = new Map([...fileOf].map(([name, file]) => [name, file.shape(name)]));
    checkTensors(config, shapes, (tensor) => tensor.name);
    const find = (name: string) => {
      const file = fileOf.get(name);
      if (file === undefined) throw new RangeError(`the model has no tensor ${name}`);
      return file;
    };
    return {
      config,
      weightFiles: names.map((name) => join(folder, name)),
      has: (name) => fileOf.has(name),
      shape: (name) => find(name).shape(name),
      read: (name) => find(name).read(name),
      place: (name) => find(name).place(name),
      close,
    };
  } catch (error) {
    await close();
    throw error;
  }
}

/** Old files carry the rotary table, which follows from the configuration; a tied head repeats the embedding. */
const isIgnored = (name: string, tied: boolean): boolean =>
  name.endsWith('.rotary_emb.inv_freq') || (tied && name === 'lm_head.weight');

/** Sorted, so that the model's hash does not depend on the order in a folder. */
async function weightFileNames(folder: string): Promise<string[]> {
  const entries = new Set(await readdir(folder));
  const index = await readModelJson(folder, INDEX_FILE, INDEX_BYTES_MAX);
  if (index === undefined) {
    if (entries.has('model.safetensors')) return ['model.safetensors'];
    const shard = [...entries].find((name) => /^model-\d{5}-of-\d{5}\.safetensors$/.test(name));
    if (shard !== undefined) throw corruptModel(`its folder has ${shard} and no ${INDEX_FILE}`);
    throw corruptModel('its folder has neither model.safetensors nor its index');
  }
  const names = [...new Set(Object.values((index.weight_map as object | undefined) ?? {}))].sort();
  if (names.length === 0 || names.length > SHARD_COUNT_MAX)
    throw corruptModel(`${INDEX_FILE} names no files`);
  for (const name of names) {
    // A name is looked up in the folder's own list: an index cannot point out of it.
    if (typeof name !== 'string' || !name.endsWith('.safetensors') || !entries.has(name)) {
      throw corruptModel(`${INDEX_FILE} names ${quoted(String(name))}, which is not there`);
    }
  }
  return names as string[];
}
