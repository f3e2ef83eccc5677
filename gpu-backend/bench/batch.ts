/**
 * `bench batch` and `bench prefix`: many users at once, through the server's engine (thread, scheduler, sampler), against
 * llama.cpp with the same number of sequences on the same GGUF in the same run.
 *
 * The limit of a batch: a step reads the weights once for all sequences. So a step of eight sequences costs a step of one,
 * and the products of seven more rows. Attention reads each sequence's own K and V.
 */
import { availableParallelism } from 'node:os';
import { denseMask, type Mask, maskFromSkippedLayers } from '../../shared/mask/mask.ts';
import { type Engine, type EngineEvent, type GenerateRequest, PLAIN_SAMPLING } from '../engine/engine.ts';
import { createEngine } from '../engine/start-engine.ts';
import { inTurns, interleaved, median, quantile, round } from '../measure.ts';
import type { KvType } from '../model/model-source.ts';
import { DEFAULT_MODEL } from '../model/sources/resolve.ts';
import { openInstalled } from '../model/store.ts';
import { type Device, deviceName } from '../onnx/device.ts';
import {
  type DecodeOptions,
  openLlamaCpp,
  openLlamaCppPeers,
  quarterMask,
  type SpeedOptions,
  somePrompt,
  thatFit,
} from './decode.ts';

const STREAMS = 8;
/** Tokens of each stream that are measured. */
const STEPS = 40;
const ANSWER_TOKENS_MAX = 4000;
/** Prompt lengths of the eight streams, in tokens. */
const LENGTHS: Readonly<Record<string, readonly number[]>> = {
  64: Array<number>(STREAMS).fill(64),
  440: Array<number>(STREAMS).fill(440),
  mixed: [30, 64, 120, 200, 300, 440, 560, 700],
};
/** Tokens of a stream with its prompt: its own steps, and as many while the prompts of others are read. */
export const streamTokens = (prompt: number): number => prompt + 2 * STEPS;
/** Tokens of each of the streams beside a long prompt, before that is read. */
const GAP_TOKENS = 100;
const BESIDE_PROMPT = 'beside a long prompt';
const ONE = 'one stream';
const EIGHT = 'eight streams';
const EIGHT_QUARTER = 'eight streams of one mask at 25 %';
const EIGHT_MASKS = 'eight streams of eight masks at 25 %';
const LONG_PROMPT_TOKENS_MAX = 4000;
const SHARED_TOKENS = 400;
/** Room for all prompts of one length, dense and under two kinds of masks, so that no prompt is computed twice. */
const PREFIX_TOKENS_MAX = 12_000;
export const NEVER = new AbortController().signal;

/** Tokens a second of all streams together, while all of them run. */
type Subject = { readonly name: string; tokensPerSecond(prompts: readonly number[][]): Promise<number> };

export async function benchBatch(options: DecodeOptions): Promise<object> {
  const { home, model, kvType = 'f32', rounds, say, signal } = options;
  const { manifest } = await openInstalled(home, model);
  const fitting = thatFit(
    Object.entries({ ...LENGTHS, [BESIDE_PROMPT]: [64 + GAP_TOKENS] }),
    ([, lengths]) => streamTokens(Math.max(...lengths)),
    manifest.config,
    say,
  );
  const lengthsThatFit = fitting.filter(([name]) => name !== BESIDE_PROMPT);
  const hasRoomBeside = fitting.some(([name]) => name === BESIDE_PROMPT);
  await using ours = await openOurs(home, { model, kvType });
  await using opened = new AsyncDisposableStack();
  const { peers: llamaCpp, missing } = await openLlamaCppPeers(home, ours.hash, say, async (file) => [
    await llamaCppStreams(file, 2),
    await llamaCppStreams(file, 1),
  ]);
  for (const { close } of llamaCpp) opened.defer(close);
  const { layerCount } = ours.config;
  const dense = denseMask(2 * layerCount);
  const masks = eightMasks(layerCount);
  const subjects: Subject[] = [
    { name: ONE, tokensPerSecond: ([prompt]) => ours.streams([prompt!], [dense]) },
    { name: EIGHT, tokensPerSecond: (prompts) => ours.streams(prompts, [dense]) },
    { name: EIGHT_QUARTER, tokensPerSecond: (prompts) => ours.streams(prompts, [masks[0]!]) },
    { name: EIGHT_MASKS, tokensPerSecond: (prompts) => ours.streams(prompts, masks) },
    ...llamaCpp,
  ];
  const figures: Record<string, Record<string, number>> = {};
  for (const [length, lengths] of lengthsThatFit) {
    // The same prompts in each round, so that later rounds find them in the prefix cache.
    const prompts = lengths.map((tokens) => newPrompt(tokens, ours.config.vocabularySize));
    const found = await inTurns(subjects, rounds, (subject) => subject.tokensPerSecond(prompts), signal);
    const of = (name: string) => round(median(found.get(name)!), 1);
    for (const { name } of subjects) say(`after ${length} tokens, ${name}: ${of(name)} tokens/s`);
    figures[length] = {
      oneStream: of(ONE),
      eightStreams: of(EIGHT),
      eightOneMask: of(EIGHT_QUARTER),
      eightMasks: of(EIGHT_MASKS),
      ...(llamaCpp.length > 0 && { llamaCpp: Math.max(...llamaCpp.map(({ name }) => of(name))) }),
    };
  }
  const byLength = (name: string) =>
    Object.fromEntries(Object.entries(figures).map(([length, found]) => [length, found[name]!]));
  const gaps = hasRoomBeside ? await gapsBesidePrompt(ours, say) : {};
  const [at64] = Object.values(figures);
  return {
    bench: 'batch',
    model: ours.name,
    weights: ours.weights,
    kvType,
    streams: STREAMS,
    rounds,
    oneStream_tokensPerSecond: byLength('oneStream'),
    eightStreams_tokensPerSecond: byLength('eightStreams'),
    eightOneMask_tokensPerSecond: byLength('eightOneMask'),
    eightMasks_tokensPerSecond: byLength('eightMasks'),
    ...(llamaCpp.length === 0 ? missing : { llamaCpp_tokensPerSecond: byLength('llamaCpp') }),
    timesOneStream: round(at64!.eightStreams! / at64!.oneStream!),
    ...(llamaCpp.length > 0 && {
      timesLlamaCpp: Object.fromEntries(
        Object.entries(figures).map(([length, found]) => [
          length,
          round(found.eightStreams! / found.llamaCpp!),
        ]),
      ),
    }),
    masksAgainstOneMask: round(at64!.eightMasks! / at64!.eightOneMask!),
    ...gaps,
  };
}

/** One mask for each stream, all of the same sparsity. */
export const eightMasks = (layerCount: number): Mask[] =>
  Array.from({ length: STREAMS }, (_, i) => shifted(quarterMask(layerCount), i));

/** The mask with all layers moved on by `steps`, cyclically. */
function shifted(mask: Mask, steps: number): Mask {
  const layerCount = mask.runs.length / 2;
  const layers = (offset: number) =>
    [...Array(layerCount).keys()]
      .filter((layer) => mask.runs[2 * layer + offset] === 0)
      .map((layer) => (layer + steps) % layerCount);
  return maskFromSkippedLayers(2 * layerCount, { skipAttention: layers(0), skipFfn: layers(1) });
}

export async function openOurs(
  home: string,
  {
    model = DEFAULT_MODEL,
    promptLookup = false,
    ...held
  }: {
    readonly model?: string;
    readonly device?: Device;
    readonly kvType?: KvType | undefined;
    readonly promptLookup?: boolean;
  },
) {
  const { folder, manifest } = await openInstalled(home, model);
  const { config, hash, name, weights } = manifest;
  const surrogates = manifest.surrogates?.id;
  const engine = await createEngine({
    limits: { queueTimeout_ms: 600_000, prefixTokensMax: PREFIX_TOKENS_MAX, promptLookup },
    modelDir: folder,
    hash,
    config,
    threads: availableParallelism(),
    ...held,
    ...(surrogates && { surrogates }),
  });
  return {
    engine,
    config,
    hash,
    name,
    weights,
    /** Tokens a second of all streams. `of`: each stream's mask, or one mask for all. */
    streams(prompts: readonly number[][], of: readonly Mask[]): Promise<number> {
      const stop = new AbortController();
      const streams = prompts.map((tokens, i) => {
        const prompt = Int32Array.from(tokens);
        // Two tenants: one tenant may have at most six of the eight places.
        const tenant = `tenant ${i % 2}`;
        return tokensOf(engine, prompt, of[i % of.length]!, ANSWER_TOKENS_MAX, stop.signal, tenant);
      });
      return whileAllRun(streams, stop);
    },
    [Symbol.asyncDispose]: () => engine.close(),
  };
}

let promptCount = 0;
/** A prompt that shares no prefix with earlier ones, so that none of its pages is cached. */
const newPrompt = (tokens: number, vocabularySize: number): number[] =>
  somePrompt(tokens, vocabularySize, promptCount++);

export const requestOf = (
  promptTokenIds: Int32Array,
  mask: Mask,
  maxTokens: number,
  tenant = 'bench',
): GenerateRequest => ({
  requestId: `bench-${promptCount++}`,
  tenant,
  promptTokenIds,
  plan: { mask, kv: 'preserve' },
  sampling: { ...PLAIN_SAMPLING, temperature: 0 },
  maxTokens,
  minTokens: 0,
  stopTokenIds: [],
  logprobs: undefined,
  promptLogprobs: undefined,
});

/** Yields once for each token of an answer, until `signal`. */
async function* tokensOf(
  engine: Engine,
  prompt: Int32Array,
  mask: Mask,
  maxTokens: number,
  signal = NEVER,
  tenant = 'bench',
): AsyncGenerator<void> {
  const events: AsyncIterable<EngineEvent> = engine.generate(
    requestOf(prompt, mask, maxTokens, tenant),
    signal,
  );
  for await (const event of events) if (event.type === 'token') yield;
}

/** Tokens a second, from the last stream's first token until each has `STEPS` more. */
async function whileAllRun(streams: readonly AsyncIterable<void>[], stop: AbortController): Promise<number> {
  const counts = streams.map(() => 0);
  let [all, from_ms, to_ms] = [0, 0, 0];
  await Promise.all(
    streams.map(async (stream, i) => {
      for await (const _ of stream) {
        if (stop.signal.aborted) return;
        counts[i]!++;
        if (from_ms > 0) all++;
        else if (!counts.includes(0)) {
          from_ms = performance.now();
          counts.fill(1);
        }
        if (Math.min(...counts) <= STEPS) continue;
        to_ms = performance.now();
        stop.abort();
      }
      if (stop.signal.aborted) return;
      stop.abort();
      throw new Error('a stream ended before it was measured');
    }),
  );
  return (1000 * all) / (to_ms - from_ms);
}

/** Times between the tokens of four streams, alone and while a long prompt is read beside them. */
async function gapsBesidePrompt(
  { engine, config }: Awaited<ReturnType<typeof openOurs>>,
  say: DecodeOptions['say'],
) {
  const dense = denseMask(2 * config.layerCount);
  const stop = new AbortController();
  const times: number[][] = [[], [], [], []];
  const streams = times.map(async (own, i) => {
    const request = requestOf(Int32Array.from(newPrompt(64 + i, config.vocabularySize)), dense, 4000);
    for await (const event of engine.generate(request, stop.signal))
      if (event.type === 'token') own.push(performance.now());
  });
  while (Math.min(...times.map((own) => own.length)) < GAP_TOKENS)
    await new Promise((wake) => setTimeout(wake, 10));
  const begun_ms = performance.now();
  // The context holds one token of the answer, too.
  const promptTokens = Math.min(LONG_PROMPT_TOKENS_MAX, config.contextTokens - 1);
  const prompt = Int32Array.from(newPrompt(promptTokens, config.vocabularySize));
  for await (const _ of tokensOf(engine, prompt, dense, 1));
  const ended_ms = performance.now();
  stop.abort();
  await Promise.all(streams);
  const gaps = (from_ms: number, to_ms: number) =>
    times.flatMap((own) =>
      own
        .map((time_ms, i) => ({ time_ms, gap_ms: time_ms - (own[i - 1] ?? time_ms) }))
        .filter(({ time_ms, gap_ms }) => gap_ms > 0 && time_ms > from_ms && time_ms < to_ms)
        .map(({ gap_ms }) => gap_ms),
    );
  const [alone, during] = [gaps(0, begun_ms), gaps(begun_ms, ended_ms)];
  const p99_ms = quantile(during, 0.99);
  say(
    `tokens of four streams come every ${round(median(alone), 1)} ms; while a prompt of ${promptTokens} tokens is read, ${round(p99_ms, 1)} ms at p99`,
  );
  return {
    gapMedian_ms: round(median(alone), 1),
    gapMedianBesidePrompt_ms: round(median(during), 1),
    gapP99BesidePrompt_ms: round(p99_ms, 1),
    gapP99TimesMedian: round(p99_ms / median(alone)),
    gapPromptTokens: promptTokens,
    gapPrompt_ms: round(ended_ms - begun_ms, 0),
  };
}

/** llama.cpp through node-llama-cpp, with a sequence for each stream. */
async function llamaCppStreams(ggufFile: string, threads: number) {
  const { sequences, close } = await openLlamaCpp(ggufFile, {
    threads,
    contextSize: 1024,
    sequences: STREAMS,
  });
  /** The prompt whose K and V each sequence holds, followed by its answer's. */
  const held: (readonly number[] | undefined)[] = sequences.map(() => undefined);
  async function* stream(i: number, prompt: readonly number[]): AsyncGenerator<void> {
    const sequence = sequences[i]!;
    if (held[i] === prompt) {
      await sequence.eraseContextTokenRanges([{ start: prompt.length - 1, end: sequence.nextTokenIndex }]);
    } else {
      await sequence.clearHistory();
      await sequence.evaluateWithoutGeneratingNewTokens(prompt.slice(0, -1) as never[]);
      held[i] = prompt;
    }
    // A stream that ended would leave the others waiting for it.
    const endless = { temperature: 0, yieldEogToken: true };
    for await (const _ of sequence.evaluate(prompt.slice(-1) as never[], endless)) yield;
  }
  return {
    name: `llama.cpp, ${STREAMS} sequences, ${threads} threads`,
    tokensPerSecond: (prompts: readonly number[][]) =>
      whileAllRun(
        prompts.map((prompt, i) => stream(i, prompt)),
        new AbortController(),
      ),
    close,
  };
}

/** Time to first token of prompts whose first 400 tokens are cached, and of new prompts. */
export async function benchPrefix(options: SpeedOptions & { readonly device: Device }): Promise<object> {
  const { home, rounds, device, say, signal } = options;
  await using ours = await openOurs(home, { device });
  const { engine, config, name } = ours;
  const mask = denseMask(2 * config.layerCount);
  const first_ms = async (prompt: Int32Array): Promise<number> => {
    const begun_ms = performance.now();
    for await (const _ of tokensOf(engine, prompt, mask, 1)) return performance.now() - begun_ms;
    throw new Error('no token came');
  };
  const shared = newPrompt(SHARED_TOKENS, config.vocabularySize);
  const question = () => newPrompt(24, config.vocabularySize);
  const found = await interleaved(
    [
      {
        name: 'new',
        measure: () =>
          first_ms(Int32Array.from([...newPrompt(SHARED_TOKENS, config.vocabularySize), ...question()])),
      },
      { name: 'known', measure: () => first_ms(Int32Array.from([...shared, ...question()])) },
    ],
    rounds,
    signal,
  );
  const [new_ms, known_ms] = [found.get('new')!, found.get('known')!];
  say(
    `the first token of a new prompt comes after ${round(new_ms, 1)} ms, of a known one after ${round(known_ms, 1)} ms`,
  );
  return {
    bench: 'prefix',
    model: name,
    device: deviceName(device),
    rounds,
    sharedTokens: SHARED_TOKENS,
    newTokens: 24,
    new_ms: round(new_ms, 1),
    known_ms: round(known_ms, 1),
    saved: round(1 - known_ms / new_ms),
  };
}
