/**
 * The static encoder: the mean of token vectors, with no network and no model behind it. The same code embeds
 * at the edge and in calibration, so a centroid means the same on both sides.
 *
 * A text's vector is the L2-normalised sum of its tokens' vectors: each vector carries its token's weight, and
 * the weighted mean's divisor vanishes in the normalisation.
 */

import { EMBED_CHARS_MAX, type Encoder, normalise } from './encoder.ts';
import { parseStaticTable, type StaticTable } from './static-table.ts';
import { loadWordPiece } from './wordpiece.ts';

/*
 * The inner loop of the static encoder on SIMD: a prompt of 60 tokens is 15,000 multiply-adds, which take plain
 * JavaScript four times as long and were an edge's largest own expense. The kernel is WebAssembly, since no engine
 * vectorises JavaScript; each side compiles `weighted-sum.wasm` as its runtime allows and hands the module in.
 *
 * Memory: sum (f32 `[stride]`) · ids (i32 `[IDS_MAX]`) · scales (f32 `[tokens]`) · vectors (i8 `[tokens, stride]`), each
 * from a multiple of 16 on; a row is `dimensions` numbers and zeros up to `stride`.
 */

/** Numbers that the kernel takes at once. */
const LANES = 8;
/** Ids that are handed over at a time; the sum goes on from one time to the next. */
const IDS_MAX = 1024;
const PAGE_BYTES = 65_536;

type Kernel = {
  addRows(ids: number, idsEnd: number, scales: number, vectors: number, stride: number, sum: number): void;
};

/**
 * Gives the sum of the tokens' vectors, `[dimensions]`, added in the order of `ids`; each product and each sum is
 * rounded to 32 bits. `ids` are of the table, unchecked.
 */
type WeightedSum = (ids: readonly number[]) => Float32Array;

/** Copies the table: `table.vectors` and `table.scales` are not needed any more. */
export function createWeightedSum(module: WebAssembly.Module, table: StaticTable): WeightedSum {
  const { dimensions, scales, vectors } = table;
  const stride = aligned(dimensions, LANES);
  const sumAt = 0;
  const idsAt = aligned(4 * stride, 16);
  const scalesAt = idsAt + 4 * IDS_MAX;
  const vectorsAt = aligned(scalesAt + 4 * scales.length, 16);
  const memory = new WebAssembly.Memory({
    initial: Math.ceil((vectorsAt + scales.length * stride) / PAGE_BYTES),
  });
  const kernel = new WebAssembly.Instance(module, { env: { memory } }).exports as Kernel;
  const { buffer } = memory;
  new Float32Array(buffer, scalesAt, scales.length).set(scales);
  const rows = new Int8Array(buffer, vectorsAt, scales.length * stride);
  if (stride === dimensions) rows.set(vectors);
  else {
    for (let id = 0; id < scales.length; id++) {
      rows.set(vectors.subarray(id * dimensions, (id + 1) * dimensions), id * stride);
    }
  }
  const sum = new Float32Array(buffer, sumAt, stride);
  const some = new Int32Array(buffer, idsAt, IDS_MAX);
  return (ids) => {
    sum.fill(0);
    for (let at = 0; at < ids.length; at += IDS_MAX) {
      const count = Math.min(IDS_MAX, ids.length - at);
      for (let i = 0; i < count; i++) some[i] = ids[at + i]!;
      kernel.addRows(idsAt, idsAt + 4 * count, scalesAt, vectorsAt, stride, sumAt);
    }
    return sum.slice(0, dimensions);
  };
}

const aligned = (size: number, to: number): number => Math.ceil(size / to) * to;

export const STATIC_ENCODER_ID = 'static';

/**
 * @param source the bytes of a table as `encodeStaticTable` writes them; copied.
 * @param kernel `weighted-sum.wasm`, compiled.
 * @throws MaskrouteError `invalid_encoder` when the table is malformed.
 */
export function loadStaticEncoder(source: ArrayBuffer | Uint8Array, kernel: WebAssembly.Module): Encoder {
  const table = parseStaticTable(source);
  const tokenizer = loadWordPiece(table.vocabulary);
  const weightedSum = createWeightedSum(kernel, table);
  /** The zero vector for a text with no known token. */
  const embedText = (text: string): Float32Array =>
    normalise(weightedSum(tokenizer.tokenIds(text.slice(0, EMBED_CHARS_MAX))));
  return {
    isLocal: true,
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
