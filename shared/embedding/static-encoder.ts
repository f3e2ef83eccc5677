/**
 * The static encoder: the mean of token vectors, with no network and no model behind it. The same code embeds
 * at the edge and in calibration, so a centroid means the same on both sides.
 *
 * A text's vector is the L2-normalised sum of its tokens' vectors: each vector carries its token's weight, and
 * the weighted mean's divisor vanishes in the normalisation.
 */
import type { Encoder } from './encoder.ts';
import { EMBED_CHARS_MAX } from './encoder.ts';
import { normalise } from './pool.ts';
import { parseStaticTable } from './static-table.ts';
import { createWeightedSum } from './weighted-sum.ts';
import { loadWordPiece } from './wordpiece.ts';

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
