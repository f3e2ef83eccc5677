/**
 * Runs the model's graph: new tokens of one sequence under one mask plan, logits of the rows that are asked
 * for. It knows tensors and nothing of requests; the scheduler knows requests and nothing of tensors.
 */
import { join } from 'node:path';
import type { Mask, SurrogatesId } from '../../shared/mask/mask.ts';
import { isDense } from '../../shared/mask/mask.ts';
import type { ModelConfig } from '../model/model-source.ts';
import type { Feeds, Fetches, RuntimeTensor, Session } from '../onnx/session.ts';
import { createSession, floats, tensor } from '../onnx/session.ts';
import type { MaskPlan } from './engine.ts';
import { KvCache } from './kv-cache.ts';

export type RunInput = {
  readonly cache: KvCache;
  /** S new tokens, after those that the cache holds. */
  readonly tokenIds: ArrayLike<number>;
  readonly plan: MaskPlan;
  /** Rows (0 to S-1) whose logits are wanted; none is cheaper than one. */
  readonly logitRows: readonly number[];
};

export type Runner = {
  readonly config: ModelConfig;
  /** The table of surrogates that the graph holds. */
  readonly surrogates: SurrogatesId | undefined;
  newCache(): KvCache;
  /** Logits, row-major `[logitRows, vocabulary]`; the cache then holds the S tokens. */
  run(input: RunInput): Promise<Float32Array>;
  close(): Promise<void>;
};

export type RunnerOptions = {
  readonly threads: number;
  readonly profileFile?: string;
  /** Of the model's manifest, where its graph has surrogates. */
  readonly surrogates?: SurrogatesId | undefined;
};

/** Opens `modelDir/model.onnx`, whose weights are mapped from the file beside it. */
export async function openRunner(
  modelDir: string,
  config: ModelConfig,
  options: RunnerOptions,
): Promise<Runner> {
  const session = await createSession(join(modelDir, 'model.onnx'), options);
  const planTensors = new WeakMap<Uint8Array, RuntimeTensor>();
  const cacheShape = {
    layerCount: config.layerCount,
    width: config.kvHeadCount * config.headSize,
    contextTokens: config.contextTokens,
  };
  return {
    config,
    surrogates: options.surrogates,
    newCache: () => new KvCache(cacheShape),
    run: (input) => run(session, config, options.surrogates, planTensors, input),
    close: async () => {
      session.endProfiling();
      await session.release();
    },
  };
}

async function run(
  session: Session,
  config: ModelConfig,
  surrogates: SurrogatesId | undefined,
  planTensors: WeakMap<Uint8Array, RuntimeTensor>,
  input: RunInput,
): Promise<Float32Array> {
  const { cache, tokenIds, plan, logitRows } = input;
  const tokens = tokenIds.length;
  cache.reserve(tokens);
  const elides = plan.kv === 'elide' && !isDense(plan.mask);
  const feeds: Feeds = {
    token_ids: tensor(
      'i64',
      bigints(tokens, (i) => tokenIds[i]!),
      [1, tokens],
    ),
    key_count: tensor(
      'i64',
      bigints(1, () => cache.length + tokens),
      [1],
    ),
    logit_rows: tensor(
      'i64',
      bigints(logitRows.length, (i) => logitRows[i]!),
      [logitRows.length],
    ),
    runs: runsTensor(planTensors, plan.mask.runs),
    ...positionFeeds(cache.length, tokens, elides),
    ...surrogateFeeds(session, plan.mask, surrogates, tokens),
  };
  const fetches: Fetches = { logits: null };
  cache.addPast(feeds, tokens);
  cache.addNew(fetches, tokens, (layer) => !elides || plan.mask.runs[2 * layer] === 1);
  const outputs = await session.run(feeds, fetches);
  cache.advance(tokens);
  const logits = floats(outputs.logits!);
  if (logits.length !== logitRows.length * config.vocabularySize)
    throw new Error(`${logits.length} logits for ${logitRows.length} rows`);
  return logits;
}

function positionFeeds(start: number, tokens: number, elides: boolean): Feeds {
  const positions = tensor(
    'i64',
    bigints(tokens, (i) => start + i),
    [1, tokens],
  );
  const kvRows = elides ? 0 : tokens;
  return {
    positions,
    kv_positions: elides ? tensor('i64', new BigInt64Array(0), [1, 0]) : positions,
    kv_rows: tensor(
      'i64',
      bigints(1, () => kvRows),
      [1],
    ),
  };
}

/** How many rows surrogates compute: all, or none with plain skipping. @throws Error for another table than the graph's. */
function surrogateFeeds(
  session: Session,
  mask: Mask,
  served: SurrogatesId | undefined,
  tokens: number,
): Feeds {
  if (mask.surrogates !== undefined && mask.surrogates !== served)
    throw new Error(`the mask wants surrogates ${mask.surrogates}, the graph has ${served ?? 'none'}`);
  if (!session.inputNames.includes('surrogate_rows')) return {};
  const rows = mask.surrogates === undefined ? 0 : tokens;
  return {
    surrogate_rows: tensor(
      'i64',
      bigints(1, () => rows),
      [1],
    ),
  };
}

/** A mask's bits as a tensor, made once a mask. */
function runsTensor(known: WeakMap<Uint8Array, RuntimeTensor>, runs: Uint8Array): RuntimeTensor {
  const made = known.get(runs) ?? tensor('bool', runs, [runs.length]);
  known.set(runs, made);
  return made;
}

function bigints(count: number, value: (index: number) => number): BigInt64Array {
  const array = new BigInt64Array(count);
  for (let i = 0; i < count; i++) array[i] = BigInt(value(i));
  return array;
}
