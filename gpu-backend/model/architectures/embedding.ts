/**
 * From token ids to the first value of the residual stream.
 *
 * Shapes: S = tokens, H = hidden, V = vocabulary.
 */
import type { GraphBuilder, Value } from '../../onnx/graph.ts';
import { MICROSOFT } from '../../onnx/graph.ts';
import type { StoredLinear } from '../linear.ts';
import { QUANT_BLOCK } from '../quantize.ts';
import type { WeightRange } from '../weights-file.ts';
import { external } from '../weights-file.ts';

export type StoredEmbedding = {
  /** `[V, H]`; the same ranges as the head when the embeddings are tied. */
  readonly rows: StoredLinear;
  /** fp32 `[H, H]` that a row is multiplied by, where the head's basis differs from the stream's. */
  readonly correction: { readonly values: WeightRange; readonly size: number } | undefined;
};

/** The first value of the residual stream, `[B, S, H]`. */
export function embed(g: GraphBuilder, tokenIds: Value, { rows, correction }: StoredEmbedding): Value {
  const embedded = embeddingRows(g, tokenIds, rows);
  if (correction === undefined) return embedded;
  const shape = [correction.size, correction.size];
  return g.op('MatMul', [
    embedded,
    g.initializer('embedding_correction', 'f32', shape, external(correction.values)),
  ]);
}

/** One row a token: dequantized from the 8 or 4 bits that the head multiplies by. */
function embeddingRows(g: GraphBuilder, tokenIds: Value, stored: StoredLinear): Value {
  const { outputs: V, inputs: H } = stored;
  if (stored.kind === 'f32') {
    return g.op('Gather', [g.initializer('embedding', 'f32', [V, H], external(stored.values)), tokenIds]);
  }
  const bits = stored.kind === 'q8' ? 8 : 4;
  const blocks = [V, H / QUANT_BLOCK];
  const values = g.initializer('embedding.q', 'u8', [V, (H * bits) / 8], external(stored.values));
  const scales = g.initializer('embedding.scales', 'f32', blocks, external(stored.scales!));
  const zeroPoints =
    stored.zeroPoints && g.initializer('embedding.zeros', 'u8', blocks, external(stored.zeroPoints));
  const attributes = { gather_axis: 0, quantize_axis: 1, block_size: QUANT_BLOCK, bits };
  return g.op('GatherBlockQuantized', [values, tokenIds, scales, zeroPoints], attributes, MICROSOFT);
}
