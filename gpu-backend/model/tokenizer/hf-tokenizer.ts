/** Reads the tokenizer of a Hugging Face folder: tokenizer.json, tokenizer_config.json and files about special tokens. */
import { z } from 'zod';
import { check } from '../../../shared/wire/parse-body.ts';
import {
  corruptModel,
  type JsonObject,
  readModelJson,
  readModelText,
  requireModelJson,
  unsupportedModel,
} from '../model-source.ts';
import type { ImportedTokenizer } from './gguf-tokenizer.ts';
import { isEndOfAnswerName, textOrNull } from './gguf-tokenizer.ts';
import { byteLevelOnly, GPT2_PATTERN, splitPattern } from './text-pieces.ts';
import { vocabularyOf } from './token-bytes.ts';
import { createTokenizer, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, type Tokenizer } from './tokenizer.ts';

const SPECIAL_TOKENS_FILE = 'special_tokens_map.json';
const TOKENIZER_BYTES_MAX = 64 * 1024 * 1024;
const CONFIG_BYTES_MAX = 4 * 1024 * 1024;

const tokenizerSchema = z.looseObject({
  model: z.union([
    z.looseObject({ type: z.literal('BPE'), vocab: z.record(z.string(), z.int().min(0)) }),
    z.looseObject({
      type: z.literal('Unigram'),
      vocab: z.array(z.tuple([z.string(), z.number()])).min(1),
      unk_id: z.int().min(0),
    }),
  ]),
  added_tokens: z
    .array(z.looseObject({ id: z.int().min(0), content: z.string(), special: z.boolean() }))
    .default([]),
  pre_tokenizer: z.unknown(),
  decoder: z.union([
    z.looseObject({ type: z.enum(['ByteLevel', 'Metaspace']) }),
    // SentencePiece vocabularies (Llama 2 and similar).
    z.looseObject({
      type: z.literal('Sequence'),
      decoders: z
        .array(z.looseObject({ type: z.enum(['Replace', 'ByteFallback', 'Fuse', 'Strip']) }))
        .refine((parts) => parts.some((part) => part.type === 'ByteFallback')),
    }),
  ]),
});

/** Gemma 3's tokenizer is the same for all sizes. Those that read text alone have no row for this one. */
const TOKEN_OF_IMAGES = '<image_soft_token>';

/** `rows`: the rows of the embedding. @throws MaskrouteError `unsupported_model`, `corrupt_model`. */
export async function tokenizerFromFolder(folder: string, rows: number): Promise<ImportedTokenizer> {
  const raw = await readModelJson(folder, TOKENIZER_FILE, TOKENIZER_BYTES_MAX);
  if (raw === undefined) throw unsupportedModel(`its folder has no ${TOKENIZER_FILE}`);
  const checked = check(tokenizerSchema, raw, 'the file');
  if (checked.kind === 'bad') {
    throw unsupportedModel(`${TOKENIZER_FILE} is neither byte-level nor SentencePiece (${checked.message})`);
  }
  const { model } = checked.value;
  const isLacking = ({ id, content }: { readonly id: number; readonly content: string }) =>
    content === TOKEN_OF_IMAGES && id >= rows;
  const added = checked.value.added_tokens.filter((token) => !isLacking(token));
  const ids = vocabularyOf(raw).map(([, id]) => id);
  // `Math.max(...ids)` would overflow the stack.
  const highest = [...ids, ...added.map((token) => token.id)].reduce((most, id) => Math.max(most, id), -1);
  if (highest >= rows) throw corruptModel(`its tokenizer has the id ${highest}, its embedding ${rows} rows`);

  const exact = model.type === 'BPE' ? exactPreTokenizer(raw.pre_tokenizer) : raw.pre_tokenizer;
  const tokenizerJson = { ...raw, added_tokens: added, pre_tokenizer: exact };
  const tokenizerConfig = (await readModelJson(folder, TOKENIZER_CONFIG_FILE, CONFIG_BYTES_MAX)) ?? {};
  const tokenizer = tokenizerFrom(tokenizerJson, tokenizerConfig);
  // Fields that tokenizer_config.json lacks come from the older special_tokens_map.json.
  const named = {
    ...(await readModelJson(folder, SPECIAL_TOKENS_FILE, CONFIG_BYTES_MAX)),
    ...tokenizerConfig,
  };
  const idOf = (value: unknown): number | undefined => {
    const name = typeof value === 'string' ? value : (value as { content?: unknown } | null)?.content;
    return typeof name === 'string' ? tokenizer.tokenId(name) : undefined;
  };
  const bosTokenId = idOf(named.bos_token) ?? null;
  // The tokenizer's own EOS comes first, as templates see it as `eos_token`.
  const eosTokenIds = new Set([idOf(named.eos_token), ...(await declaredEos(folder))]);
  for (const token of added) if (token.special && isEndOfAnswerName(token.content)) eosTokenIds.add(token.id);
  const ends = [...eosTokenIds].filter((id) => id !== undefined && id < rows) as number[];
  if (ends.length === 0) throw unsupportedModel('it names no token that ends an answer');
  return {
    tokenizerJson,
    tokenizerConfig: { ...tokenizerConfig, chat_template: undefined },
    chatTemplate: await chatTemplateOf(folder, tokenizerConfig),
    bosTokenId,
    eosTokenIds: ends,
    addBos: bosTokenId !== null && tokenizer.encode('')[0] === bosTokenId,
  };
}

function tokenizerFrom(json: object, config: object): Tokenizer {
  try {
    return createTokenizer(json, config);
  } catch (error) {
    throw unsupportedModel(`its tokenizer cannot be read (${(error as Error).message})`);
  }
}

const eosSchema = z.union([z.int().min(0), z.array(z.int().min(0)).max(100)]).nullish();

/** generation_config.json has all ids that end an answer; config.json often only one. */
async function declaredEos(folder: string): Promise<number[]> {
  const generation = await readModelJson(folder, 'generation_config.json', CONFIG_BYTES_MAX);
  const config = await requireModelJson(folder, 'config.json', CONFIG_BYTES_MAX);
  const value = eosSchema.safeParse(generation?.eos_token_id ?? config.eos_token_id);
  if (!value.success) throw corruptModel('eos_token_id is neither an id nor a list of ids');
  return [value.data ?? []].flat();
}

/** An empty template is none: every conversation would become nothing. */
async function chatTemplateOf(folder: string, config: JsonObject): Promise<string | null> {
  const text = await readModelText(folder, 'chat_template.jinja', CONFIG_BYTES_MAX);
  if (text) return text;
  const value = config.chat_template;
  if (!Array.isArray(value)) return textOrNull(value);
  const named = value as { name?: unknown; template?: unknown }[];
  const template = (named.find((entry) => entry?.name === 'default') ?? named[0])?.template;
  return textOrNull(template);
}

/**
 * The same pre-tokenizer in parts that @huggingface/tokenizers applies exactly: its `Digits` splits ASCII digits only, and
 * its `ByteLevel` uses JavaScript's definition of white space.
 */
function exactPreTokenizer(json: unknown): unknown {
  if (json === null || typeof json !== 'object') return json;
  const part = json as JsonObject;
  switch (part.type) {
    case 'Sequence':
      if (!Array.isArray(part.pretokenizers))
        throw unsupportedModel('its pre-tokenizer is a sequence without parts');
      return { ...part, pretokenizers: part.pretokenizers.map(exactPreTokenizer) };
    case 'Digits':
      return splitPattern(part.individual_digits === true ? '\\p{N}' : '\\p{N}+');
    case 'ByteLevel':
      if (part.use_regex === false || part.add_prefix_space === true) return part;
      return { type: 'Sequence', pretokenizers: [splitPattern(GPT2_PATTERN), byteLevelOnly] };
    case 'Split':
      return part;
    case 'Metaspace':
      if (part.split === false) return part;
      throw unsupportedModel('its pre-tokenizer Metaspace splits at spaces');
    default:
      throw unsupportedModel(`its pre-tokenizer is of the kind ${JSON.stringify(part.type)}`);
  }
}
