/**
 * The input of a run, new tokens of a sequence under a mask plan, and what the runs of both CPU graphs
 * (`one-mask-run.ts`, `batch-run.ts`) have in common. "Host" is this process's memory, in contrast to a GPU's.
 */
import { isDense } from '../../shared/mask/mask.ts';
import { BATCH_PLACES } from '../model/architectures/batched-attention.ts';
import type { KvType, ModelConfig } from '../model/model-source.ts';
import type { Feeds, RuntimeTensor } from '../onnx/session.ts';
import { tensor } from '../onnx/session.ts';
import type { MaskPlan } from './engine.ts';
import { HeadCaches } from './head-caches.ts';
import { KvCache, kvTensor, newValues, type SequenceCache } from './kv-cache.ts';
import { DRAFT_TOKENS_MAX } from './prediction.ts';

/** New tokens of one sequence. */
export type RunInput = {
  readonly cache: SequenceCache;
  /** S new tokens, which follow those in the cache. */
  readonly tokenIds: ArrayLike<number>;
  readonly plan: MaskPlan;
  /** Rows (0 to S-1) whose logits are wanted; none is cheaper than one. */
  readonly logitRows: readonly number[];
};
/** An input whose cache is in this process's memory. */
export type HostInput = RunInput & { readonly cache: KvCache };

/** @throws Error when the cache belongs to another runner. */
export function onHost(input: RunInput): HostInput {
  const { cache } = input;
  if (!(cache instanceof KvCache)) throw new Error('the cache belongs to another runner');
  return { ...input, cache };
}

/** Whether K and V are written for layers whose attention is skipped. */
export const writesSkipped = ({ plan }: Pick<RunInput, 'plan'>): boolean =>
  plan.kv === 'preserve' || isDense(plan.mask);

/** A CPU runner's state beside its sessions. */
export type HostParts = {
  readonly config: ModelConfig;
  readonly kvType: KvType;
  /** K and V head by head; undefined for fp16, which is stored as rows only. */
  readonly heads: HeadCaches | undefined;
  readonly logits: LogitsMemory;
  newCache(): KvCache;
};

export function hostParts(config: ModelConfig, kvType: KvType, reuseLogits = false): HostParts {
  const { layerCount, kvHeadCount, headSize, contextTokens } = config;
  const shape = { layerCount, width: kvHeadCount * headSize, contextTokens, kvType };
  const heads =
    kvType === 'f32' ? new HeadCaches({ layerCount, kvHeadCount, headSize, contextTokens }) : undefined;
  const logits = new LogitsMemory(config.vocabularySize, reuseLogits);
  return { config, kvType, heads, logits, newCache: () => new KvCache(shape, heads) };
}

/** A step has a row for each answer, or those of a predicted one. */
const KEPT_ROWS = Math.max(BATCH_PLACES, 1 + DRAFT_TOKENS_MAX);

/**
 * Memory for logits. The first write to new memory causes page faults, which take longer than sampling, so a step reuses
 * the memory of the step before.
 */
class LogitsMemory {
  readonly #vocabularySize: number;
  /** Empty without reuse. */
  readonly #kept: Float32Array;
  #taken = 0;

  constructor(vocabularySize: number, reuse: boolean) {
    this.#vocabularySize = vocabularySize;
    this.#kept = new Float32Array(reuse ? KEPT_ROWS * vocabularySize : 0);
  }

  /** Call it before a step: memory taken before may be overwritten from now on. */
  begin(): void {
    this.#taken = 0;
  }

  /** `rows` · vocabulary values. */
  take(rows: number): Float32Array {
    const values = rows * this.#vocabularySize;
    const from = this.#taken;
    // The rows of a scored prompt may need many times as much; that memory is not kept.
    if (from + values > this.#kept.length) return new Float32Array(values);
    this.#taken += values;
    return this.#kept.subarray(from, this.#taken);
  }
}

/** Whether the input is a single token that is attended together with those of other sequences. */
export const isToken = (input: Pick<RunInput, 'tokenIds'>, { heads }: HostParts): boolean =>
  heads !== undefined && input.tokenIds.length === 1;

/** The graphs' name for a buffer: K of layer i at 2i, V at 2i + 1. */
export const nameOf = (buffer: number): string => `${buffer % 2 === 0 ? 'k' : 'v'}_${buffer >> 1}`;

/** A placeholder for the K or V of an unused place. */
export function noRows({ config, kvType }: Pick<HostParts, 'config' | 'kvType'>): RuntimeTensor {
  const width = config.kvHeadCount * config.headSize;
  return kvTensor(newValues(kvType, width), [1, 1, width]);
}

/** Outputs bound to memory, which the runtime writes in place. */
export type Bound = Record<string, RuntimeTensor>;

/** Sequence lengths as `GroupQueryAttention` takes them. `pasts`: cached keys of each sequence; `tokens`: new ones of each. */
export const lengthFeeds = (pasts: readonly number[], tokens = 1): Feeds => {
  const last = (pasts.length === 0 ? [0] : pasts).map((past) => past + tokens - 1);
  return {
    token_pasts: tensor('i32', Int32Array.from(last), [last.length]),
    // At least 2: with a single key the node chooses another code path.
    token_keys_max: tensor('i32', Int32Array.of(Math.max(1, ...last) + 1), [1]),
  };
};

/** A range of neighbouring places of the head caches from `from` on; `empty` places have no input in this run. */
export type Neighbours = {
  readonly from: number;
  readonly rows: readonly (HostInput | undefined)[];
  readonly empty: readonly number[];
};

/** The smallest range of places that has all of `tokens`, whose sequences have places. */
export function neighboursOf(tokens: readonly HostInput[]): Neighbours {
  const byPlace = new Map(tokens.map((input) => [input.cache.place!, input]));
  const from = Math.min(...byPlace.keys());
  const places = Array.from({ length: Math.max(...byPlace.keys()) + 1 - from }, (_, i) => from + i);
  return {
    from,
    rows: places.map((place) => byPlace.get(place)),
    empty: places.filter((place) => !byPlace.has(place)),
  };
}
