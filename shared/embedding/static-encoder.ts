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
import type { LoadedStaticTable } from './static-table.ts';
import { parseStaticTable } from './static-table.ts';
import type { WordPiece } from './wordpiece.ts';
import { loadWordPiece } from './wordpiece.ts';

export const STATIC_ENCODER_ID = 'static';

/**
 * @param source the bytes of a table as `encodeStaticTable` writes them; kept, not copied.
 * @throws MaskrouteError `invalid_encoder` when the table is malformed.
 */
export function loadStaticEncoder(source: ArrayBuffer | Uint8Array): Encoder {
  const table = parseStaticTable(source);
  const tokenizer = loadWordPiece(table.vocabulary);
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
      return texts.map((text) => embedText(table, tokenizer, text));
    },
  };
}

/** One vector of `table.dimensions`; the zero vector for a text with no known token. */
function embedText(table: LoadedStaticTable, tokenizer: WordPiece, text: string): Float32Array {
  const { dimensions, scales, vectors } = table;
  const sum = new Float32Array(dimensions);
  for (const id of tokenizer.tokenIds(text.slice(0, EMBED_CHARS_MAX))) {
    const scale = scales[id]!;
    const start = id * dimensions;
    for (let i = 0; i < dimensions; i++) sum[i] = sum[i]! + scale * vectors[start + i]!;
  }
  return normalise(sum);
}
