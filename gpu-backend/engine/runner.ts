/**
 * Runs the model's graphs: new tokens of one sequence under one mask plan, or of several, each under its own; logits of
 * the rows that are asked for. It knows tensors and nothing of requests; the scheduler knows requests and nothing of tensors.
 *
 * There are two graphs over one file of weights, which give a row the same bits: one for one sequence, with the fewest nodes,
 * and the batched one. ONNX Runtime packs weights for each session, so a large model opens the batched one alone: there
 * nodes cost nothing beside weights.
 */
import { stat } from 'node:fs/promises';
import { join } from 'node:path';
import type { Mask } from '../../shared/mask/mask.ts';
import { batchedLlamaGraph } from '../model/architectures/batched-llama.ts';
import { llamaGraph } from '../model/architectures/llama.ts';
import { BATCHED_MODEL_FILE, MODEL_FILE, WEIGHTS_FILE } from '../model/emit.ts';
import type { KvType, ModelConfig } from '../model/model-source.ts';
import { readStoredLlama } from '../model/stored-llama.ts';
import type { Feeds, Fetches, RuntimeTensor, Session, SessionOptions } from '../onnx/session.ts';
import { createSession, createSessionIn, floats, integers, tensor } from '../onnx/session.ts';
import type { HostInput, RunInput } from './batch-run.ts';
import { onHost, runBatch, writesSkipped } from './batch-run.ts';
import { KvCache } from './kv-cache.ts';
import { checkSurrogates, type Runner, type RunnerOptions } from './runner-interface.ts';

export type { Runner } from './runner-interface.ts';

/** The default model's weights twice: 160 MB. */
const TWO_SESSIONS_BYTES_MAX = 2 ** 30;

/** Opens `modelDir/model.onnx`, whose weights are mapped from the file beside it. */
export async function openRunner(
  modelDir: string,
  config: ModelConfig,
  options: RunnerOptions,
): Promise<Runner> {
  if (options.device?.kind === 'webgpu') {
    const { openWebgpuRunner } = await import('./webgpu-runner.ts');
    return openWebgpuRunner(modelDir, config, options);
  }
  const { batches = false, surrogates, kvType = 'f32' } = options;
  const isLarge = batches && (await stat(join(modelDir, WEIGHTS_FILE))).size > TWO_SESSIONS_BYTES_MAX;
  const { threads, profileFile } = options;
  const settings = { threads, ...(profileFile === undefined ? {} : { profileFile }) };
  const open = await graphsOf(modelDir, config, kvType, settings);
  const one = isLarge ? undefined : await open.one();
  const many = batches ? await open.many() : undefined;
  const planTensors = new WeakMap<Uint8Array, RuntimeTensor>();
  const cacheShape = {
    layerCount: config.layerCount,
    width: config.kvHeadCount * config.headSize,
    contextTokens: config.contextTokens,
    kvType,
  };
  const runMany = async (inputs: readonly RunInput[]): Promise<Float32Array[]> => {
    for (const { plan } of inputs) checkSurrogates(plan.mask, surrogates);
    if (inputs.length === 1 && one !== undefined)
      return [await run(one, config, planTensors, onHost(inputs[0]!))];
    if (many === undefined) throw new Error('this runner was opened for one sequence at a time');
    return runBatch(many, cacheShape, inputs.map(onHost));
  };
  return {
    config,
    surrogates,
    newCache: () => new KvCache(cacheShape),
    run: async (input) => (await runMany([input]))[0]!,
    runMany,
    close: async () => {
      for (const session of [one, many]) {
        session?.endProfiling();
        await session?.release();
      }
    },
  };
}

type Graphs = { one(): Promise<Session>; many(): Promise<Session> };

/** Graphs that keep K and V in fp32 are installed with the model; others are made of its weights, which takes some milliseconds. */
async function graphsOf(
  modelDir: string,
  config: ModelConfig,
  kvType: KvType,
  settings: SessionOptions,
): Promise<Graphs> {
  if (kvType === 'f32') {
    return {
      one: () => createSession(join(modelDir, MODEL_FILE), settings),
      many: () => createSession(join(modelDir, BATCHED_MODEL_FILE), settings),
    };
  }
  const stored = await readStoredLlama(modelDir, config, 'with surrogates');
  return {
    one: () => createSessionIn(modelDir, llamaGraph(config, stored, kvType), settings),
    many: () => createSessionIn(modelDir, batchedLlamaGraph(config, stored, kvType), settings),
  };
}

async function run(
  session: Session,
  config: ModelConfig,
  planTensors: WeakMap<Uint8Array, RuntimeTensor>,
  input: HostInput,
): Promise<Float32Array> {
  const { cache, tokenIds, plan, logitRows } = input;
  const tokens = tokenIds.length;
  cache.reserve(tokens);
  const isWhole = writesSkipped(input);
  const feeds: Feeds = {
    token_ids: integers(tokenIds, [1, tokens]),
    key_count: integers([cache.length + tokens]),
    logit_rows: integers(logitRows),
    runs: runsTensor(planTensors, plan.mask.runs),
    ...positionFeeds(cache.length, tokens, isWhole),
    ...surrogateFeeds(session, plan.mask, tokens),
  };
  const fetches: Fetches = { logits: null };
  cache.bind(feeds, fetches, tokens, (layer) => isWhole || plan.mask.runs[2 * layer] === 1);
  const outputs = await session.run(feeds, fetches);
  cache.advance(tokens);
  const logits = floats(outputs.logits!);
  if (logits.length !== logitRows.length * config.vocabularySize)
    throw new Error(`${logits.length} logits for ${logitRows.length} rows`);
  return logits;
}

function positionFeeds(start: number, tokens: number, isWhole: boolean): Feeds {
  const positions = integers(
    Array.from({ length: tokens }, (_, i) => start + i),
    [1, tokens],
  );
  return {
    positions,
    kv_positions: isWhole ? positions : integers([], [1, 0]),
    kv_rows: integers([isWhole ? tokens : 0]),
  };
}

/** How many rows surrogates compute: all, or none with plain skipping. */
function surrogateFeeds(session: Session, mask: Mask, tokens: number): Feeds {
  if (!session.inputNames.includes('surrogate_rows')) return {};
  return { surrogate_rows: integers([mask.surrogates === undefined ? 0 : tokens]) };
}

/** A mask's bits as a tensor, made once a mask. */
function runsTensor(known: WeakMap<Uint8Array, RuntimeTensor>, runs: Uint8Array): RuntimeTensor {
  const made = known.get(runs) ?? tensor('bool', runs, [runs.length]);
  known.set(runs, made);
  return made;
}
