/**
 * What a run of a graph in this process's memory is given: new tokens of sequences whose caches lie here, under their masks; and what
 * runs of both graphs (`one-mask-run.ts`, `batch-run.ts`) have in common.
 */
import { isDense } from '../../shared/mask/mask.ts';
import { BATCH_PLACES } from '../model/architectures/batched-attention.ts';
import type { KvType, ModelConfig } from '../model/model-source.ts';
import type { Feeds, RuntimeTensor } from '../onnx/session.ts';
import { tensor } from '../onnx/session.ts';
import type { MaskPlan } from './engine.ts';
import { HeadCaches } from './head-caches.ts';
import { KvCache, kvTensor, newValues, type SequenceCache } from './kv-cache.ts';

/** New tokens of one sequence. */
export type RunInput = {
  readonly cache: SequenceCache;
  /** S new tokens, after those that the cache holds. */
  readonly tokenIds: ArrayLike<number>;
  readonly plan: MaskPlan;
  /** Rows (0 to S-1) whose logits are wanted; none is cheaper than one. */
  readonly logitRows: readonly number[];
};
/** Its cache lies in this process's memory. */
export type HostInput = RunInput & { readonly cache: KvCache };

/** @throws Error for a cache of another runner. */
export function onHost(input: RunInput): HostInput {
  const { cache } = input;
  if (!(cache instanceof KvCache)) throw new Error('a cache of another runner');
  return { ...input, cache };
}

/** Whether K and V of rows whose attention is skipped are written. */
export const writesSkipped = ({ plan }: Pick<RunInput, 'plan'>): boolean =>
  plan.kv === 'preserve' || isDense(plan.mask);

/** What a runner computes with in this process's memory. */
export type HostParts = {
  readonly config: ModelConfig;
  readonly kvType: KvType;
  /** Where tokens of answers have K and V; halves stay rows. */
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

/**
 * Where logits are written. Memory that is new has to be brought in page by page, which takes longer than sampling from it; so that
 * of a step's tokens can be used again.
 */
export class LogitsMemory {
  readonly #vocabularySize: number;
  /** Empty where nothing is used again. */
  readonly #kept: Float32Array;
  #taken = 0;

  constructor(vocabularySize: number, reuse: boolean) {
    this.#vocabularySize = vocabularySize;
    this.#kept = new Float32Array(reuse ? BATCH_PLACES * vocabularySize : 0);
  }

  /** What was taken before may be written over from now on. */
  begin(): void {
    this.#taken = 0;
  }

  /** Room for so many rows. */
  take(rows: number): Float32Array {
    const values = rows * this.#vocabularySize;
    const from = this.#taken;
    // All rows of a prompt that is scored may be many times as large: their memory does not stay.
    if (from + values > this.#kept.length) return new Float32Array(values);
    this.#taken += values;
    return this.#kept.subarray(from, this.#taken);
  }
}

/** Whether it is a token that is attended beside those of others. */
export const isToken = (input: Pick<RunInput, 'tokenIds'>, { heads }: HostParts): boolean =>
  heads !== undefined && input.tokenIds.length === 1;

/** As the graphs call a layer's K, then its V. */
export const nameOf = (buffer: number): string => `${buffer % 2 === 0 ? 'k' : 'v'}_${buffer >> 1}`;

/** Fed for the rows of K or V where nobody has any. */
export function noRows({ config, kvType }: Pick<HostParts, 'config' | 'kvType'>): RuntimeTensor {
  const width = config.kvHeadCount * config.headSize;
  return kvTensor(newValues(kvType, width), [1, 1, width]);
}

/** Outputs that are written in place. */
export type Bound = Record<string, RuntimeTensor>;

/** How far sequences go that have so many keys, and so many new tokens each. */
export const lengthFeeds = (pasts: readonly number[], tokens = 1): Feeds => {
  const last = (pasts.length === 0 ? [0] : pasts).map((past) => past + tokens - 1);
  return {
    token_pasts: tensor('i32', Int32Array.from(last), [last.length]),
    // With one key in all the node takes another way.
    token_keys_max: tensor('i32', Int32Array.of(Math.max(1, ...last) + 1), [1]),
  };
};

/** Who stands in neighbouring places of the heads, from place `from` on; in some nobody of this run. */
export type Neighbours = {
  readonly from: number;
  readonly rows: readonly (HostInput | undefined)[];
  readonly empty: readonly number[];
};

/** Gives each of these a place. */
export function neighboursOf(heads: HeadCaches, tokens: readonly HostInput[]): Neighbours {
  heads.place(tokens.map(({ cache }) => cache));
  const byPlace = new Map(tokens.map((input) => [input.cache.place!, input]));
  const from = Math.min(...byPlace.keys());
  const places = Array.from({ length: Math.max(...byPlace.keys()) + 1 - from }, (_, i) => from + i);
  return {
    from,
    rows: places.map((place) => byPlace.get(place)),
    empty: places.filter((place) => !byPlace.has(place)),
  };
}
