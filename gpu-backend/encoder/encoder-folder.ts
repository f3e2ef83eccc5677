/** The files of a sentence encoder, read and checked: what is not a mean-pooled, uncased BERT is refused with the reason. */
import { join } from 'node:path';
import { z } from 'zod';
import { MaskrouteError } from '../../shared/errors.ts';
import { check } from '../../shared/parse-body.ts';
import type { BertConfig } from '../model/architectures/bert.ts';
import { bertConfigSchema } from '../model/architectures/bert.ts';
import { readJsonFile, requireJsonFile } from '../model/read-json.ts';

const CONFIG_BYTES_MAX = 1024 * 1024;
const TOKENIZER_BYTES_MAX = 16 * 1024 * 1024;
/** What sentence-transformers cuts this family at when the folder does not say. */
const TOKENS_MAX_DEFAULT = 256;

export type EncoderFolder = {
  readonly config: BertConfig;
  /** Tokens in id order. */
  readonly vocabulary: readonly string[];
  /** Longer texts are cut, special tokens included. */
  readonly tokensMax: number;
  readonly weightsPath: string;
};

const tokenizerSchema = z.looseObject({
  normalizer: z.looseObject({ type: z.literal('BertNormalizer'), lowercase: z.literal(true) }),
  pre_tokenizer: z.looseObject({ type: z.literal('BertPreTokenizer') }),
  model: z.looseObject({
    type: z.literal('WordPiece').default('WordPiece'),
    vocab: z.record(z.string(), z.int().min(0)),
  }),
});
const poolingSchema = z.looseObject({ pooling_mode_mean_tokens: z.literal(true) });
const limitsSchema = z.looseObject({ max_seq_length: z.int().min(2) });

/**
 * @param folder holds `config.json`, `tokenizer.json` and `model.safetensors`; where sentence-transformers' own
 * files are there too (pooling, length limit), they are honoured.
 * @throws MaskrouteError `invalid_encoder`, `corrupt_model`.
 */
export async function readEncoderFolder(folder: string): Promise<EncoderFolder> {
  const required = async <T>(name: string, schema: z.ZodType<T>, bytesMax: number) =>
    fitting(name, schema, await requireJsonFile(join(folder, name), bytesMax));
  const optional = async <T>(name: string, schema: z.ZodType<T>) => {
    const json = await readJsonFile(join(folder, name), CONFIG_BYTES_MAX);
    return json === undefined ? undefined : fitting(name, schema, json);
  };
  const config = await required('config.json', bertConfigSchema, CONFIG_BYTES_MAX);
  const tokenizer = await required('tokenizer.json', tokenizerSchema, TOKENIZER_BYTES_MAX);
  await optional('1_Pooling/config.json', poolingSchema);
  const limits = await optional('sentence_bert_config.json', limitsSchema);
  return {
    config,
    vocabulary: inIdOrder(tokenizer.model.vocab, config.vocab_size),
    tokensMax: Math.min(limits?.max_seq_length ?? TOKENS_MAX_DEFAULT, config.max_position_embeddings),
    weightsPath: join(folder, 'model.safetensors'),
  };
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

function fitting<T>(name: string, schema: z.ZodType<T>, json: unknown): T {
  const checked = check(schema, json, 'the file');
  if (checked.kind === 'good') return checked.value;
  throw invalidEncoder(`${name}: ${checked.message}`);
}

export const invalidEncoder = (reason: string, cause?: unknown): MaskrouteError =>
  new MaskrouteError('invalid_encoder', `The encoder cannot be used: ${reason}.`, { cause });
