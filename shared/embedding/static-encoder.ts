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
import type { StaticTable } from './static-table.ts';
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

/**
 * One vector of `table.dimensions`; the zero vector for a text with no known token. Two tokens a pass take two thirds of
 * the time of one. The sum is rounded to 32 bits after each token all the same, so that texts keep their vectors to the
 * last bit.
 */
function embedText(table: StaticTable, tokenizer: Pick<WordPiece, 'tokenIds'>, text: string): Float32Array {
  const { dimensions, scales, vectors } = table;
  const sum = new Float32Array(dimensions);
  const ids = tokenizer.tokenIds(text.slice(0, EMBED_CHARS_MAX));
  const even = ids.length - (ids.length % 2);
  for (let at = 0; at < even; at += 2) {
    const scale1 = scales[ids[at]!]!;
    const scale2 = scales[ids[at + 1]!]!;
    const start1 = ids[at]! * dimensions;
    const start2 = ids[at + 1]! * dimensions;
    for (let i = 0; i < dimensions; i++) {
      const one = Math.fround(sum[i]! + scale1 * vectors[start1 + i]!);
      sum[i] = one + scale2 * vectors[start2 + i]!;
    }
  }
  if (even < ids.length) addToken(sum, table, ids[even]!);
  return normalise(sum);
}

function addToken(sum: Float32Array, { dimensions, scales, vectors }: StaticTable, id: number): void {
  const scale = scales[id]!;
  const start = id * dimensions;
  for (let i = 0; i < dimensions; i++) sum[i] = sum[i]! + scale * vectors[start + i]!;
}
