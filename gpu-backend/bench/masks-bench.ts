/**
 * `bench masks`: the time that skipping blocks saves on an installed model of any size, by kind of block, for one sequence
 * and for eight, in decode and prefill; and the time to open the model and its memory.
 *
 * The limit: a token takes as long as reading its weights, so a mask can save the share of the bytes that it skips (in
 * prefill, the share of the products). That share is the mask's `worth`; `gained` is the measured saving divided by it.
 *
 * A deep model's figures can be extrapolated from a model of the same widths with fewer layers
 * (`scripts/random-model.ts --layers 4`). All layers take the same time, so the time without the head is multiplied. The
 * result says so.
 */
import { stat } from 'node:fs/promises';
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import { denseMask, type Mask, maskFromSkippedLayers } from '../../shared/mask/mask.ts';
import type { RunInput } from '../engine/run-input.ts';
import { openRunner } from '../engine/runner.ts';
import type { Runner } from '../engine/runner-interface.ts';
import { type BenchHooks, interleaved, median, round, type Subject, time_ms, times_ms } from '../measure.ts';
import { storedBytes } from '../model/architectures/projections.ts';
import { WEIGHTS_FILE } from '../model/emit.ts';
import type { ModelConfig } from '../model/model-source.ts';
import { openInstalled } from '../model/store.ts';
import { readStoredLlama } from '../model/stored-llama.ts';
import { memoryOf } from '../processes.ts';
import { somePrompt } from './decode.ts';

const SHARES = [0.125, 0.25];
const KINDS = ['attention', 'ffn', 'both'] as const;
type Kind = (typeof KINDS)[number];
const BATCHES = [1, 8];
/** Tokens of a prompt, which prefill computes in one run. */
const PROMPT_TOKENS = 64;
/** Tokens that are decoded before the memory is measured. */
const MEMORY_STEPS = 4;

type MasksBenchOptions = BenchHooks & {
  readonly home: string;
  readonly model: string;
  readonly rounds: number;
  /** Decoded tokens whose median is one figure. */
  readonly steps: number;
  readonly prefill: boolean;
  /** Layers of the model that the figures are for, unless it is the installed one. */
  readonly layers?: number | undefined;
};

export async function benchMasks(options: MasksBenchOptions): Promise<object> {
  const { home, model, rounds, say, signal } = options;
  const { folder, manifest } = await openInstalled(home, model);
  const { config } = manifest;
  const weights_bytes = (await stat(join(folder, WEIGHTS_FILE))).size;
  const before = memoryOf(process.pid);
  const begun_ms = performance.now();
  const surrogates = manifest.surrogates?.id;
  const threads = availableParallelism();
  const runner = await openRunner(folder, config, { threads, batches: true, surrogates });
  const open_s = (performance.now() - begun_ms) / 1000;
  const costs = await blockCosts(folder, config);
  // The memory of decoding is measured here: later, caches of the bench that wait for the garbage collector would count.
  const steps = { steps: MEMORY_STEPS, head: 'with head' } as const;
  await decode_ms(runner, denseMask(2 * config.layerCount), 1, steps);
  const after = memoryOf(process.pid);
  say(`open after ${open_s.toFixed(1)} s; the weights are ${(weights_bytes / 1e9).toFixed(2)} GB`);
  say(
    `decoding takes ${((after.now_bytes - before.now_bytes) / 1e9).toFixed(2)} GB of memory, with pages of mapped files`,
  );
  const tables: Record<string, object> = {};
  const layers = options.layers ?? config.layerCount;
  if (layers !== config.layerCount)
    say(`measured on ${config.layerCount} layers, extrapolated to ${layers}: all but the head is multiplied`);
  for (const batch of BATCHES) {
    const work = { runner, batch, say, signal, rounds, times: layers / config.layerCount };
    tables[`decode${batch}`] = await table(work, costs, 1, (mask, head) =>
      decode_ms(runner, mask, batch, { steps: options.steps, head }),
    );
    if (options.prefill)
      tables[`prefill${batch}`] = await table(work, costs, PROMPT_TOKENS, (mask, head) =>
        prefill_ms(runner, mask, batch, head),
      );
  }
  await runner.close();
  return {
    bench: 'masks',
    model: manifest.name,
    weights: manifest.weights,
    layers,
    rounds,
    ...(layers !== config.layerCount && { measuredLayers: config.layerCount }),
    open_s: round(open_s, 1),
    weights_GB: round(weights_bytes / 1e9),
    ownMemory_GB: round((after.own_bytes - before.own_bytes) / 1e9),
    memory_GB: round((after.now_bytes - before.now_bytes) / 1e9),
    timesWeights: round((after.now_bytes - before.now_bytes) / weights_bytes),
    timesWeightsAtPeak: round((after.peak_bytes - before.now_bytes) / weights_bytes),
    promptTokens: PROMPT_TOKENS,
    ...tables,
  };
}

type Work = BenchHooks & {
  readonly runner: Runner;
  readonly batch: number;
  readonly rounds: number;
  /** The reported model's layers divided by the measured model's. */
  readonly times: number;
};

/** Whether a run computes logits, of the last row of each sequence. */
type Head = 'with head' | 'without head';

/** Figures of every mask. `tokens`: of each sequence in a run; the head is computed for one of them. */
async function table(
  { runner, batch, rounds, times, say, signal }: Work,
  costs: BlockCosts,
  tokens: number,
  measure_ms: (mask: Mask, head: Head) => Promise<number>,
): Promise<object> {
  const { layerCount } = runner.config;
  const masks = new Map<string, Mask>([['dense', denseMask(2 * layerCount)]]);
  for (const share of SHARES)
    for (const kind of KINDS) masks.set(`${kind} ${100 * share} %`, spreadMask(layerCount, share, kind));
  const subjects: Subject[] = [...masks].map(([name, mask]) => ({
    name,
    measure: () => measure_ms(mask, 'with head'),
  }));
  if (times !== 1)
    subjects.push({ name: 'body', measure: () => measure_ms(masks.get('dense')!, 'without head') });
  const found = toldTimes(await interleaved(subjects, rounds, signal), times);
  const dense_ms = found.get('dense')!;
  const rows: Record<string, object> = {};
  for (const [name, mask] of masks) {
    const ms = found.get(name)!;
    const worth = skippedShare(costs, mask, tokens, times);
    const gained = worth === 0 ? undefined : (1 - ms / dense_ms) / worth;
    const gain = gained === undefined ? '' : `, ${Math.round(100 * gained)} % of the possible saving`;
    say(`${batch} × ${tokens} tokens, ${name}: ${ms.toFixed(1)} ms${gain}`);
    rows[name] = {
      ms: round(ms, 1),
      ...(gained !== undefined && { worth: round(worth), gained: round(gained) }),
    };
  }
  return rows;
}

/**
 * The measured times in ms, extrapolated to `times` as many layers. The head's time, `dense` minus `body` (dense without
 * logits), is not multiplied.
 */
export function toldTimes(measured: ReadonlyMap<string, number>, times: number): ReadonlyMap<string, number> {
  if (times === 1) return measured;
  const head_ms = Math.max(0, measured.get('dense')! - measured.get('body')!);
  return new Map([...measured].map(([name, ms]) => [name, head_ms + times * (ms - head_ms)]));
}

/** Skips a share of all blocks, of one kind or half of each, spread over all layers except the first and the last. */
export function spreadMask(layerCount: number, share: number, kind: Kind): Mask {
  const count = Math.round(2 * layerCount * share);
  const spread = (blocks: number, offset: number) =>
    Array.from({ length: blocks }, (_, i) => 1 + Math.floor(((i + offset) * (layerCount - 2)) / blocks));
  const attention = kind === 'both' ? Math.floor(count / 2) : kind === 'attention' ? count : 0;
  return maskFromSkippedLayers(2 * layerCount, {
    skipAttention: spread(attention, 0),
    skipFfn: spread(count - attention, 0.5),
  });
}

/**
 * Bytes that a token reads for each part of a layer, and for the head; the products are in the same proportion. K and V
 * of a skipped attention block are still computed.
 */
export type BlockCosts = {
  readonly attention: number;
  readonly keysValues: number;
  readonly ffn: number;
  readonly head: number;
};

async function blockCosts(folder: string, config: ModelConfig): Promise<BlockCosts> {
  const { layers, head } = await readStoredLlama(folder, config);
  const { headCount: N, kvHeadCount: G } = config;
  const mean = (bytes: (layer: (typeof layers)[number]) => number) =>
    layers.reduce((sum, layer) => sum + bytes(layer), 0) / layers.length;
  const keysValues = mean(({ qkv }) => (storedBytes(qkv) * 2 * G) / (N + 2 * G));
  return {
    attention: mean(({ qkv, output }) => storedBytes(qkv) + storedBytes(output)) - keysValues,
    keysValues,
    ffn: mean(({ gateUp, down }) => storedBytes(gateUp) + storedBytes(down)),
    head: head.reduce((sum, stretch) => sum + storedBytes(stretch), 0),
  };
}

/** The share of the cost that the mask skips, 0 to 1. `times`: see {@link Work}. */
export function skippedShare(
  { attention, keysValues, ffn, head }: BlockCosts,
  mask: Mask,
  tokens: number,
  times: number,
): number {
  let skipped = 0;
  mask.runs.forEach((runs, block) => {
    if (runs === 0) skipped += block % 2 === 0 ? attention : ffn;
  });
  return (
    (times * skipped) / (times * (mask.runs.length / 2) * (attention + keysValues + ffn) + head / tokens)
  );
}

const planOf = (mask: Mask) => ({ mask, kv: 'preserve' }) as const;

function openSequences(
  runner: Runner,
  mask: Mask,
  batch: number,
  tokens: number,
  head: Head = 'without head',
): RunInput[] {
  return Array.from({ length: batch }, (_, which) => ({
    cache: runner.newCache(),
    tokenIds: somePrompt(tokens, runner.config.vocabularySize, which),
    plan: planOf(mask),
    logitRows: head === 'with head' ? [tokens - 1] : [],
  }));
}

async function prefill_ms(runner: Runner, mask: Mask, batch: number, head: Head): Promise<number> {
  const inputs = openSequences(runner, mask, batch, PROMPT_TOKENS, head);
  return await time_ms(() => runner.runMany(inputs));
}

async function decode_ms(
  runner: Runner,
  mask: Mask,
  batch: number,
  { steps, head }: { readonly steps: number; readonly head: Head },
): Promise<number> {
  const inputs = openSequences(runner, mask, batch, 4);
  await runner.runMany(inputs);
  const logitRows = head === 'with head' ? [0] : [];
  const times = await times_ms(steps, (step) =>
    runner.runMany(inputs.map(({ cache, plan }) => ({ cache, plan, tokenIds: [100 + step], logitRows }))),
  );
  return median(times);
}
