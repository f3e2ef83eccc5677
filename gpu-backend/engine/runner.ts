/**
 * Runs the model's graphs: new tokens of one sequence under one mask plan, or of several, each under its own; logits of
 * the rows that are asked for. It knows tensors and nothing of requests; the scheduler knows requests and nothing of tensors.
 *
 * There are two graphs over one file of weights, which give a row the same bits: one for one sequence, with the fewest nodes,
 * and the batched one. ONNX Runtime packs weights for each session, so a large model opens the batched one alone: there
 * nodes cost nothing beside weights.
 */
import { readFile, stat } from 'node:fs/promises';
import { join } from 'node:path';
import type { Mask } from '../../shared/mask/mask.ts';
import { batchedLlamaGraph } from '../model/architectures/batched-llama.ts';
import { llamaGraph } from '../model/architectures/llama.ts';
import { BATCHED_MODEL_FILE, MODEL_FILE, WEIGHTS_FILE } from '../model/emit.ts';
import type { KvType, ModelConfig } from '../model/model-source.ts';
import { readStoredLlama } from '../model/stored-llama.ts';
import { encodeModel } from '../onnx/encode.ts';
import type { Graph } from '../onnx/graph.ts';
import type { Feeds, RuntimeTensor, Session, SessionOptions } from '../onnx/session.ts';
import { createSession, createSessionIn, integers, tensor } from '../onnx/session.ts';
import { runBatch } from './batch-run.ts';
import { type KvValues, kvTensor, newValues } from './kv-cache.ts';
import {
  type Bound,
  type HostInput,
  type HostParts,
  hostParts,
  isToken,
  lengthFeeds,
  nameOf,
  onHost,
  type RunInput,
  writesSkipped,
} from './run-input.ts';
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
  const { profileFile } = options;
  // With more threads than heads, `GroupQueryAttention` shares the keys of a lone sequence among threads: other bits than in company.
  const threads = Math.min(options.threads, config.headCount);
  const settings = { threads, ...(profileFile === undefined ? {} : { profileFile }) };
  const open = await graphsOf(modelDir, config, kvType, settings);
  const one = isLarge ? undefined : await open.one();
  const many = batches ? await open.many() : undefined;
  const planTensors = new WeakMap<Uint8Array, RuntimeTensor>();
  const parts = hostParts(config, kvType);
  const compute = async (inputs: readonly RunInput[]): Promise<Float32Array[]> => {
    for (const { plan } of inputs) checkSurrogates(plan.mask, surrogates);
    if (inputs.length === 1 && one !== undefined)
      return [await run(one, parts, planTensors, onHost(inputs[0]!))];
    if (many === undefined) throw new Error('this runner was opened for one sequence at a time');
    return runBatch(many, parts, inputs.map(onHost));
  };
  // The runtime begins a run in a later turn of the event loop; until it is over, nobody else may move heads.
  let last: Promise<unknown> = Promise.resolve();
  const runMany = (inputs: readonly RunInput[]): Promise<Float32Array[]> => {
    const own = last.then(() => compute(inputs));
    last = own.catch(() => {});
    return own;
  };
  return {
    config,
    surrogates,
    newCache: parts.newCache,
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

/**
 * Graphs that keep K and V in fp32 are installed with the model; others are made of its weights, which takes some milliseconds. So
 * are all where an older version wrote the installed ones.
 */
async function graphsOf(
  modelDir: string,
  config: ModelConfig,
  kvType: KvType,
  settings: SessionOptions,
): Promise<Graphs> {
  const stored = await readStoredLlama(modelDir, config, 'with surrogates');
  const open = async (file: string, graph: Graph): Promise<Session> => {
    const path = join(modelDir, file);
    const isInstalled = kvType === 'f32' && (await readFile(path)).equals(encodeModel(graph));
    return isInstalled ? createSession(path, settings) : createSessionIn(modelDir, graph, settings);
  };
  return {
    one: () => open(MODEL_FILE, llamaGraph(config, stored, kvType)),
    many: () => open(BATCHED_MODEL_FILE, batchedLlamaGraph(config, stored, kvType)),
  };
}

async function run(
  session: Session,
  parts: HostParts,
  planTensors: WeakMap<Uint8Array, RuntimeTensor>,
  input: HostInput,
): Promise<Float32Array> {
  const { config } = parts;
  const { cache, tokenIds, plan, logitRows } = input;
  const tokens = tokenIds.length;
  cache.expect(tokens);
  const isWhole = writesSkipped(input);
  const logits = new Float32Array(logitRows.length * config.vocabularySize);
  const feeds: Feeds = {
    token_ids: integers(tokenIds, [1, tokens]),
    key_count: integers([cache.length + tokens]),
    logit_rows: integers(logitRows),
    runs: runsTensor(planTensors, plan.mask.runs),
    ...positionFeeds(cache.length, tokens, isWhole),
    ...surrogateFeeds(session, plan.mask, tokens),
  };
  const fetches: Bound = { logits: tensor('f32', logits, [1, logitRows.length, config.vocabularySize]) };
  const kept = bindCache(feeds, fetches, parts, input);
  await session.runInPlace(feeds, fetches);
  for (const { buffer, values } of kept) cache.write(buffer, values, 0, tokens);
  cache.advance(tokens);
  return logits;
}

/**
 * Rows and heads, one of them empty. A token that skips a layer's attention has its K and V there written behind the run: returns those.
 */
export function bindCache(
  feeds: Feeds,
  fetches: Bound,
  parts: HostParts,
  input: Omit<HostInput, 'logitRows'>,
): { readonly buffer: number; readonly values: KvValues }[] {
  const { config, kvType, heads } = parts;
  const { cache, tokenIds, plan } = input;
  const asToken = isToken(input, parts);
  const width = config.kvHeadCount * config.headSize;
  const rowsOf = (layer: number) =>
    writesSkipped(input) || plan.mask.runs[2 * layer] === 1 ? tokenIds.length : 0;
  const buffers = Array.from({ length: 2 * config.layerCount }, (_, buffer) => buffer);
  if (heads !== undefined) {
    feeds.is_token = tensor('bool', Uint8Array.of(asToken ? 1 : 0), [1]);
    Object.assign(feeds, lengthFeeds(asToken ? [cache.length] : []));
  }
  if (!asToken || heads === undefined) {
    cache.reserve(tokenIds.length);
    const pasts = cache.past(tokenIds.length);
    const nothing = heads?.nothing();
    for (const buffer of buffers) {
      feeds[`past_${nameOf(buffer)}`] = pasts[buffer]!;
      if (nothing !== undefined) feeds[`heads_${nameOf(buffer)}`] = nothing;
      fetches[`new_${nameOf(buffer)}`] = cache.newRows(buffer, rowsOf(buffer >> 1));
    }
    return [];
  }
  heads.place([cache]);
  const view = heads.view(cache.place!, cache.place! + 1);
  const nothing = kvTensor(newValues(kvType, width), [1, 1, width]);
  const kept: { readonly buffer: number; readonly values: KvValues }[] = [];
  for (const buffer of buffers) {
    feeds[`past_${nameOf(buffer)}`] = nothing;
    feeds[`heads_${nameOf(buffer)}`] = view[buffer]!;
    if (plan.mask.runs[2 * (buffer >> 1)] === 1) fetches[`grown_${nameOf(buffer)}`] = view[buffer]!;
    else if (writesSkipped(input)) {
      const values = newValues(kvType, width);
      fetches[`new_${nameOf(buffer)}`] = kvTensor(values, [1, 1, width]);
      kept.push({ buffer, values });
    }
  }
  return kept;
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
