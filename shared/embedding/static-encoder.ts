/**
 * The static encoder: the weighted mean of token vectors, without a network or a model. The edge and calibration run
 * the same code, so a centroid means the same on both sides.
 *
 * Its file holds a WordPiece vocabulary and one int8 vector for each token, so that table and vocabulary always match.
 * Layout (little-endian): magic (8 bytes) · version, dimensions, vocabulary size, vocabulary bytes (u32 each) · SHA-256
 * of everything after the header (32 bytes) · scales (f32 `[vocabularySize]`) · vectors (i8 `[vocabularySize,
 * dimensions]`) · vocabulary (UTF-8, one token a line, in id order). A token's vector is `scale · int8`; it includes
 * the token's weight in the mean.
 */
import { sha256 } from '@noble/hashes/sha2.js';
import { bytesToHex } from '@noble/hashes/utils.js';
import { MaskrouteError } from '../wire/errors.ts';
import { EMBED_CHARS_MAX, type Encoder, normalise } from './encoder.ts';
import { loadWordPiece } from './wordpiece.ts';

export const STATIC_ENCODER_ID = 'static';

/**
 * @param source the bytes of a table as `encodeStaticTable` writes them. The encoder keeps and reads them; do not
 * change them.
 * @throws MaskrouteError `invalid_encoder` when the table is malformed.
 */
export function loadStaticEncoder(source: ArrayBuffer | Uint8Array): Encoder {
  const table = parseStaticTable(source);
  const tokenizer = loadWordPiece(table.vocabulary);
  /**
   * The zero vector for a text without a known token. The sum is not divided by the count, as it is normalised anyway.
   */
  const embedText = (text: string): Float32Array =>
    normalise(sumOfTokens(table, tokenizer.tokenIds(text.slice(0, EMBED_CHARS_MAX))));
  return {
    spec: {
      id: STATIC_ENCODER_ID,
      revision: table.revision,
      pooling: 'weighted-mean',
      dimensions: table.dimensions,
    },
    async embed(texts, signal) {
      signal?.throwIfAborted();
      return texts.map(embedText);
    },
  };
}

/**
 * The sum of the tokens' vectors, `[dimensions]`. Each pass adds two tokens: reading and writing the sum takes as long
 * as reading a token's row.
 */
function sumOfTokens({ dimensions, scales, vectors }: StaticTable, ids: readonly number[]): Float32Array {
  const sum = new Float32Array(dimensions);
  for (let next = 0; next < ids.length; next += 2) {
    const first = ids[next]!;
    const second = ids[next + 1] ?? first;
    const firstScale = scales[first]!;
    const secondScale = next + 1 < ids.length ? scales[second]! : 0;
    const firstAt = first * dimensions;
    const secondAt = second * dimensions;
    for (let i = 0; i < dimensions; i++) {
      sum[i] = sum[i]! + firstScale * vectors[firstAt + i]! + secondScale * vectors[secondAt + i]!;
    }
  }
  return sum;
}

const MAGIC = 'MRSTATIC';
const VERSION = 1;
const HEADER_BYTES = 56;
/** Largest table: it stays in the memory of the Worker's isolate. */
export const STATIC_TABLE_BYTES_MAX = 8_000_000;
const DIMENSIONS_MAX = 1024;
const VOCABULARY_MAX = 200_000;

export type StaticTable = {
  readonly dimensions: number;
  /** Tokens in id order. */
  readonly vocabulary: readonly string[];
  /** One factor a token. */
  readonly scales: Float32Array;
  /** `[vocabulary.length, dimensions]`, row-major. */
  readonly vectors: Int8Array;
};

/** A table read back, with the content hash that names it: `t_` and 24 hexadecimal digits. */
type LoadedStaticTable = StaticTable & { readonly revision: string };

/** @throws MaskrouteError `invalid_encoder` when the parts do not fit together or the file would be too large. */
export function encodeStaticTable(table: StaticTable): Uint8Array<ArrayBuffer> {
  const { dimensions, vocabulary, scales, vectors } = table;
  const size = vocabulary.length;
  if (scales.length !== size || vectors.length !== size * dimensions) {
    throw invalid(
      `${size} tokens, ${scales.length} scales and ${vectors.length} numbers do not fit together`,
    );
  }
  const words = new TextEncoder().encode(vocabulary.join('\n'));
  const bytes = new Uint8Array(HEADER_BYTES + size * (4 + dimensions) + words.length);
  if (bytes.length > STATIC_TABLE_BYTES_MAX) throw invalid(`the table would take ${bytes.length} bytes`);
  const view = new DataView(bytes.buffer);
  bytes.set(new TextEncoder().encode(MAGIC));
  [VERSION, dimensions, size, words.length].forEach((value, i) => {
    view.setUint32(8 + 4 * i, value, true);
  });
  scales.forEach((scale, i) => {
    view.setFloat32(HEADER_BYTES + 4 * i, scale, true);
  });
  bytes.set(new Uint8Array(vectors.buffer, vectors.byteOffset, vectors.length), HEADER_BYTES + 4 * size);
  bytes.set(words, HEADER_BYTES + size * (4 + dimensions));
  bytes.set(sha256(bytes.subarray(HEADER_BYTES)), 24);
  parseStaticTable(bytes);
  return bytes;
}

/**
 * Reads a table; the vectors stay a view on `source`. The sizes in the header are checked against the file's length;
 * the content hash is not checked ({@link verifyStaticTable} does that).
 * @throws MaskrouteError `invalid_encoder`.
 */
export function parseStaticTable(source: ArrayBuffer | Uint8Array): LoadedStaticTable {
  const bytes = source instanceof Uint8Array ? source : new Uint8Array(source);
  if (bytes.length < HEADER_BYTES || new TextDecoder().decode(bytes.subarray(0, 8)) !== MAGIC) {
    throw invalid('the file is not a static encoder table');
  }
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  const field = (index: number) => view.getUint32(8 + 4 * index, true);
  const [version, dimensions, size, wordBytes] = [field(0), field(1), field(2), field(3)];
  if (version !== VERSION) throw invalid(`the table has version ${version}, this code reads ${VERSION}`);
  if (dimensions < 1 || dimensions > DIMENSIONS_MAX || size < 1 || size > VOCABULARY_MAX) {
    throw invalid(`the table claims ${size} tokens of ${dimensions} dimensions`);
  }
  const expected = HEADER_BYTES + size * (4 + dimensions) + wordBytes;
  if (bytes.length !== expected)
    throw invalid(`the table has ${bytes.length} bytes, its header says ${expected}`);
  const vectorsAt = HEADER_BYTES + 4 * size;
  return {
    dimensions,
    vocabulary: readVocabulary(bytes.subarray(vectorsAt + size * dimensions), size),
    scales: readScales(view, size),
    vectors: new Int8Array(bytes.buffer, bytes.byteOffset + vectorsAt, size * dimensions),
    revision: `t_${bytesToHex(bytes.subarray(24, HEADER_BYTES)).slice(0, 24)}`,
  };
}

/**
 * Checks the content hash. It takes tens of ms, so it is for writing, publishing and calibrating, not for every cold
 * start.
 */
export function verifyStaticTable(source: ArrayBuffer | Uint8Array): void {
  const bytes = source instanceof Uint8Array ? source : new Uint8Array(source);
  parseStaticTable(bytes);
  const claimed = bytesToHex(bytes.subarray(24, HEADER_BYTES));
  if (bytesToHex(sha256(bytes.subarray(HEADER_BYTES))) !== claimed) {
    throw invalid('the content of the table does not match its hash; the file is damaged');
  }
}

function readScales(view: DataView, size: number): Float32Array {
  const scales = new Float32Array(size);
  for (let i = 0; i < size; i++) {
    scales[i] = view.getFloat32(HEADER_BYTES + 4 * i, true);
    if (!Number.isFinite(scales[i]!)) throw invalid(`the scale of token ${i} is not a finite number`);
  }
  return scales;
}

function readVocabulary(bytes: Uint8Array, size: number): string[] {
  let text: string;
  try {
    text = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch (cause) {
    throw invalid('the vocabulary is not UTF-8', cause);
  }
  const vocabulary = text.split('\n');
  if (vocabulary.length !== size) {
    throw invalid(`the vocabulary has ${vocabulary.length} tokens, its header says ${size}`);
  }
  return vocabulary;
}

const invalid = (reason: string, cause?: unknown): MaskrouteError =>
  new MaskrouteError('invalid_encoder', `The encoder cannot be used: ${reason}.`, { cause });
