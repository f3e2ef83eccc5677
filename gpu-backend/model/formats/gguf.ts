/**
 * Opens a GGUF file, whole or in parts (llama-gguf-split), as a `WeightSource`. Headers are checked at opening; weights are
 * read from disk when needed.
 */
import type { FileHandle } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { openRegular } from '../../files.ts';
import { checkTensors } from '../families.ts';
import { corruptModel, type OpenModelFile, quoted, type TensorPlace } from '../model-source.ts';
import { configFromGguf, ROPE_FACTORS } from './gguf-config.ts';
import { type GgufHeader, type GgufTensor, type GgufValue, readGgufHeader } from './gguf-header.ts';
import { readTensor, tensorsInFiles } from './tensor-parts.ts';

type GgufFile = OpenModelFile & { readonly metadata: GgufHeader['metadata'] };

/** `path`: the file, or any of its parts. @throws MaskrouteError `corrupt_model`, `unsupported_model`; what `openRegular` throws. */
export async function openGguf(path: string): Promise<GgufFile> {
  const files: FileHandle[] = [];
  const close = async () => {
    await Promise.all(files.map((file) => file.close()));
  };
  try {
    const parts = await openParts(path, files);
    const stored = allTensors(parts);
    const { metadata } = parts[0]!.header;
    const config = configFromGguf({ metadata, tensors: stored }, await ropeFactorsOf(stored));
    const shapes = new Map([...stored.values()].map(({ name, shape }) => [name, shape]));
    shapes.delete(ROPE_FACTORS);
    const tensors = checkTensors(config, shapes, (tensor) => tensor.ggufName);
    return {
      ...tensorsInFiles(config, tensors, ({ ggufName, interleavedHeads }) =>
        placeOf(stored.get(ggufName)!, interleavedHeads),
      ),
      metadata,
      weightFiles: parts.map((part) => part.path),
      close,
    };
  } catch (error) {
    await close();
    throw error;
  }
}

/** There is one factor for each rotary frequency; real heads have some hundred at most. */
const ROPE_FACTORS_MAX = 4096;

async function ropeFactorsOf(stored: ReadonlyMap<string, StoredTensor>): Promise<number[] | undefined> {
  const tensor = stored.get(ROPE_FACTORS);
  if (tensor === undefined) return undefined;
  if (tensor.shape.length !== 1 || tensor.shape[0]! > ROPE_FACTORS_MAX) {
    throw corruptModel(`tensor ${ROPE_FACTORS} is [${tensor.shape.join()}]`);
  }
  return Array.from(await readTensor(placeOf(tensor, undefined)));
}

type Part = { readonly path: string; readonly file: FileHandle; readonly header: GgufHeader };
type StoredTensor = GgufTensor & { readonly file: FileHandle };

const placeOf = (
  { file, name, type, offset, shape }: StoredTensor,
  interleavedHeads: number | undefined,
): TensorPlace => ({ name, descriptor: file.fd, offset, type, shape, interleavedHeads, added: 0, scale: 1 });

type PartName = {
  readonly stem: string;
  /** From 1 on. */
  readonly number: number;
  readonly count: number;
  /** The name of another part. */
  nameOf(number: number): string;
};

/** What the name of a file in parts says, as llama-gguf-split writes it; undefined for any other name. */
export function ggufPart(name: string): PartName | undefined {
  const [, stem, number, count, ending] = /^(.*)-(\d{5})-of-(\d{5})(\.gguf)$/i.exec(name) ?? [];
  if (stem === undefined || Number(number) < 1 || Number(number) > Number(count)) return undefined;
  const nameOf = (other: number) => `${stem}-${padded(other)}-of-${count}${ending}`;
  return { stem, number: Number(number), count: Number(count), nameOf };
}

/** A file's name without its ending and the number of its part. */
export const ggufStem = (name: string): string => ggufPart(name)?.stem ?? name.replace(/\.gguf$/i, '');

const PART_COUNT_MAX = 1000;

/** All parts in order; the first has the metadata. Opened files are added to `files`, also when this throws. */
async function openParts(path: string, files: FileHandle[]): Promise<Part[]> {
  const one = await openPart(path, undefined, files);
  const count = countOf(one.header, 'split.count') ?? 1;
  if (count <= 1) return [one];
  if (count > PART_COUNT_MAX) throw corruptModel(`it claims to be one of ${count} parts`);
  const named = ggufPart(basename(path));
  if (named?.count !== count) {
    throw corruptModel(
      `it is one of ${count} parts, which must be named NAME-00001-of-${padded(count)}.gguf and so on`,
    );
  }
  const folder = dirname(path);
  const parts: Part[] = [];
  for (let i = 0; i < count; i++) {
    const name = named.nameOf(i + 1);
    const part =
      i + 1 === named.number
        ? one
        : await openPart(join(folder, name), folder, files).catch(unlessAbsent(name));
    const says = [countOf(part.header, 'split.no'), countOf(part.header, 'split.count')];
    if (says.join() !== `${i},${count}`) {
      throw corruptModel(`${name} says that it is part ${(says[0] ?? 0) + 1} of ${says[1] ?? 1}`);
    }
    parts.push(part);
  }
  return parts;
}

const padded = (number: number): string => String(number).padStart(5, '0');

async function openPart(path: string, folder: string | undefined, files: FileHandle[]): Promise<Part> {
  const file = await openRegular(path, folder);
  files.push(file);
  return { path, file, header: readGgufHeader(file.fd, (await file.stat()).size) };
}

const unlessAbsent =
  (name: string) =>
  (error: NodeJS.ErrnoException): never => {
    throw error.code === 'ENOENT' ? corruptModel(`its part ${name} is missing`) : error;
  };

function countOf({ metadata }: GgufHeader, key: string): number | undefined {
  const value = metadata.get(key);
  if (value === undefined) return undefined;
  const number = Number(value);
  if (Number.isInteger(number) && number >= 0) return number;
  throw corruptModel(`${key} is ${quoted(String(value))}`);
}

function allTensors(parts: readonly Part[]): Map<string, StoredTensor> {
  const tensors = new Map<string, StoredTensor>();
  for (const { file, header } of parts) {
    for (const [name, tensor] of header.tensors) {
      if (tensors.has(name)) throw corruptModel(`tensor ${quoted(name)} is in two parts`);
      tensors.set(name, { ...tensor, file });
    }
  }
  const announced = parts.length > 1 ? countOf(parts[0]!.header, 'split.tensors.count') : undefined;
  if (announced !== undefined && announced !== tensors.size) {
    throw corruptModel(`its parts hold ${tensors.size} tensors, not ${announced}`);
  }
  return tensors;
}

/* Reads the vocabulary arrays of a GGUF file, and checks that no token comes twice. */

type AddedToken = { readonly id: number; readonly content: string; readonly special: boolean };
export type Vocabulary = {
  readonly tokens: readonly string[];
  readonly idOf: ReadonlyMap<string, number>;
  /** Values of `TOKEN_TYPES`, by id. */
  readonly types: readonly number[];
  /** Tokens that are matched in the text before it is split: control, unknown and user-defined tokens. */
  readonly added: readonly AddedToken[];
};

/** Values of `tokenizer.ggml.token_type` (llama.h, `llama_token_type`). */
export const TOKEN_TYPES = { normal: 1, unknown: 2, control: 3, userDefined: 4, unused: 5, byte: 6 } as const;

/** The longest tokens of real models are runs of one character, some hundred long. */
const TOKEN_CHARS_MAX = 1024;

/** `rows`: the rows of the embedding, at least as many as tokens. @throws MaskrouteError `corrupt_model`. */
export function readVocabulary(metadata: ReadonlyMap<string, GgufValue>, rows: number): Vocabulary {
  const names = stringArray(metadata, 'tokenizer.ggml.tokens');
  if (names.length === 0 || names.length > rows) {
    throw corruptModel(`its vocabulary has ${names.length} tokens, its embedding ${rows} rows`);
  }
  const types = numberArray(metadata, 'tokenizer.ggml.token_type') ?? names.map(() => TOKEN_TYPES.normal);
  if (types.length < names.length)
    throw corruptModel('tokenizer.ggml.token_type is shorter than the vocabulary');
  // As in llama.cpp, an empty token gets a name, which no text should contain.
  const tokens = names.map((name, id) => (name === '' ? `[EMPTY_${id}]` : name));
  const long = tokens.findIndex((token) => token.length > TOKEN_CHARS_MAX);
  if (long !== -1) throw corruptModel(`token ${long} has ${tokens[long]!.length} characters`);
  const idOf = new Map<string, number>();
  const added: AddedToken[] = [];
  tokens.forEach((content, id) => {
    const other = idOf.get(content);
    if (other !== undefined) throw corruptModel(`token ${quoted(content)} has the ids ${other} and ${id}`);
    idOf.set(content, id);
    const type = types[id];
    if (names[id] === '') return;
    // llama.cpp matches these three types in a text (llama-vocab.cpp, cache_special_tokens).
    if (type === TOKEN_TYPES.control || type === TOKEN_TYPES.unknown)
      added.push({ id, content, special: true });
    if (type === TOKEN_TYPES.userDefined) added.push({ id, content, special: false });
  });
  return { tokens, idOf, types, added };
}

export function stringArray(metadata: ReadonlyMap<string, GgufValue>, key: string): readonly string[] {
  const value = metadata.get(key);
  if (!Array.isArray(value) || value.some((item) => typeof item !== 'string')) {
    throw corruptModel(`${key} is not a list of strings`);
  }
  return value as readonly string[];
}

export function numberArray(
  metadata: ReadonlyMap<string, GgufValue>,
  key: string,
): readonly number[] | undefined {
  const value = metadata.get(key);
  if (value === undefined) return undefined;
  if (!Array.isArray(value) || value.some((item) => typeof item !== 'number')) {
    throw corruptModel(`${key} is not a list of numbers`);
  }
  return value as readonly number[];
}
