/**
 * `bench masks`: what leaving blocks out is worth on an installed model of any size, by kind of block, for one sequence and for
 * eight, decoding and reading prompts; and how long the model takes to open and the memory that it then has.
 *
 * The limit: a token takes as long as reading its weights, so a mask is worth the share of the bytes that it skips (of a
 * prompt, the share of the products). `gained` is the part of that worth which was measured.
 *
 * A model of many layers can be told from a short one of the same widths (`scripts/random-model.ts --layers 4`): layers cost the
 * same each, so what a run takes beside its head is multiplied. The result says so.
 */
import { readFileSync } from 'node:fs';
import { stat } from 'node:fs/promises';
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import { denseMask, type Mask, maskFromSkippedLayers, type SurrogatesId } from '../../shared/mask/mask.ts';
import type { RunInput } from '../engine/run-input.ts';
import { openRunner, type Runner } from '../engine/runner.ts';
import { type BenchHooks, interleaved, median, round, type Subject } from '../measure.ts';
import type { StoredLinear } from '../model/architectures/projections.ts';
import { WEIGHTS_FILE } from '../model/emit.ts';
import type { ModelConfig } from '../model/model-source.ts';
import { openInstalled } from '../model/store.ts';
import { readStoredLlama } from '../model/stored-llama.ts';
import { somePrompt } from './decode.ts';

const SHARES = [0.125, 0.25];
const KINDS = ['attention', 'ffn', 'both'] as const;
type Kind = (typeof KINDS)[number];
const BATCHES = [1, 8];
/** Tokens of a prompt that come together, and of those that decoding goes on from. */
const PROMPT_TOKENS = 64;
/** Tokens that are decoded before memory is looked at. */
const MEMORY_STEPS = 4;

type MasksBenchOptions = BenchHooks & {
  readonly home: string;
  readonly model: string;
  readonly rounds: number;
  /** Decoded tokens whose median is one figure. */
  readonly steps: number;
  readonly prefill: boolean;
  /** Of the model that the figures are for, where it has more of such layers than the installed one. */
  readonly layers?: number | undefined;
};

export async function benchMasks(options: MasksBenchOptions): Promise<object> {
  const { home, model, rounds, say, signal } = options;
  const { folder, manifest } = await openInstalled(home, model);
  const { config } = manifest;
  const weights_bytes = (await stat(join(folder, WEIGHTS_FILE))).size;
  const before = memory();
  const begun_ms = performance.now();
  const surrogates = manifest.surrogates?.id as SurrogatesId | undefined;
  const threads = availableParallelism();
  const runner = await openRunner(folder, config, { threads, batches: true, surrogates });
  const open_s = (performance.now() - begun_ms) / 1000;
  const costs = await blockCosts(folder, config);
  // What it takes to decode; caches of all that is measured below are the bench's, and go when they are collected.
  const steps = { steps: MEMORY_STEPS, head: 'with head' } as const;
  await decode_ms(runner, denseMask(2 * config.layerCount), 1, steps);
  const after = memory();
  say(`open after ${open_s.toFixed(1)} s; the weights are ${(weights_bytes / 1e9).toFixed(2)} GB`);
  say(
    `while it decodes it has ${((after.now_bytes - before.now_bytes) / 1e9).toFixed(2)} GB with pages of mapped files`,
  );
  const tables: Record<string, object> = {};
  const layers = options.layers ?? config.layerCount;
  if (layers !== config.layerCount)
    say(`measured on ${config.layerCount} layers and told for ${layers}: all but the head is multiplied`);
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
    ...{ bench: 'masks', model: manifest.name, weights: manifest.weights, layers, rounds },
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
  /** How many times the layers count that were measured. */
  readonly times: number;
};

/** Whether a run computes logits, of the last row of each sequence. */
type Head = 'with head' | 'without head';

/** ms of every mask. `tokens`: of each sequence in a run; its head is computed once. */
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
    const gain = gained === undefined ? '' : `, ${Math.round(100 * gained)} % of the worth of what it skips`;
    say(`${batch} × ${tokens} tokens, ${name}: ${ms.toFixed(1)} ms${gain}`);
    rows[name] = {
      ms: round(ms, 1),
      ...(gained !== undefined && { worth: round(worth), gained: round(gained) }),
    };
  }
  return rows;
}

/**
 * What was measured, for so many times the layers: all but the head is multiplied, which is what `dense` takes more than
 * `body`, the same without logits.
 */
export function toldTimes(measured: ReadonlyMap<string, number>, times: number): ReadonlyMap<string, number> {
  if (times === 1) return measured;
  const head_ms = Math.max(0, measured.get('dense')! - measured.get('body')!);
  return new Map([...measured].map(([name, ms]) => [name, head_ms + times * (ms - head_ms)]));
}

/** A share of all blocks, of one kind or half of each, spread over the layers but the first and the last. */
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

/** Bytes that a token reads; products count alike. K and V of a skipped attention are computed all the same. */
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
  const keysValues = mean(({ qkv }) => (bytesOf(qkv) * 2 * G) / (N + 2 * G));
  return {
    attention: mean(({ qkv, output }) => bytesOf(qkv) + bytesOf(output)) - keysValues,
    keysValues,
    ffn: mean(({ gateUp, down }) => bytesOf(gateUp) + bytesOf(down)),
    head: bytesOf(head),
  };
}

const bytesOf = (stored: StoredLinear): number =>
  stored.values.bytes + (stored.kind === 'f32' ? 0 : stored.scales.bytes + stored.zeroPoints.bytes);

/** `times`: how many times the mask's layers count. */
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
  const begun_ms = performance.now();
  await runner.runMany(inputs);
  return performance.now() - begun_ms;
}

async function decode_ms(
  runner: Runner,
  mask: Mask,
  batch: number,
  { steps, head }: { readonly steps: number; readonly head: Head },
): Promise<number> {
  const inputs = openSequences(runner, mask, batch, 4);
  await runner.runMany(inputs);
  const times: number[] = [];
  for (let step = 0; step < steps; step++) {
    const begun_ms = performance.now();
    await runner.runMany(
      inputs.map(({ cache, plan }) => ({
        ...{ cache, plan, tokenIds: [100 + step] },
        logitRows: head === 'with head' ? [0] : [],
      })),
    );
    times.push(performance.now() - begun_ms);
  }
  return median(times);
}

/** Of this process: its own, and with pages of mapped files, which the system takes back when it needs them; zeros where there is no /proc. */
function memory(): { own_bytes: number; now_bytes: number; peak_bytes: number } {
  const field = (name: string, status: string) =>
    1024 * Number(new RegExp(`^${name}:\\s+(\\d+) kB`, 'm').exec(status)?.[1] ?? 0);
  try {
    const status = readFileSync('/proc/self/status', 'utf8');
    return {
      own_bytes: field('RssAnon', status),
      now_bytes: field('VmRSS', status),
      peak_bytes: field('VmHWM', status),
    };
  } catch {
    return { own_bytes: 0, now_bytes: 0, peak_bytes: 0 };
  }
}
