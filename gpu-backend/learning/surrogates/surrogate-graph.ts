/**
 * Surrogates in a training graph. Their tables are inputs, so that a step can change them; they apply the affine map y
 * = x̂·A·B + bias, or `first` at a sequence's first position, of the plainly normalized stream x̂
 * (`model/surrogates.ts` says the same of serving).
 */
import type { ModelConfig } from '../../model/model-source.ts';
import type { GraphBuilder, Value } from '../../onnx/graph.ts';
import type { Shared } from '../gates/training-forward.ts';
import { normalizePlainly } from '../gates/training-forward.ts';

/** One block's: A `[H, r]`, B `[r, H]`, bias and first `[H]`. */
export type SurrogateValues = Readonly<Record<SurrogatePart, Value>>;

export type SurrogateInputs = {
  /** The whole tables: what gradients are taken by. */
  readonly tables: readonly Value[];
  readonly blocks: readonly SurrogateValues[];
};

/** Names of the graph's inputs (`surrogate_…`) and of the parts of a `SurrogateTable`. */
export const SURROGATE_PARTS = ['a', 'b', 'bias', 'first'] as const;
export type SurrogatePart = (typeof SURROGATE_PARTS)[number];

export const eachPart = <T>(make: (part: SurrogatePart) => T): Record<SurrogatePart, T> =>
  Object.fromEntries(SURROGATE_PARTS.map((part) => [part, make(part)])) as Record<SurrogatePart, T>;

/** `[2L, …]`, as `SurrogateTable` holds them. */
export function surrogateShapes(
  { layerCount, hiddenSize: H }: Pick<ModelConfig, 'layerCount' | 'hiddenSize'>,
  rank: number,
): Record<SurrogatePart, number[]> {
  const blocks = 2 * layerCount;
  return { a: [blocks, H, rank], b: [blocks, rank, H], bias: [blocks, H], first: [blocks, H] };
}

/** Inputs `surrogate_a` and so on, cut into blocks. */
export function surrogateInputs(g: GraphBuilder, config: ModelConfig, rank: number): SurrogateInputs {
  const shapes = surrogateShapes(config, rank);
  const count = 2 * config.layerCount;
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
  return { tables, blocks };
}

/** The surrogate's output in place of a block's, `[B, S, H]`; 2·H·r multiply-adds a position. */
export function surrogateOutput(b: GraphBuilder, shared: Shared, h: Value, values: SurrogateValues): Value {
  const x = normalizePlainly(b, shared.config, h);
  const product = b.op('MatMul', [b.op('MatMul', [x, values.a]), values.b]);
  return b.op('Where', [shared.isFirst, values.first, b.op('Add', [product, values.bias])]);
}
