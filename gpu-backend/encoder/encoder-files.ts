/**
 * Reads and checks the files of a sentence encoder: its tokenizer, its pooling, and the prefix of its texts. Anything but
 * a BERT with mean or CLS pooling is refused with the reason.
 */
import { join } from 'node:path';
import { z } from 'zod';
import { loadWordPiece, type WordPiece } from '../../shared/embedding/wordpiece.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { check } from '../../shared/wire/parse-body.ts';
import { sizeOf } from '../files.ts';
import { type BertConfig, bertConfigSchema, type Pooling } from '../model/architectures/bert.ts';
import {
  type JsonObject,
  quoted,
  readModelJson,
  readModelText,
  requireModelJson,
} from '../model/model-source.ts';
import { createTokenizer } from '../model/tokenizer/tokenizer.ts';

const CONFIG_BYTES_MAX = 1024 * 1024;
const TOKENIZER_BYTES_MAX = 32 * 1024 * 1024;

/** Text to ids without special tokens, and the special tokens before (`first`) and after (`last`) a text. */
export type EncoderTokenizer = {
  ids(text: string): readonly number[];
  readonly first: number;
  readonly last: number;
};

type EncoderFolder = {
  readonly config: BertConfig;
  readonly pooling: Pooling;
  /** Put before every text. */
  readonly prefix: string;
  readonly tokenizer: EncoderTokenizer;
  /** Tokens in id order, and the WordPiece tokenizer; undefined for other tokenizers. */
  readonly wordPiece: { readonly vocabulary: readonly string[]; readonly pieces: WordPiece } | undefined;
  /** Longest sequence, special tokens included; longer texts are truncated. */
  readonly tokensMax: number;
  readonly weights: { readonly kind: 'safetensors' | 'onnx'; readonly path: string };
};

/** Defaults of families whose folders do not say; from their model cards. The first matching name counts. */
const FAMILIES: readonly {
  readonly name: RegExp;
  readonly pooling: Pooling;
  readonly prefix: string;
  readonly tokensMax: number;
}[] = [
  { name: /(^|\/)bge-/i, pooling: 'cls', prefix: '', tokensMax: 512 },
  // E5 is trained with the prefixes "query: " and "passage: "; its card wants "query: " for symmetric similarity.
  { name: /(^|\/)(multilingual-)?e5-/i, pooling: 'mean', prefix: 'query: ', tokensMax: 512 },
  // sentence-transformers truncates texts at 256 tokens for MiniLM.
  { name: /(?:)/, pooling: 'mean', prefix: '', tokensMax: 256 },
];

/** The family of an encoder's name, such as `BAAI/bge-small-en-v1.5`. */
export const familyOf = (id: string) => FAMILIES.find(({ name }) => name.test(id))!;

const wordPieceSchema = z.looseObject({
  normalizer: z.looseObject({ type: z.literal('BertNormalizer'), lowercase: z.literal(true) }),
  pre_tokenizer: z.looseObject({ type: z.literal('BertPreTokenizer') }),
  model: z.looseObject({
    type: z.literal('WordPiece').default('WordPiece'),
    vocab: z.record(z.string(), z.int().min(0)),
  }),
});
const unigramSchema = z.looseObject({
  model: z.looseObject({
    type: z.literal('Unigram'),
    vocab: z.array(z.tuple([z.string(), z.number()])).min(1),
    unk_id: z.int().min(0),
  }),
});
const onlyOne = (mode: object): boolean =>
  Object.entries(mode).filter(([name, isOn]) => name.startsWith('pooling_mode_') && isOn === true).length ===
  1;
const poolingSchema = z
  .looseObject({
    pooling_mode_cls_token: z.boolean().default(false),
    pooling_mode_mean_tokens: z.boolean().default(false),
  })
  // With several modes, sentence-transformers concatenates their vectors.
  .refine((mode) => onlyOne(mode) && (mode.pooling_mode_cls_token || mode.pooling_mode_mean_tokens), {
    error: 'it pools neither by the mean nor by the first token',
  });
const limitsSchema = z.looseObject({ max_seq_length: z.int().min(2).nullish() });
/** The pipeline of sentence-transformers, `modules.json`. */
const modulesSchema = z.array(z.looseObject({ type: z.string() })).max(100);
const KNOWN_MODULES: ReadonlySet<string> = new Set(['Transformer', 'Pooling', 'Normalize']);
const promptsSchema = z.looseObject({
  prompts: z.record(z.string(), z.string().max(1000)).nullish(),
  default_prompt_name: z.string().nullish(),
});

/**
 * @param id the encoder's name, e.g. `BAAI/bge-small-en-v1.5`.
 * @param folder holds `config.json`, `tokenizer.json` and `model.safetensors` or an ONNX file; where
 * sentence-transformers' own files are there too (pooling, length limit, prompts), they are honoured.
 * @throws MaskrouteError `invalid_encoder`, `corrupt_model`.
 */
export async function readEncoderFolder(folder: string, id: string): Promise<EncoderFolder> {
  const optional = async <T>(name: string, schema: z.ZodType<T>) => {
    const json = await readModelJson(folder, name, CONFIG_BYTES_MAX);
    return json === undefined ? undefined : fitting(name, schema, json);
  };
  const config = fitting(
    'config.json',
    bertConfigSchema,
    await requireModelJson(folder, 'config.json', CONFIG_BYTES_MAX),
  );
  const family = familyOf(id);
  const pools = await optional('1_Pooling/config.json', poolingSchema);
  const limits = await optional('sentence_bert_config.json', limitsSchema);
  const prompts = await optional('config_sentence_transformers.json', promptsSchema);
  const named = prompts?.prompts?.[prompts.default_prompt_name ?? ''];
  await requireKnownModules(folder);
  const tokenizerJson = await requireModelJson(folder, 'tokenizer.json', TOKENIZER_BYTES_MAX);
  return {
    config,
    pooling: pools === undefined ? family.pooling : pools.pooling_mode_cls_token ? 'cls' : 'mean',
    prefix: named ?? family.prefix,
    ...readTokenizer(tokenizerJson, config),
    tokensMax: Math.min(limits?.max_seq_length ?? family.tokensMax, config.max_position_embeddings),
    weights: await weightsIn(folder),
  };
}

/** Refuses other modules, such as a dense layer after the pooling. @throws MaskrouteError `invalid_encoder`. */
async function requireKnownModules(folder: string): Promise<void> {
  const text = await readModelText(folder, 'modules.json', CONFIG_BYTES_MAX);
  if (text === undefined) return;
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (error) {
    throw invalidEncoder('modules.json is not JSON', error);
  }
  for (const { type } of fitting('modules.json', modulesSchema, json)) {
    const kind = type.split('.').at(-1)!;
    if (!KNOWN_MODULES.has(kind)) throw invalidEncoder(`it has a module of the kind ${quoted(kind)}`);
  }
}

type Tokenizers = Pick<EncoderFolder, 'tokenizer' | 'wordPiece'>;

function readTokenizer(json: JsonObject, config: BertConfig): Tokenizers {
  if ((json.model as { type?: unknown } | undefined)?.type === 'Unigram') {
    return { tokenizer: unigram(json, config), wordPiece: undefined };
  }
  const { model } = fitting('tokenizer.json', wordPieceSchema, json);
  const vocabulary = inIdOrder(model.vocab, config.vocab_size);
  const pieces = loadWordPiece(vocabulary);
  return {
    wordPiece: { vocabulary, pieces },
    tokenizer: {
      ids: (text) => pieces.tokenIds(text),
      first: pieces.clsTokenId,
      last: pieces.sepTokenId,
    },
  };
}

function unigram(json: JsonObject, config: BertConfig): EncoderTokenizer {
  const { model } = fitting('tokenizer.json', unigramSchema, json);
  if (model.vocab.length > config.vocab_size) {
    throw invalidEncoder(
      `its tokenizer has ${model.vocab.length} pieces, its embedding ${config.vocab_size} rows`,
    );
  }
  try {
    const tokenizer = createTokenizer(json, {});
    const [first, last, ...others] = tokenizer.encode('');
    if (first === undefined || last === undefined || others.length > 0) {
      throw new Error('it does not put one token before a text and one behind');
    }
    return { ids: (text) => [...tokenizer.encode(text, { addSpecial: false })], first, last };
  } catch (error) {
    throw invalidEncoder(`its tokenizer cannot be read (${(error as Error).message})`, error);
  }
}

function inIdOrder(vocabulary: Readonly<Record<string, number>>, size: number): string[] {
  const entries = Object.entries(vocabulary);
  if (entries.length !== size)
    throw invalidEncoder(`its vocabulary has ${entries.length} tokens, not ${size}`);
  const tokens = new Array<string>(size);
  for (const [token, id] of entries) {
    if (id >= size || tokens[id] !== undefined) throw invalidEncoder(`its vocabulary gives id ${id} wrongly`);
    tokens[id] = token;
  }
  return tokens;
}

const WEIGHTS = [
  ['safetensors', 'model.safetensors'],
  ['onnx', 'onnx/model.onnx'],
  ['onnx', 'model.onnx'],
] as const;

async function weightsIn(folder: string): Promise<EncoderFolder['weights']> {
  for (const [kind, name] of WEIGHTS) {
    const path = join(folder, name);
    if ((await sizeOf(path)) !== undefined) return { kind, path };
  }
  return { kind: 'safetensors', path: join(folder, 'model.safetensors') };
}

function fitting<T>(name: string, schema: z.ZodType<T>, json: unknown): T {
  const checked = check(schema, json, 'the file');
  if (checked.kind === 'good') return checked.value;
  throw invalidEncoder(`${name}: ${checked.message}`);
}

export const invalidEncoder = (reason: string, cause?: unknown): MaskrouteError =>
  new MaskrouteError('invalid_encoder', `The encoder cannot be used: ${reason}.`, { cause });
