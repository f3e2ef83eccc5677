/** A GGUF file as a `WeightSource`: header checked, weights read from the disk when asked for. */
import { openRegular } from '../../files.ts';
import { corruptModel, type OpenModelFile } from '../model-source.ts';
import { tensorType } from './dequantize.ts';
import { configFromGguf } from './gguf-config.ts';
import { type GgufHeader, type GgufValue, quoted, readGgufHeader } from './gguf-header.ts';
import { checkLlamaTensors, llamaTensors, toHalfSplitRotary } from './llama-tensors.ts';
import { readTensor } from './safetensors.ts';

type GgufFile = OpenModelFile & { readonly metadata: GgufHeader['metadata'] };

/** @throws MaskrouteError `corrupt_model`, `unsupported_model`; what `openRegular` throws. */
export async function openGguf(path: string): Promise<GgufFile> {
  const file = await openRegular(path);
  try {
    const header = readGgufHeader(file.fd, (await file.stat()).size);
    const config = configFromGguf(header);
    const tensors = new Map(llamaTensors(config).map((tensor) => [tensor.name, tensor]));
    const shapes = new Map([...header.tensors.values()].map(({ name, shape }) => [name, shape]));
    checkLlamaTensors([...tensors.values()], shapes, (tensor) => tensor.ggufName);

    const find = (name: string) => {
      const tensor = tensors.get(name);
      if (tensor === undefined) throw new RangeError(`the model has no tensor ${name}`);
      return tensor;
    };
    return {
      config,
      metadata: header.metadata,
      weightFiles: [path],
      has: (name) => tensors.has(name),
      shape: (name) => find(name).shape,
      async read(name) {
        const tensor = find(name);
        const stored = header.tensors.get(tensor.ggufName)!;
        const elements = tensor.shape.reduce((product, size) => product * size, 1);
        const values = await readTensor(file, name, tensorType(stored.type)!, stored.offset, elements);
        if (tensor.rotaryHeads === undefined) return values;
        return toHalfSplitRotary(values, tensor.rotaryHeads, tensor.shape[1]!);
      },
      close: () => file.close(),
    };
  } catch (error) {
    await file.close();
    throw error;
  }
}

/* The vocabulary arrays of a GGUF file, checked: one token an id, no name twice. */

type AddedToken = { readonly id: number; readonly content: string; readonly special: boolean };
export type Vocabulary = {
  readonly tokens: readonly string[];
  readonly idOf: ReadonlyMap<string, number>;
  /** `TOKEN_TYPES` by id. */
  readonly types: readonly number[];
  /** Tokens that are cut out of the text before any merging: control tokens and user-defined ones. */
  readonly added: readonly AddedToken[];
};

/** Values of `tokenizer.ggml.token_type` (llama.h, `llama_token_type`). */
export const TOKEN_TYPES = { normal: 1, unknown: 2, control: 3, userDefined: 4, unused: 5, byte: 6 } as const;

/** The longest real ones are runs of spaces or of one sign, some hundred characters. */
const TOKEN_CHARS_MAX = 1024;

/** `rows`: the rows of the embedding, which no id may pass. @throws MaskrouteError `corrupt_model`. */
export function readVocabulary(metadata: ReadonlyMap<string, GgufValue>, rows: number): Vocabulary {
  const names = stringArray(metadata, 'tokenizer.ggml.tokens');
  if (names.length === 0 || names.length > rows) {
    throw corruptModel(`its vocabulary has ${names.length} tokens, its embedding ${rows} rows`);
  }
  const types = numberArray(metadata, 'tokenizer.ggml.token_type') ?? names.map(() => TOKEN_TYPES.normal);
  if (types.length < names.length)
    throw corruptModel('tokenizer.ggml.token_type is shorter than the vocabulary');
  // A token without a name gets a name that no text spells, as llama.cpp does.
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
    // llama.cpp looks for these three kinds in a text (llama-vocab.cpp, cache_special_tokens).
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
