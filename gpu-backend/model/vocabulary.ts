/** The vocabulary arrays of a GGUF file, checked: one token an id, no name twice. */
import type { GgufValue } from './gguf-header.ts';
import { quoted } from './gguf-header.ts';
import { corruptModel } from './model-errors.ts';

export type AddedToken = { readonly id: number; readonly content: string; readonly special: boolean };
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
  // llama.cpp gives a token without a name one that no text spells.
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
