/**
 * Surrogates in a training graph. Their tables are inputs, so that a step can change them; they apply the affine map y
 * = x̂·A·B + bias, or `first` at a sequence's first position, of the plainly normalized stream x̂
 * (`model/surrogates.ts` says the same of serving).
 */
import type { ModelConfig } from '../../model/model-source.ts';
import { eachPart, type SurrogatePart, surrogateShapes } from '../../model/surrogates.ts';
import type { GraphBuilder, Value } from '../../onnx/graph.ts';
import type { Shared } from '../gates/training-forward.ts';
import { normalizePlainly } from '../gates/training-forward.ts';

/** One block's: A `[H, r]`, B `[r, H]`, bias and first `[H]`. */
export type SurrogateValues = Readonly<Record<SurrogatePart, Value>>;

export type SurrogateInputs = {
  /** The whole tables: what gradients are taken by. */
  readonly tables: readonly Value[];
  readonly shapes: Readonly<Record<SurrogatePart, readonly number[]>>;
  readonly blocks: readonly SurrogateValues[];
};

/** Inputs `surrogate_a` and so on, cut into blocks. */
export function surrogateInputs(g: GraphBuilder, config: ModelConfig, rank: number): SurrogateInputs {
  const count = 2 * config.layerCount;
  const shapes = surrogateShapes({ blockCount: count, hiddenSize: config.hiddenSize, rank });
  const tables: Value[] = [];
  const cut = (part: SurrogatePart): Value[] => {
    const [, ...shape] = shapes[part];
    const table = g.input(`surrogate_${part}`, 'f32', shapes[part]);
    tables.push(table);
    const pieces = g.split(table, Array<number>(count).fill(1));
    return pieces.map((piece) => g.reshape(piece, ...shape));
  };
  const parts = eachPart(cut);
  const blocks = Array.from({ length: count }, (_, i) => eachPart((part) => parts[part][i]!));
  return { tables, shapes, blocks };
}

/** The surrogate's output in place of a block's, `[B, S, H]`; 2·H·r multiply-adds a position. */
export function surrogateOutput(b: GraphBuilder, shared: Shared, h: Value, values: SurrogateValues): Value {
  const x = normalizePlainly(b, shared.config, h);
  const product = b.op('MatMul', [b.op('MatMul', [x, values.a]), values.b]);
  return b.op('Where', [shared.isFirst, values.first, b.op('Add', [product, values.bias])]);
}
