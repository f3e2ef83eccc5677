/**
 * The full sentence encoder (all-MiniLM-L6-v2 and its kind) on ONNX Runtime: the teacher of the static
 * encoder, and the measure of how much the static one keeps.
 */
import type { Encoder } from '../../shared/embedding/encoder.ts';
import { normalise } from '../../shared/embedding/pool.ts';
import type { WordPiece } from '../../shared/embedding/wordpiece.ts';
import { loadWordPiece } from '../../shared/embedding/wordpiece.ts';
import type { BertConfig } from '../model/architectures/bert.ts';
import { bertGraph } from '../model/architectures/bert.ts';
import { openSafetensors } from '../model/safetensors.ts';
import { sha256OfFiles } from '../model/store.ts';
import { encodeModel } from '../onnx/encode.ts';
import type { Session } from '../onnx/session.ts';
import { createSession, floats, tensor } from '../onnx/session.ts';
import { invalidEncoder, readEncoderFolder } from './encoder-folder.ts';

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
