/**
 * Opens a folder with config.json and safetensors weights, in one file or several, as a `WeightSource`.
 */
import { readdir } from 'node:fs/promises';
import { join } from 'node:path';
import { checkTensors } from '../families.ts';
import {
  corruptModel,
  type JsonObject,
  type ModelConfig,
  type OpenModelFile,
  quoted,
  readModelJson,
  requireModelJson,
  type TensorPlace,
  unsupportedModel,
} from '../model-source.ts';
import { configFromHuggingFace, textPart } from './hf-config.ts';
import { openSafetensors, type SafetensorsFile } from './safetensors.ts';
import { areEqual, tensorsInFiles } from './tensor-parts.ts';

const CONFIG_BYTES_MAX = 4 * 1024 * 1024;
const INDEX_BYTES_MAX = 32 * 1024 * 1024;
export const SINGLE_FILE = 'model.safetensors';
export const INDEX_FILE = 'model.safetensors.index.json';
const SHARD_COUNT_MAX = 1000;

/** @throws MaskrouteError `corrupt_model`, `unsupported_model`, `invalid_argument` for a file that is not a regular file. */
export async function openSafetensorsFolder(folder: string): Promise<OpenModelFile> {
  const { json, config } = await readConfig(folder);
  const names = await weightFileNames(folder);
  const files: SafetensorsFile[] = [];
  const close = async () => {
    await Promise.all(files.map((file) => file.close()));
  };
  try {
    for (const name of names) files.push(await openSafetensors(join(folder, name), folder));
    const found = new Map<string, Found>();
    const readsImages = textPart(json) !== json;
    for (const file of files) {
      for (const name of file.names) {
        const own = readsImages ? nameInText(name) : name;
        // Old files have the rotary frequencies, which follow from the configuration.
        if (own === undefined || own.endsWith('.rotary_emb.inv_freq')) continue;
        if (found.has(own)) throw corruptModel(`tensor ${quoted(name)} comes twice`);
        found.set(own, { file, name });
      }
    }
    const repeated = config.tiedEmbeddings ? found.get(HEAD) : undefined;
    if (repeated) found.delete(HEAD);
    // Refuses types that cannot be read, before anything is read.
    for (const one of found.values()) placeOf(one);
    const shapes = new Map([...found].map(([own, { file, name }]) => [own, file.shape(name)]));
    const tensors = checkTensors(config, shapes, (tensor) => tensor.hubName);
    // Training can part the two and leave config.json as it was. Some readers then take the head, and some the embedding.
    if (repeated && !(await areEqual(placeOf(repeated), placeOf(found.get(EMBEDDING)!)))) {
      throw unsupportedModel(
        'its head and its embedding differ, and config.json says that they are one (if the head counts, set tie_word_embeddings to false)',
      );
    }
    return {
      ...tensorsInFiles(config, tensors, ({ hubName, hubAdded }) => {
        return { ...placeOf(found.get(hubName)!), added: hubAdded };
      }),
      weightFiles: names.map((name) => join(folder, name)),
      close,
    };
  } catch (error) {
    await close();
    throw error;
  }
}

async function readConfig(folder: string): Promise<{ json: JsonObject; config: ModelConfig }> {
  const json = await requireModelJson(folder, 'config.json', CONFIG_BYTES_MAX);
  return { json, config: configFromHuggingFace(json) };
}

/** The configuration alone, where the weights are not there yet. @throws as {@link openSafetensorsFolder}. */
export const configOfFolder = async (folder: string): Promise<ModelConfig> =>
  (await readConfig(folder)).config;

/** A tied head may be in a file all the same. */
const HEAD = 'lm_head.weight';
const EMBEDDING = 'model.embed_tokens.weight';

type Found = { readonly file: SafetensorsFile; readonly name: string };

const placeOf = ({ file, name }: Found): TensorPlace => file.place(name);

/** A tensor's name in a model that reads text alone; undefined for what reads images. transformers has changed these names. */
function nameInText(name: string): string | undefined {
  const [, own] = /^language_model\.(.*)$/.exec(name) ?? [];
  const [, inModel] = /^model\.language_model\.(.*)$/.exec(name) ?? [];
  const isOfImages = /^(model\.)?(vision_tower|multi_modal_projector)\./.test(name);
  return inModel !== undefined ? `model.${inModel}` : (own ?? (isOfImages ? undefined : name));
}

/** Whether a file's name is that of a shard; repositories number shards in several ways. */
export const isShard = (name: string): boolean =>
  /^model(\.safetensors)?-\d+-of-\d+\.safetensors$/.test(name);

/**
 * The names of the weight files. As in transformers, a single file comes before shards. Sorted, so that the model's hash
 * does not depend on the order of the index.
 */
async function weightFileNames(folder: string): Promise<string[]> {
  const entries = new Set(await readdir(folder));
  if (entries.has(SINGLE_FILE)) return [SINGLE_FILE];
  const index = await readModelJson(folder, INDEX_FILE, INDEX_BYTES_MAX);
  if (index === undefined) {
    const shard = [...entries].find(isShard);
    if (shard !== undefined) throw corruptModel(`its folder has ${shard} and no ${INDEX_FILE}`);
    throw corruptModel('its folder has neither model.safetensors nor its index');
  }
  const names = [...new Set(Object.values((index.weight_map as object | undefined) ?? {}))].sort();
  if (names.length === 0 || names.length > SHARD_COUNT_MAX)
    throw corruptModel(`${INDEX_FILE} names no files`);
  for (const name of names) {
    // Names must be in the folder's listing, so that an index cannot point out of the folder.
    if (typeof name !== 'string' || !name.endsWith('.safetensors') || !entries.has(name)) {
      throw corruptModel(`${INDEX_FILE} names ${quoted(String(name))}, which is not there`);
    }
  }
  return names as string[];
}
