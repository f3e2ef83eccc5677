/**
 * The full sentence encoder (all-MiniLM-L6-v2 and its kind) on ONNX Runtime: the teacher of the static
 * encoder, and the measure of how much the static one keeps.
 */
import { join } from 'node:path';
import { z } from 'zod';
import { type Encoder, normalise } from '../../shared/embedding/encoder.ts';
import { loadWordPiece, type WordPiece } from '../../shared/embedding/wordpiece.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { check } from '../../shared/wire/parse-body.ts';
import { type BertConfig, bertConfigSchema, bertGraph } from '../model/architectures/bert.ts';
import { openSafetensors } from '../model/formats/safetensors.ts';
import { readModelJson, requireModelJson } from '../model/model-source.ts';
import { sha256OfFiles } from '../model/store.ts';
import { encodeModel } from '../onnx/encode.ts';
import { createSession, floats, type Session, tensor } from '../onnx/session.ts';

/* The files of a sentence encoder, read and checked: what is not a mean-pooled, uncased BERT is refused with the reason. */

const CONFIG_BYTES_MAX = 1024 * 1024;
const TOKENIZER_BYTES_MAX = 16 * 1024 * 1024;
/** What sentence-transformers cuts this family at when the folder does not say. */
const TOKENS_MAX_DEFAULT = 256;

type EncoderFolder = {
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
    fitting(name, schema, await requireModelJson(folder, name, bytesMax));
  const optional = async <T>(name: string, schema: z.ZodType<T>) => {
    const json = await readModelJson(folder, name, CONFIG_BYTES_MAX);
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

/** Tokens of one run, padding included: keeps the scratch memory small and the cores busy. */
const BATCH_TOKENS_MAX = 4096;
/** Characters that no word of the token limit reaches past in ordinary text; bounds the tokenizer's work. */
const CHARS_MAX = 16_384;

export type SentenceEncoder = Encoder & {
  readonly vocabulary: readonly string[];
  readonly wordPiece: WordPiece;
  /** Tokens of a text as `embed` cuts it, special ones included. */
  tokenCount(text: string): number;
  /** Vectors of token sequences as they are, special tokens included: not normalised, one a sequence. */
  embedTokens(sequences: readonly (readonly number[])[], signal?: AbortSignal): Promise<Float32Array[]>;
  close(): Promise<void>;
};

/**
 * @param id the encoder's name in mask sets, e.g. `sentence-transformers/all-MiniLM-L6-v2`.
 * @param folder as {@link readEncoderFolder} reads it.
 * @throws MaskrouteError `invalid_encoder`, `corrupt_model` when a file is missing, malformed or of another kind.
 */
export async function loadSentenceEncoder(
  id: string,
  folder: string,
  threads: number,
): Promise<SentenceEncoder> {
  const { config, vocabulary, tokensMax, weightsPath } = await readEncoderFolder(folder);
  const wordPiece = loadWordPiece(vocabulary);
  const session = await buildSession(config, weightsPath, threads);
  const embedTokens = tokenEmbedder(session, config.hidden_size);
  const revision = (await sha256OfFiles([weightsPath])).slice(0, 24);
  return {
    spec: { id, revision, pooling: 'mean', dimensions: config.hidden_size },
    vocabulary,
    wordPiece,
    embedTokens,
    tokenCount: (text) => withSpecialTokens(wordPiece, text, tokensMax).length,
    async embed(texts, signal) {
      const sequences = texts.map((text) => withSpecialTokens(wordPiece, text, tokensMax));
      const vectors = await embedTokens(sequences, signal);
      return vectors.map((vector, i) => (texts[i]!.trim() === '' ? vector.fill(0) : normalise(vector)));
    },
    close: () => session.release(),
  };
}

async function buildSession(config: BertConfig, weightsPath: string, threads: number): Promise<Session> {
  const weights = await openSafetensors(weightsPath).catch((error: Error) => {
    throw invalidEncoder(`${weightsPath} cannot be read (${error.message})`, error);
  });
  try {
    return await createSession(encodeModel(await bertGraph(config, weights)), { threads });
  } catch (error) {
    throw error instanceof RangeError ? invalidEncoder(error.message, error) : error;
  } finally {
    await weights.close();
  }
}

function withSpecialTokens(wordPiece: WordPiece, text: string, tokensMax: number): number[] {
  const ids = wordPiece.tokenIds(text.slice(0, CHARS_MAX)).slice(0, tokensMax - 2);
  return [wordPiece.clsTokenId, ...ids, wordPiece.sepTokenId];
}

/** Sequences of like length run together, so little is spent on padding; the order of results is the caller's. */
function tokenEmbedder(session: Session, dimensions: number): SentenceEncoder['embedTokens'] {
  return async (sequences, signal) => {
    const order = sequences.map((_, i) => i).sort((a, b) => sequences[a]!.length - sequences[b]!.length);
    const results: Float32Array[] = new Array(sequences.length);
    for (let done = 0; done < order.length; ) {
      signal?.throwIfAborted();
      const batch = nextBatch(order, done, sequences);
      const pooled = await runBatch(
        session,
        batch.map((i) => sequences[i]!),
      );
      batch.forEach((i, row) => {
        results[i] = pooled.slice(row * dimensions, (row + 1) * dimensions);
      });
      done += batch.length;
    }
    return results;
  };
}

function nextBatch(order: number[], from: number, sequences: readonly (readonly number[])[]): number[] {
  let to = from + 1;
  while (to < order.length && (to + 1 - from) * sequences[order[to]!]!.length <= BATCH_TOKENS_MAX) to++;
  return order.slice(from, to);
}

/** `[B, H]`, sums over the tokens. */
async function runBatch(session: Session, batch: readonly (readonly number[])[]): Promise<Float32Array> {
  const width = batch.reduce((most, ids) => Math.max(most, ids.length), 0);
  const tokenIds = new BigInt64Array(batch.length * width);
  const tokenMask = new Int32Array(batch.length * width);
  batch.forEach((ids, row) => {
    ids.forEach((id, i) => {
      tokenIds[row * width + i] = BigInt(id);
      tokenMask[row * width + i] = 1;
    });
  });
  const dims = [batch.length, width];
  const feeds = { token_ids: tensor('i64', tokenIds, dims), token_mask: tensor('i32', tokenMask, dims) };
  return floats((await session.run(feeds, ['pooled'])).pooled!);
}
