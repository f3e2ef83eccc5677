/**
 * The full sentence encoder (all-MiniLM-L6-v2 and its kind) on ONNX Runtime: the teacher of the static
 * encoder, and the measure of how much the static one keeps.
 */
import { createHash } from 'node:crypto';
import { readFile } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { z } from 'zod';
import type { Encoder } from '../../shared/embedding/encoder.ts';
import { normalise } from '../../shared/embedding/pool.ts';
import type { WordPiece } from '../../shared/embedding/wordpiece.ts';
import { loadWordPiece } from '../../shared/embedding/wordpiece.ts';
import { MaskrouteError } from '../../shared/errors.ts';
import type { BertConfig } from '../model/architectures/bert.ts';
import { bertConfigSchema, bertGraph } from '../model/architectures/bert.ts';
import { encodeModel } from '../onnx/encode.ts';
import type { Session } from '../onnx/session.ts';
import { createSession, floats, tensor } from '../onnx/session.ts';
import { openEncoderWeights } from './encoder-weights.ts';

/** What sentence-transformers cuts this family at. */
const TOKENS_MAX_DEFAULT = 256;
/** Tokens of one run, padding included: keeps the scratch memory small and the cores busy. */
const BATCH_TOKENS_MAX = 4096;
/** Characters beyond which no text has fewer than the token limit's worth of words; bounds the tokenizer's work. */
const CHARS_MAX = 16_384;

export type SentenceEncoder = Encoder & {
  readonly vocabulary: readonly string[];
  readonly wordPiece: WordPiece;
  /** Vectors of token sequences as they are, special tokens included: not normalised, `[count][dimensions]`. */
  embedTokens(sequences: readonly (readonly number[])[], signal?: AbortSignal): Promise<Float32Array[]>;
  close(): Promise<void>;
};

/**
 * @param folder holds `config.json`, `model.safetensors` and `vocab.txt` (as sentence-transformers lays them out).
 * @throws MaskrouteError `invalid_encoder` when a file is missing, malformed or of another kind.
 */
export async function loadSentenceEncoder(folder: string, threads: number): Promise<SentenceEncoder> {
  const config = await readConfig(join(folder, 'config.json'), bertConfigSchema);
  const pooling = await readConfig(
    join(folder, '1_Pooling', 'config.json'),
    z.looseObject({ pooling_mode_mean_tokens: z.literal(true) }),
  );
  const limits = await readConfig(
    join(folder, 'sentence_bert_config.json'),
    z.looseObject({ max_seq_length: z.int().min(2).default(TOKENS_MAX_DEFAULT) }),
  );
  void pooling;
  const words = await readText(join(folder, 'vocab.txt'));
  const vocabulary = words.replace(/\n$/, '').split('\n');
  if (vocabulary.length !== config.vocab_size) {
    throw invalid(`vocab.txt has ${vocabulary.length} tokens, config.json says ${config.vocab_size}`);
  }
  const weightsPath = join(folder, 'model.safetensors');
  const session = await buildSession(config, weightsPath, threads);
  const wordPiece = loadWordPiece(vocabulary);
  const tokensMax = Math.min(limits.max_seq_length, config.max_position_embeddings);
  const embedTokens = tokenEmbedder(session, config.hidden_size);
  return {
    spec: {
      id: `sentence-transformers/${basename(folder) === 'model' ? 'all-MiniLM-L6-v2' : basename(folder)}`,
      revision: createHash('sha256')
        .update(await readFile(weightsPath))
        .digest('hex')
        .slice(0, 24),
      pooling: 'mean',
      dimensions: config.hidden_size,
    },
    vocabulary,
    wordPiece,
    embedTokens,
    async embed(texts, signal) {
      const sequences = texts.map((text) => withSpecialTokens(wordPiece, text, tokensMax));
      const vectors = await embedTokens(sequences, signal);
      return vectors.map((vector, i) => (texts[i]!.trim() === '' ? vector.fill(0) : normalise(vector)));
    },
    close: () => session.release(),
  };
}

async function buildSession(config: BertConfig, weightsPath: string, threads: number): Promise<Session> {
  const weights = await openEncoderWeights(weightsPath);
  try {
    return await createSession(encodeModel(await bertGraph(config, weights)), { threads });
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
    let done = 0;
    while (done < order.length) {
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

function nextBatch(
  order: readonly number[],
  from: number,
  sequences: readonly (readonly number[])[],
): number[] {
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

async function readText(path: string): Promise<string> {
  try {
    return await readFile(path, 'utf8');
  } catch (cause) {
    throw invalid(`${path} cannot be read`, cause);
  }
}

async function readConfig<T>(path: string, schema: z.ZodType<T>): Promise<T> {
  const text = await readText(path);
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (cause) {
    throw invalid(`${path} is not JSON`, cause);
  }
  const parsed = schema.safeParse(json);
  if (!parsed.success) {
    const issue = parsed.error.issues[0]!;
    throw invalid(`${path}: ${issue.path.join('.')}: ${issue.message}`);
  }
  return parsed.data;
}

const invalid = (reason: string, cause?: unknown): MaskrouteError =>
  new MaskrouteError('invalid_encoder', `The encoder cannot be used: ${reason}.`, { cause });
