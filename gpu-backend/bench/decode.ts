/**
 * `bench decode` and `bench prefill`: milliseconds a token and a prompt, dense and with a quarter of the blocks
 * skipped, against llama.cpp on the same GGUF in the same run. A model with other weights than eight bits is also compared
 * with its eight-bit version.
 *
 * The limit of decoding is memory bandwidth: each token reads all weights, and K and V of all tokens before it.
 * `bandwidthShare` compares that with plain reading in the same run. `speedup25Limit` is the largest possible speedup of
 * the mask, from the weights that it skips. The limit of a prefill is the products of weights and positions.
 */
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { Worker } from 'node:worker_threads';
import { denseMask, type Mask, maskFromSkippedLayers, withSurrogates } from '../../shared/mask/mask.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import type { MaskPlan } from '../engine/engine.ts';
import { type SequenceCache, tokenBytes } from '../engine/kv-cache.ts';
import { openRunner } from '../engine/runner.ts';
import type { Runner, RunnerOptions } from '../engine/runner-interface.ts';
import { type BenchHooks, interleaved, median, round, time_ms, times_ms } from '../measure.ts';
import { storedBytes } from '../model/architectures/projections.ts';
import type { KvType, ModelConfig } from '../model/model-source.ts';
import { DEFAULT_MODEL, DEFAULT_MODEL_HASH, defaultModelFile } from '../model/sources/resolve.ts';
import { openInstalled } from '../model/store.ts';
import { readStoredLlama } from '../model/stored-llama.ts';
import { weightsRead } from '../model/weights-file.ts';
import type { FloatType } from '../onnx/graph.ts';

const DENSE = 'dense';
const QUARTER = '25 % of the blocks out';
const SURROGATES = '25 % replaced by surrogates';
const EIGHT_BITS = 'dense, eight bits';
const POSITIONS = [64, 512];
/** With `long`: positions where K and V are as large as the weights, or larger. */
const LONG_POSITIONS = [2048, 4096, 8000];
const PROMPT_TOKENS = 512;
/** The server's chunk size when it computes a prompt. */
const CHUNK_TOKENS = 128;
/** Steps whose median is one figure. */
const STEPS = 24;

export type SpeedOptions = BenchHooks & {
  readonly home: string;
  readonly rounds: number;
  /** Long contexts, which take minutes. */
  readonly long?: boolean;
};

export type DecodeOptions = SpeedOptions & {
  /** An installed model's name. */
  readonly model: string;
  /** Type of K and V; unless given, the device's default. */
  readonly kvType?: KvType | undefined;
};

/**
 * Those of `all` that fit into the model's context. `tokens`: what one takes, with the tokens behind it. Says which are left
 * out.
 * @throws MaskrouteError `invalid_argument` when none fits.
 */
export function thatFit<T>(
  all: readonly T[],
  tokens: (one: T) => number,
  { contextTokens }: ModelConfig,
  say: BenchHooks['say'],
): T[] {
  const needs = all.map(tokens);
  if (Math.min(...needs) > contextTokens) {
    const message = `The model has a context of ${contextTokens} tokens, and the shortest measurement needs ${Math.min(...needs)}.`;
    throw new MaskrouteError('invalid_argument', message);
  }
  const tooLong = needs.filter((need) => need > contextTokens);
  if (tooLong.length > 0)
    say(`left out: what needs ${tooLong.join(', ')} tokens, as the model has a context of ${contextTokens}`);
  return all.filter((_, i) => needs[i]! <= contextTokens);
}

/** The positions to measure decoding at. @throws MaskrouteError as {@link thatFit}. */
export async function decodePositions({ home, model, long = false, say }: DecodeOptions): Promise<number[]> {
  const { manifest } = await openInstalled(home, model);
  const positions = long ? LONG_POSITIONS : POSITIONS;
  return thatFit(positions, (position) => position + STEPS, manifest.config, say);
}

export async function benchDecode(options: DecodeOptions): Promise<object> {
  const { long = false, kvType = 'f32', say } = options;
  const at = await decodePositions(options);
  await using compared = await openCompared(options, long ? 8192 : 1024);
  const { manifest, dense, quarter, peers } = compared;
  const bandwidth_GBps = await readBandwidth_GBps();
  say(`plain reading reaches ${bandwidth_GBps.toFixed(1)} GB/s`);
  const { config } = manifest;
  const weights = weightsRead(config, dense);
  const weights_bytes = await denseBytes(compared.folder, config);
  const { layerCount, kvHeadCount, headSize } = config;
  const token_bytes = tokenBytes({ layerCount, width: kvHeadCount * headSize, kvType });
  const positions: Record<string, object> = {};
  for (const [position, found] of await measureDecode(peers, at, options)) {
    const keys_bytes = position * token_bytes;
    const reached_GBps = (weights_bytes + keys_bytes) / found.get(DENSE)! / 1e6;
    const share = round(reached_GBps / bandwidth_GBps);
    say(`weights, K and V are read at ${reached_GBps.toFixed(1)} GB/s, ${Math.round(100 * share)} % of that`);
    positions[`at${position}`] = {
      ...decodeFigures(found),
      read_GBps: round(reached_GBps, 1),
      bandwidthShare: share,
    };
  }
  return {
    bench: 'decode',
    model: manifest.name,
    weights: manifest.weights,
    kvType,
    rounds: options.rounds,
    ...positions,
    ...compared.missing,
    bandwidth_GBps: round(bandwidth_GBps, 1),
    speedup25Limit: round(weights / weightsRead(config, quarter)),
  };
}

/** Milliseconds a token of each peer, by position. */
export async function measureDecode(
  peers: readonly Peer[],
  positions: readonly number[],
  { rounds, say, signal }: SpeedOptions,
): Promise<Map<number, ReadonlyMap<string, number>>> {
  const byPosition = new Map<number, ReadonlyMap<string, number>>();
  for (const position of positions) {
    const subjects = peers.map((peer) => ({ name: peer.name, measure: () => peer.decode(position) }));
    const found = await interleaved(subjects, rounds, signal);
    for (const [name, ms] of found) say(`after ${position} tokens, ${name}: ${ms.toFixed(2)} ms/token`);
    byPosition.set(position, found);
  }
  return byPosition;
}

function decodeFigures(found: ReadonlyMap<string, number>): object {
  const dense_ms = found.get(DENSE)!;
  const quarter_ms = found.get(QUARTER)!;
  const replaced_ms = found.get(SURROGATES);
  const llamaCpp_ms = bestOfLlamaCpp(found);
  return {
    dense_ms: round(dense_ms),
    quarter_ms: round(quarter_ms),
    ...(replaced_ms === undefined ? {} : { quarterSurrogates_ms: round(replaced_ms) }),
    ...eightBitsFigures(found, dense_ms),
    ...llamaCppFigures(llamaCpp_ms, dense_ms),
    speedup25: round(dense_ms / quarter_ms),
  };
}

/** Bytes of all matrices that one token reads, with scales and zero points, when floats have type `floatType`. */
export async function denseBytes(
  folder: string,
  config: ModelConfig,
  floatType: FloatType = 'f32',
): Promise<number> {
  const { layers, head } = await readStoredLlama(folder, config);
  const matrices = layers.flatMap(({ qkv, output, gateUp, down }) => [qkv, output, gateUp, down]);
  return [...matrices, ...head].reduce((sum, stored) => sum + storedBytes(stored, floatType), 0);
}

/** Read bandwidth of all cores: each searches a large buffer for an absent byte, with the C library's SIMD loops. */
async function readBandwidth_GBps(): Promise<number> {
  const script = `
    const { parentPort } = require('node:worker_threads');
    const buffer = Buffer.alloc(2 ** 28, 1);
    parentPort.on('message', (rounds) => {
      for (let i = 0; i < rounds; i++) buffer.indexOf(2);
      parentPort.postMessage(rounds * buffer.length);
    });`;
  const workers = Array.from({ length: availableParallelism() }, () => new Worker(script, { eval: true }));
  const read = async (rounds: number): Promise<number> => {
    const begun_ms = performance.now();
    for (const worker of workers) worker.postMessage(rounds);
    const answers = await Promise.all(workers.map((worker) => once(worker, 'message')));
    const bytes = answers.reduce((sum, [own]) => sum + own, 0);
    return bytes / (performance.now() - begun_ms) / 1e6;
  };
  await read(1);
  const found = [await read(8), await read(8), await read(8)];
  await Promise.all(workers.map((worker) => worker.terminate()));
  return median(found);
}

export async function benchPrefill(options: Omit<DecodeOptions, 'kvType'>): Promise<object> {
  const { home, model, rounds, long = false, say, signal } = options;
  const { config } = (await openInstalled(home, model)).manifest;
  const prompts = thatFit(long ? LONG_POSITIONS : [PROMPT_TOKENS], (tokens) => tokens, config, say);
  await using compared = await openCompared(options, long ? 8192 : 1024);
  const { manifest, dense, peers } = compared;
  const subject = { bench: 'prefill', model: manifest.name, weights: manifest.weights };
  const measured = async (tokens: number) => {
    const subjects = peers.map((peer) => ({ name: peer.name, measure: () => peer.prefill(tokens) }));
    const found = await interleaved(subjects, rounds, signal);
    for (const [name, ms] of found) say(`${tokens} tokens, ${name}: ${ms.toFixed(0)} ms`);
    return found;
  };
  if (long) {
    const figures: Record<string, object> = {};
    for (const tokens of prompts) {
      const found = await measured(tokens);
      const [dense_ms, llamaCpp_ms] = [found.get(DENSE)!, bestOfLlamaCpp(found)];
      figures[`of${tokens}`] = {
        dense_ms: round(dense_ms, 0),
        ...llamaCppFigures(llamaCpp_ms, dense_ms, 0),
      };
    }
    return { ...subject, rounds, ...figures, ...compared.missing };
  }
  const found = await measured(PROMPT_TOKENS);
  const dense_ms = found.get(DENSE)!;
  const llamaCpp_ms = bestOfLlamaCpp(found);
  const products = (weightsRead(config, dense) - config.hiddenSize * config.vocabularySize) * PROMPT_TOKENS;
  return {
    ...subject,
    rounds,
    promptTokens: PROMPT_TOKENS,
    dense_ms: round(dense_ms, 1),
    quarter_ms: round(found.get(QUARTER)!, 1),
    ...eightBitsFigures(found, dense_ms, 1),
    ...llamaCppFigures(llamaCpp_ms, dense_ms, 1),
    ...compared.missing,
    products_GMACps: round(products / dense_ms / 1e6, 1),
  };
}

/** Milliseconds of the faster llama.cpp peer; Infinity when none was measured. */
const bestOfLlamaCpp = (found: ReadonlyMap<string, number>): number =>
  Math.min(...[...found].filter(([name]) => name.startsWith('llama.cpp')).map(([, ms]) => ms));

/** The model with eight bits, which other weights are compared with. */
function eightBitsFigures(found: ReadonlyMap<string, number>, dense_ms: number, digits?: number): object {
  const eightBits_ms = found.get(EIGHT_BITS);
  return eightBits_ms === undefined
    ? {}
    : { eightBits_ms: round(eightBits_ms, digits), timesEightBits: round(eightBits_ms / dense_ms) };
}

const llamaCppFigures = (llamaCpp_ms: number, dense_ms: number, digits?: number): object =>
  Number.isFinite(llamaCpp_ms)
    ? { llamaCpp_ms: round(llamaCpp_ms, digits), timesLlamaCpp: round(llamaCpp_ms / dense_ms) }
    : {};

/**
 * Opens llama.cpp's peers on the default model's GGUF file, for a model that was imported from it. When that fails, the
 * bench runs without them, and its result has `missing`, which says why.
 */
export async function openLlamaCppPeers<T>(
  home: string,
  modelHash: string,
  say: BenchHooks['say'],
  open: (ggufFile: string) => Promise<T[]>,
): Promise<{ peers: T[]; missing: object }> {
  if (modelHash !== DEFAULT_MODEL_HASH) return { peers: [], missing: {} };
  const file = defaultModelFile(home);
  try {
    if (!existsSync(file)) throw new Error("the model's GGUF file is not there");
    return { peers: await open(file), missing: {} };
  } catch (error) {
    const [llamaCppProblem] = (error as Error).message.split('\n');
    say(`llama.cpp is left out: ${llamaCppProblem}`);
    return { peers: [], missing: { llamaCpp: null, llamaCppProblem } };
  }
}

/**
 * Our engine (a peer for each mask) and what it is compared with: the eight-bit model when `model` has other weights, and
 * llama.cpp when `model` was imported from the GGUF file that llama.cpp reads.
 */
async function openCompared({ home, model, kvType = 'f32', say }: DecodeOptions, contextTokens: number) {
  // As the server opens it.
  const served = { kvType, reuseLogits: true };
  const engine = await openEngine(home, model, served);
  const { manifest, dense, runner } = engine;
  const quarter = quarterMask(manifest.config.layerCount);
  const own = [engine.peer(DENSE, dense), engine.peer(QUARTER, quarter)];
  if (runner.surrogates !== undefined)
    own.push(engine.peer(SURROGATES, withSurrogates(quarter, runner.surrogates)));
  const others: (Peer & { close(): Promise<void> })[] = [];
  if (manifest.hash === DEFAULT_MODEL_HASH && manifest.weights !== 'q8') {
    const eight = await openEngine(home, DEFAULT_MODEL, served);
    others.push({ ...eight.peer(EIGHT_BITS, eight.dense), close: () => eight.runner.close() });
  }
  const { peers: llamaCpp, missing } = await openLlamaCppPeers(home, manifest.hash, say, async (file) => [
    await llamaCppPeer(file, 1, contextTokens),
    await llamaCppPeer(file, 2, contextTokens),
  ]);
  others.push(...llamaCpp);
  const names = others.map(({ name }) => name).join(', ') || 'nothing else';
  say(`${manifest.name} (${manifest.weights}, K and V in ${kvType}) against ${names}`);
  return {
    folder: engine.folder,
    manifest,
    dense,
    quarter,
    peers: [...own, ...others],
    missing,
    async [Symbol.asyncDispose]() {
      for (const peer of others) await peer.close();
      await runner.close();
    },
  };
}

type Peer = {
  readonly name: string;
  /** ms a token, greedy, after `position` tokens. */
  decode(position: number): Promise<number>;
  /** ms for a prompt of `tokens`. */
  prefill(tokens: number): Promise<number>;
};

/** A made-up prompt; prompts of different `which` differ from the first token on. */
export const somePrompt = (tokens: number, vocabulary: number, which = 0): number[] =>
  Array.from({ length: tokens }, (_, i) => 100 + ((i * 7919 + which * 104_729) % (vocabulary - 1000)));

/** Our engine, on all cores unless a device is named. All its peers share one session. */
export async function openEngine(
  home: string,
  model: string,
  held: Pick<RunnerOptions, 'device' | 'kvType' | 'reuseLogits'> = {},
) {
  const { folder, manifest } = await openInstalled(home, model);
  const runner = await openRunner(folder, manifest.config, {
    threads: availableParallelism(),
    surrogates: manifest.surrogates?.id,
    ...held,
  });
  const filled = runner.newCache();
  return {
    folder,
    manifest,
    runner,
    peer: (name: string, mask: Mask): Peer => enginePeer(runner, name, mask, filled),
    dense: denseMask(2 * manifest.config.layerCount),
  };
}

type EngineRun = { readonly runner: Runner; readonly plan: MaskPlan; readonly cache: SequenceCache };

/** Computes `prompt` from where the cache ends to `to`, in chunks. */
async function compute({ runner, plan, cache }: EngineRun, prompt: readonly number[], to: number) {
  while (cache.length < to) {
    const tokenIds = prompt.slice(cache.length, Math.min(cache.length + CHUNK_TOKENS, to));
    const isLast = cache.length + tokenIds.length === to;
    await runner.run({ cache, tokenIds, plan, logitRows: isLast ? [tokenIds.length - 1] : [] });
  }
}

/** `filled`: the cache of a dense prompt. All masks decode after it, as the time does not depend on the keys' values. */
function enginePeer(runner: Runner, name: string, mask: Mask, filled: SequenceCache): Peer {
  const plan = { mask, kv: 'preserve' } as const;
  const dense = { mask: denseMask(mask.runs.length), kv: 'preserve' } as const;
  const prompt = (tokens: number) => somePrompt(tokens, runner.config.vocabularySize);
  return {
    name,
    async decode(position) {
      filled.truncate(position);
      await compute({ runner, plan: dense, cache: filled }, prompt(position), position);
      const times = await times_ms(STEPS, (step) =>
        runner.run({ cache: filled, tokenIds: [100 + step], plan, logitRows: [0] }),
      );
      return median(times);
    },
    async prefill(tokens) {
      const cache = runner.newCache();
      const took_ms = await time_ms(() => compute({ runner, plan, cache }, prompt(tokens), tokens));
      cache.truncate(0);
      return took_ms;
    },
  };
}

/** llama.cpp through node-llama-cpp, on the GGUF file of the default model; `contextSize`: tokens a sequence. */
export async function openLlamaCpp(
  ggufFile: string,
  { threads, contextSize, sequences }: { threads: number; contextSize: number; sequences: number },
) {
  const { getLlama } = await import('node-llama-cpp');
  const llama = await getLlama({ gpu: false, build: 'never', maxThreads: threads });
  const model = await llama.loadModel({ modelPath: ggufFile });
  const context = await model.createContext({ sequences, contextSize, batchSize: 512, threads });
  return {
    sequences: Array.from({ length: sequences }, () => context.getSequence()),
    close: () => llama.dispose(),
  };
}

async function llamaCppPeer(ggufFile: string, threads: number, contextSize: number) {
  const { sequences, close } = await openLlamaCpp(ggufFile, { threads, contextSize, sequences: 1 });
  const sequence = sequences[0]!;
  const prompt = (tokens: number) => somePrompt(tokens, 49152) as never[];
  return {
    name: `llama.cpp, ${threads} threads`,
    async decode(position: number) {
      const end = sequence.nextTokenIndex;
      if (end > position) await sequence.eraseContextTokenRanges([{ start: position, end }]);
      if (end < position) await sequence.evaluateWithoutGeneratingNewTokens(prompt(position).slice(end));
      const times: number[] = [];
      let last = performance.now();
      for await (const _ of sequence.evaluate(prompt(1), { temperature: 0, yieldEogToken: true })) {
        times.push(performance.now() - last);
        last = performance.now();
        if (times.length > STEPS) break;
      }
      // The first time includes the start of the generator.
      return median(times.slice(1));
    },
    async prefill(tokens: number) {
      await sequence.clearHistory();
      return await time_ms(() => sequence.evaluateWithoutGeneratingNewTokens(prompt(tokens)));
    },
    close,
  };
}

/** Skips a quarter of the blocks, spread over the layers: 7 attention and 8 FFN blocks of SmolLM2. */
export function quarterMask(layerCount: number): Mask {
  const spread = (count: number, offset: number) =>
    Array.from({ length: count }, (_, i) =>
      Math.min(layerCount - 1, offset + Math.floor((i * (layerCount - 4)) / count)),
    );
  const skipped = Math.round(layerCount / 2);
  const attention = Math.floor(skipped / 2);
  return maskFromSkippedLayers(2 * layerCount, {
    skipAttention: spread(attention, 3),
    skipFfn: spread(skipped - attention, 2),
  });
}
