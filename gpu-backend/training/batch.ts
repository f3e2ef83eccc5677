/** The text of a training step, and how it is fed to a graph. */
import type { SurrogateTable } from '../model/surrogates.ts';
import type { LlamaConfig } from '../model/types.ts';
import type { Feeds } from '../onnx/session.ts';
import { tensor } from '../onnx/session.ts';
import { SURROGATE_PARTS, surrogateShapes } from './surrogate-branch.ts';

/** B sequences of S tokens, R scored positions with K target tokens each. */
export type GateBatch = {
  /** `[B, S]`, row-major. */
  readonly tokenIds: ArrayLike<number>;
  readonly sequences: number;
  /** Positions b·S + s whose prediction counts, `[R]`. */
  readonly scoredRows: ArrayLike<number>;
  /** `[R, K]`. */
  readonly targetIds: ArrayLike<number>;
  /** `[R, K]`; every row sums to 1, or with `tail` to less. */
  readonly targetProbabilities: ArrayLike<number>;
};

/** The text alone: what a teacher is asked about. */
export type TextBatch = Pick<GateBatch, 'tokenIds' | 'sequences' | 'scoredRows'>;

export const integers = (values: ArrayLike<number>, dims: readonly number[]) =>
  tensor('i64', BigInt64Array.from(values, BigInt), dims);

/** @throws RangeError when tokens are not whole sequences. */
export function textFeeds({ tokenIds, sequences: B, scoredRows }: TextBatch): Feeds {
  const S = tokenIds.length / B;
  if (!Number.isInteger(S)) throw new RangeError(`${tokenIds.length} tokens in ${B} sequences`);
  return {
    token_ids: integers(tokenIds, [B, S]),
    scored_rows: integers(scoredRows, [scoredRows.length]),
  };
}

/** @throws RangeError on sizes that do not fit each other. */
export function stepFeeds(
  config: LlamaConfig,
  batch: GateBatch,
  gates: ArrayLike<number>,
  surrogates: SurrogateTable | undefined,
): Feeds {
  const { targetIds, targetProbabilities } = batch;
  const R = batch.scoredRows.length;
  const K = targetIds.length / R;
  if (!Number.isInteger(K) || targetProbabilities.length !== targetIds.length)
    throw new RangeError(
      `${targetIds.length} target ids and ${targetProbabilities.length} probabilities for ${R} positions`,
    );
  if (gates.length !== 2 * config.layerCount)
    throw new RangeError(`${gates.length} gates for ${config.layerCount} layers`);
  return {
    ...textFeeds(batch),
    gates: tensor('f32', Float32Array.from(gates), [gates.length]),
    target_ids: integers(targetIds, [R, K]),
    target_probabilities: tensor('f32', Float32Array.from(targetProbabilities), [R, K]),
    ...(surrogates === undefined ? {} : surrogateFeeds(config, surrogates)),
  };
}

function surrogateFeeds(config: LlamaConfig, table: SurrogateTable): Feeds {
  const shapes = surrogateShapes(config, table.rank);
  return Object.fromEntries(
    SURROGATE_PARTS.map((part) => [`surrogate_${part}`, tensor('f32', table[part], shapes[part])]),
  );
}

/** Every position of every sequence but the last predicts the next token. */
export function nextTokenBatch(tokenIds: ArrayLike<number>, sequences: number): GateBatch {
  const length = tokenIds.length / sequences;
  const scoredRows = Array.from(tokenIds, (_, i) => i).filter((i) => i % length !== length - 1);
  return {
    tokenIds,
    sequences,
    scoredRows,
    targetIds: scoredRows.map((row) => tokenIds[row + 1]!),
    targetProbabilities: scoredRows.map(() => 1),
  };
}
