/**
 * The runner on a GPU, with the graph of `model/architectures/webgpu-llama.ts`. Only token ids, positions and masks go to
 * the device; only the wanted logits come back.
 *
 * `GroupQueryAttention` takes one new token of many sequences, or many tokens of one sequence. So a step is one run for all
 * single tokens, and one or more runs for each piece of a prompt (`webgpu-attention.ts` limits the tokens of a run).
 */
import { denseMask } from '../../shared/mask/mask.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { headRoom } from '../model/architectures/head-attention.ts';
import { webgpuLlamaGraph } from '../model/architectures/webgpu-llama.ts';
import type { ModelConfig } from '../model/model-source.ts';
import { readStoredLlama } from '../model/stored-llama.ts';
import type { FloatType } from '../onnx/graph.ts';
import type { Feeds, Fetches, RuntimeTensor, Session } from '../onnx/session.ts';
import { createSessionIn, floats, floatTensor, integers, tensor } from '../onnx/session.ts';
import { nameOf, type RunInput } from './run-input.ts';
import { checkInputs, kvTypeOn, type Runner, type RunnerOptions } from './runner-interface.ts';
import { pieceTokensMax } from './webgpu-attention.ts';
import { DeviceCache, DeviceCaches, onDevice } from './webgpu-caches.ts';
import { DevicePrefixes } from './webgpu-prefixes.ts';

type Input = RunInput & { readonly cache: DeviceCache };

export async function openWebgpuRunner(
  modelDir: string,
  config: ModelConfig,
  options: RunnerOptions,
): Promise<Runner> {
  const { surrogates } = options;
  const floatType = kvTypeOn(options.device, options.kvType);
  const { layerCount, kvHeadCount, contextTokens } = config;
  const headSize = headRoom(config);
  const pieceMax = await pieceTokensMax({ ...config, headSize }, floatType);
  const session = await openGraph(modelDir, config, floatType, options);
  const caches = await DeviceCaches.open({
    layerCount,
    kvHeadCount,
    headSize,
    contextTokens,
    width: kvHeadCount * headSize,
    kvType: floatType,
  });
  const parts = { session, caches, config, floatType, pieceMax };
  const runMany = async (inputs: readonly RunInput[]): Promise<Float32Array[]> => {
    checkInputs(inputs, surrogates);
    for (const { cache, tokenIds } of inputs) cache.reserve(tokenIds.length);
    const own = inputs.map((input): Input => ({ ...input, cache: onDevice(input.cache) }));
    return caches.inTurn(() => runStep(parts, own));
  };
  const runner: Runner = {
    config,
    surrogates,
    newCache: () => new DeviceCache(caches),
    run: async (input) => (await runMany([input]))[0]!,
    runMany,
    newPrefixes: (tokensMax, now_ms) => new DevicePrefixes(caches, tokensMax, now_ms),
    close: async () => {
      await caches.close();
      session.endProfiling();
      await session.release();
    },
  };
  try {
    if (floatType === 'f16') await requireRange(runner);
  } catch (error) {
    await runner.close();
    throw error;
  }
  return runner;
}

const CHECKED_TOKENS = 16;

/**
 * Tests the range of fp16 with one short run: numbers beyond 65,504 become infinite, which makes the logits infinite or NaN.
 * @throws MaskrouteError `engine_failed` when the model's numbers exceed fp16.
 */
async function requireRange(runner: Runner): Promise<void> {
  const { vocabularySize, contextTokens, layerCount } = runner.config;
  const count = Math.min(CHECKED_TOKENS, contextTokens);
  const rows = Array.from({ length: count }, (_, row) => row);
  const cache = runner.newCache();
  const logits = await runner.run({
    cache,
    // Spread over the whole vocabulary.
    tokenIds: rows.map((row) => Math.floor((row * vocabularySize) / count)),
    plan: { mask: denseMask(2 * layerCount), kv: 'preserve' },
    logitRows: rows,
  });
  cache.truncate(0);
  if (logits.every(Number.isFinite)) return;
  throw new MaskrouteError(
    'engine_failed',
    'Numbers of this model exceed the range of fp16 (65,504): set --float-type f32.',
  );
}

/** Builds the graph each time: that takes some milliseconds, and installed models need no further file. */
async function openGraph(
  modelDir: string,
  config: ModelConfig,
  floatType: FloatType,
  { threads, profileFile }: RunnerOptions,
): Promise<Session> {
  const stored = await readStoredLlama(modelDir, config, 'with surrogates');
  const graph = webgpuLlamaGraph(config, stored, floatType);
  return createSessionIn(modelDir, graph, {
    threads,
    device: 'webgpu',
    ...(profileFile === undefined ? {} : { profileFile }),
  });
}

type Parts = {
  readonly session: Session;
  readonly caches: DeviceCaches;
  readonly config: ModelConfig;
  readonly floatType: FloatType;
  /** Most new tokens of one sequence in one run. */
  readonly pieceMax: number;
};

/** Caches advance only after all runs, so that a step that fails half-way can be repeated. */
async function runStep(parts: Parts, inputs: readonly Input[]): Promise<Float32Array[]> {
  const broken = inputs.find(({ cache }) => cache.failure !== undefined);
  if (broken !== undefined) throw broken.cache.failure;
  const logits = new Map<Input, Float32Array>();
  // Single tokens first: their run also writes a dummy token behind the tokens of all other sequences.
  const single = inputs.filter(({ tokenIds }) => tokenIds.length === 1);
  if (single.length > 0) await runSingle(parts, single, logits);
  for (const input of inputs) {
    if (input.tokenIds.length > 1) logits.set(input, await runPieces(parts, input));
  }
  for (const { cache, tokenIds } of inputs) cache.length += tokenIds.length;
  return inputs.map((input) => logits.get(input)!);
}

/** One run for one token each of several sequences. */
async function runSingle(
  parts: Parts,
  inputs: readonly Input[],
  logits: Map<Input, Float32Array>,
): Promise<void> {
  const { caches } = parts;
  await caches.makeRoom(
    inputs.map(({ cache }) => cache),
    1,
  );
  const lengths = new Map(caches.placed.map(({ place, length }) => [place!, length]));
  const rows = Array.from({ length: caches.places }, (_, place): Row => {
    const input = inputs.find(({ cache }) => cache.place === place);
    // In a place without input the run writes a dummy token behind the last one.
    return { past: lengths.get(place) ?? 0, tokenIds: input?.tokenIds ?? [0], input };
  });
  const found = await runRows(parts, rows, caches.buffers);
  rows.forEach(({ input }, place) => {
    if (input !== undefined) logits.set(input, found[place]!);
  });
}

/** Runs for several tokens of one sequence, at most `pieceMax` each. */
async function runPieces(parts: Parts, input: Input): Promise<Float32Array> {
  const { caches, pieceMax, config } = parts;
  const { cache, tokenIds, logitRows } = input;
  await caches.makeRoom([cache], tokenIds.length);
  const logits = new Float32Array(logitRows.length * config.vocabularySize);
  let known = 0;
  await caches.with(cache.place!, async (buffers) => {
    for (let from = 0; from < tokenIds.length; from += pieceMax) {
      const to = Math.min(tokenIds.length, from + pieceMax);
      const piece: Input = {
        ...input,
        tokenIds: Array.from({ length: to - from }, (_, i) => tokenIds[from + i]!),
        logitRows: logitRows.flatMap((row) => (row >= from && row < to ? [row - from] : [])),
      };
      const row = { past: cache.length + from, tokenIds: piece.tokenIds, input: piece };
      const [own] = await runRows(parts, [row], buffers);
      logits.set(own!, known);
      known += own!.length;
    }
  });
  return logits;
}

/** A row of the buffers in one run: its length, its new tokens, and its input; undefined: a dummy row. */
type Row = {
  readonly past: number;
  readonly tokenIds: ArrayLike<number>;
  readonly input: Input | undefined;
};

/** One run of the graph: one sequence for each row of the buffers, all with the same number of new tokens. */
async function runRows(
  { session, config, floatType }: Parts,
  rows: readonly Row[],
  buffers: readonly RuntimeTensor[],
): Promise<Float32Array[]> {
  const feeds: Feeds = { ...tokenFeeds(rows), ...maskFeeds(session, config.layerCount, floatType, rows) };
  const fetches: Fetches = { logits: null };
  buffers.forEach((buffer, i) => {
    feeds[`past_${nameOf(i)}`] = buffer;
    fetches[`present_${nameOf(i)}`] = buffer;
  });
  const outputs = await session.run(feeds, fetches);
  return logitsByRow(floats(outputs.logits!), rows, config.vocabularySize);
}

function tokenFeeds(rows: readonly Row[]): Feeds {
  const tokens = rows[0]!.tokenIds.length;
  const each = (of: (row: Row, token: number) => number): number[] =>
    rows.flatMap((row) => Array.from({ length: tokens }, (_, token) => of(row, token)));
  const shape = [rows.length, tokens];
  const ends = rows.map(({ past }) => past + tokens);
  const places = each(({ past }, token) => past + token);
  return {
    token_ids: integers(
      each(({ tokenIds }, token) => tokenIds[token]!),
      shape,
    ),
    // A dummy token is never read, so any position within the table will do.
    positions: integers(
      each(({ past, input }, token) => (input === undefined ? 0 : past + token)),
      shape,
    ),
    kv_positions: tensor('i32', Int32Array.from(places), [rows.length, 1, tokens, 1]),
    last_keys: tensor(
      'i32',
      Int32Array.from(ends, (end) => end - 1),
      [rows.length],
    ),
    keys_max: tensor('i32', Int32Array.of(Math.max(...ends)), [1]),
    logit_rows: integers(
      rows.flatMap(({ input }, row) => input?.logitRows.map((token) => row * tokens + token) ?? []),
    ),
    is_first: tensor(
      'bool',
      Uint8Array.from(places, (place) => Number(place === 0)),
      [...shape, 1],
    ),
  };
}

function maskFeeds(session: Session, layerCount: number, floatType: FloatType, rows: readonly Row[]): Feeds {
  const blocks = Array.from({ length: 2 * layerCount }, (_, block) => block);
  const runs = ({ plan }: Input, block: number) => plan.mask.runs[block] === 1;
  const live = rows.flatMap(({ input }) => input ?? []);
  const running = blocks.map((block) => live.filter((input) => runs(input, block)).length);
  const flags = (is: (count: number) => boolean) =>
    tensor(
      'bool',
      Uint8Array.from(running, (count) => Number(is(count))),
      [blocks.length],
    );
  const gates = (is: (input: Input, block: number) => boolean) => {
    const values = blocks.flatMap((block) =>
      rows.map(({ input }) => Number(input !== undefined && is(input, block))),
    );
    return floatTensor(floatType, values, [blocks.length, rows.length, 1, 1]);
  };
  return {
    plain: flags((count) => count === live.length),
    mixed: flags((count) => count > 0 && count < live.length),
    gates: gates(runs),
    ...(session.inputNames.includes('surrogate_gates')
      ? {
          surrogate_gates: gates(
            (input, block) => input.plan.mask.surrogates !== undefined && !runs(input, block),
          ),
        }
      : {}),
  };
}

function logitsByRow(logits: Float32Array, rows: readonly Row[], width: number): Float32Array[] {
  let from = 0;
  return rows.map(({ input }) => {
    const own = logits.subarray(from, from + (input?.logitRows.length ?? 0) * width);
    from += own.length;
    return own;
  });
}
