/**
 * A full sentence encoder (all-MiniLM-L6-v2, bge-small-en-v1.5, multilingual-e5-small and similar) on ONNX Runtime.
 * `/v1/embeddings` runs it; the static encoder is distilled from it and compared with it.
 */
import { type Encoder, normalise } from '../../shared/embedding/encoder.ts';
import type { WordPiece } from '../../shared/embedding/wordpiece.ts';
import { type BertConfig, bertGraph, type Pooling } from '../model/architectures/bert.ts';
import { openSafetensors } from '../model/formats/safetensors.ts';
import { sha256OfFiles } from '../model/store.ts';
import { encodeModel } from '../onnx/encode.ts';
import { createSession, type Feeds, floats, type Session, tensor } from '../onnx/session.ts';
import { type EncoderTokenizer, invalidEncoder, readEncoderFolder } from './encoder-files.ts';

/** Tokens of one run, padding included. 1,024 stay in the cores' caches; 4,096 take 15 % more time. */
const BATCH_TOKENS_MAX = 1024;
/** Longer texts are truncated before they are tokenized, which bounds the work; ordinary text reaches the token limit first. */
const CHARS_MAX = 16_384;

export type SentenceEncoder = Encoder & {
  /** Tokens in id order, and the WordPiece tokenizer; undefined for other tokenizers. */
  readonly wordPiece: { readonly vocabulary: readonly string[]; readonly pieces: WordPiece } | undefined;
  /** Tokens of a text after truncation, special tokens included. */
  tokenCount(text: string): number;
  /** A vector for each token sequence (with its special tokens), not normalised. */
  embedTokens(sequences: readonly (readonly number[])[], signal?: AbortSignal): Promise<Float32Array[]>;
  close(): Promise<void>;
};

/**
 * @param id the encoder's name in mask sets, e.g. `sentence-transformers/all-MiniLM-L6-v2`.
 * @param folder as `readEncoderFolder` reads it.
 * @throws MaskrouteError `invalid_encoder`, `corrupt_model` when a file is missing, malformed or of another kind.
 */
export async function loadSentenceEncoder(
  id: string,
  folder: string,
  threads: number,
): Promise<SentenceEncoder> {
  const { config, pooling, prefix, tokenizer, wordPiece, tokensMax, weights } = await readEncoderFolder(
    folder,
    id,
  );
  const model =
    weights.kind === 'onnx'
      ? await openOnnx(weights.path, pooling, threads)
      : await openOwn(config, pooling, weights.path, threads);
  const cut = (text: string) => withSpecialTokens(tokenizer, prefix + text, tokensMax);
  const embedTokens = tokenEmbedder(model, config.hidden_size);
  const revision = (await sha256OfFiles([weights.path])).slice(0, 24);
  return {
    spec: { id, revision, pooling, dimensions: config.hidden_size },
    wordPiece,
    embedTokens,
    tokenCount: (text) => cut(text).length,
    async embed(texts, signal) {
      const vectors = await embedTokens(texts.map(cut), signal);
      return vectors.map((vector, i) => (texts[i]!.trim() === '' ? vector.fill(0) : normalise(vector)));
    },
    close: () => model.session.release(),
  };
}

type Batch = {
  readonly ids: BigInt64Array;
  readonly mask: Uint8Array;
  readonly rows: number;
  readonly width: number;
};

/** A session; `pool` returns `[rows, H]`. Mean pooling returns sums, which have the same direction. */
type Model = { readonly session: Session; pool(batch: Batch): Promise<Float32Array> };

async function openOwn(
  config: BertConfig,
  pooling: Pooling,
  weightsPath: string,
  threads: number,
): Promise<Model> {
  const weights = await openSafetensors(weightsPath).catch((error: Error) => {
    throw invalidEncoder(`${weightsPath} cannot be read (${error.message})`, error);
  });
  try {
    const session = await createSession(encodeModel(await bertGraph(config, weights, pooling)), { threads });
    return {
      session,
      async pool({ ids, mask, rows, width }) {
        const dims = [rows, width];
        const feeds = {
          token_ids: tensor('i64', ids, dims),
          token_mask: tensor('i32', Int32Array.from(mask), dims),
        };
        return floats((await session.run(feeds, ['pooled'])).pooled!);
      },
    };
  } catch (error) {
    throw error instanceof RangeError ? invalidEncoder(error.message, error) : error;
  } finally {
    await weights.close();
  }
}

/** Names that exporters give to the output with a vector for each token. */
const TOKEN_OUTPUTS = ['last_hidden_state', 'token_embeddings'];

/** An exported ONNX encoder, with the inputs of Hugging Face's exporters. */
async function openOnnx(path: string, pooling: Pooling, threads: number): Promise<Model> {
  const session = await createSession(path, { threads }).catch((error: Error) => {
    throw invalidEncoder(`${path} cannot be opened (${error.message.slice(0, 200)})`, error);
  });
  const output = TOKEN_OUTPUTS.find((name) => session.outputNames.includes(name));
  const known = new Set(['input_ids', 'attention_mask', 'token_type_ids']);
  const unknown = session.inputNames.find((name) => !known.has(name));
  if (output === undefined || unknown !== undefined || !session.inputNames.includes('input_ids')) {
    await session.release();
    const what = `inputs ${session.inputNames.join(', ')}, outputs ${session.outputNames.join(', ')}`;
    throw invalidEncoder(`${path} is no exported encoder (${what})`);
  }
  return {
    session,
    async pool({ ids, mask, rows, width }) {
      const dims = [rows, width];
      const all: Feeds = {
        input_ids: tensor('i64', ids, dims),
        attention_mask: tensor('i64', BigInt64Array.from(mask, BigInt), dims),
        token_type_ids: tensor('i64', new BigInt64Array(rows * width), dims),
      };
      const feeds = Object.fromEntries(session.inputNames.map((name) => [name, all[name]!]));
      return poolTokens(floats((await session.run(feeds, [output]))[output]!), mask, rows, width, pooling);
    },
  };
}

/** `tokens` `[rows, width, H]` → `[rows, H]`. */
function poolTokens(
  tokens: Float32Array,
  mask: Uint8Array,
  rows: number,
  width: number,
  pooling: Pooling,
): Float32Array {
  const H = tokens.length / (rows * width);
  const pooled = new Float32Array(rows * H);
  for (let row = 0; row < rows; row++) {
    const into = pooled.subarray(row * H, (row + 1) * H);
    const count = pooling === 'cls' ? 1 : width;
    for (let at = 0; at < count; at++) {
      if (mask[row * width + at] === 0) continue;
      const from = (row * width + at) * H;
      for (let i = 0; i < H; i++) into[i]! += tokens[from + i]!;
    }
  }
  return pooled;
}

function withSpecialTokens(
  { ids, first, last }: EncoderTokenizer,
  text: string,
  tokensMax: number,
): number[] {
  return [first, ...ids(text.slice(0, CHARS_MAX)).slice(0, tokensMax - 2), last];
}

/** Batches sequences of similar length, for little padding; results are in the order of the sequences. */
function tokenEmbedder(model: Model, dimensions: number): SentenceEncoder['embedTokens'] {
  return async (sequences, signal) => {
    const order = sequences.map((_, i) => i).sort((a, b) => sequences[a]!.length - sequences[b]!.length);
    const results: Float32Array[] = new Array(sequences.length);
    for (let done = 0; done < order.length; ) {
      signal?.throwIfAborted();
      const batch = nextBatch(order, done, sequences);
      const pooled = await model.pool(padded(batch.map((i) => sequences[i]!)));
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

function padded(batch: readonly (readonly number[])[]): Batch {
  const width = batch.reduce((most, ids) => Math.max(most, ids.length), 0);
  const ids = new BigInt64Array(batch.length * width);
  const mask = new Uint8Array(batch.length * width);
  batch.forEach((sequence, row) => {
    sequence.forEach((id, i) => {
      ids[row * width + i] = BigInt(id);
      mask[row * width + i] = 1;
    });
  });
  return { ids, mask, rows: batch.length, width };
}
