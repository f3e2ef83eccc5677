/** The runner on a GPU (lavapipe here) against the runner on the processor. */
import { copyFile, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test, vi } from 'vitest';
import { quarterMask, somePrompt } from '../../../gpu-backend/bench/decode.ts';
import type { MaskPlan } from '../../../gpu-backend/engine/engine.ts';
import type { RunInput } from '../../../gpu-backend/engine/run-input.ts';
import { openRunner, type Runner } from '../../../gpu-backend/engine/runner.ts';
import { createEngine } from '../../../gpu-backend/engine/start-engine.ts';
import { batchedLlamaGraph } from '../../../gpu-backend/model/architectures/batched-llama.ts';
import { llamaGraph } from '../../../gpu-backend/model/architectures/llama.ts';
import { withExactProducts } from '../../../gpu-backend/model/architectures/projections.ts';
import { BATCHED_MODEL_FILE, MODEL_FILE } from '../../../gpu-backend/model/emit.ts';
import { configFromHuggingFace } from '../../../gpu-backend/model/formats/hf-folder.ts';
import { readStoredLlama } from '../../../gpu-backend/model/stored-llama.ts';
import { encodeModel } from '../../../gpu-backend/onnx/encode.ts';
import type { Graph } from '../../../gpu-backend/onnx/graph.ts';
import type { Session } from '../../../gpu-backend/onnx/session.ts';
import { createRandom } from '../../../gpu-backend/random.ts';
import {
  denseMask,
  type Mask,
  type ModelHash,
  maskFromSkippedLayers,
  type SurrogatesId,
  withSurrogates,
} from '../../../shared/mask/mask.ts';
import { installedModel } from '../../support/installed-model.ts';
import { testDevice } from '../../support/lavapipe.ts';
import {
  openEmitted,
  RANDOM_TABLE_ID,
  randomLlama,
  randomSurrogates,
  TINY_CONFIG,
} from '../../support/random-llama.ts';
import { PLAIN_SAMPLING } from '../../support/sampling.ts';
import families from '../model/architectures/fixtures/families.json' with { type: 'json' };

/** What a run of any session takes from the host and brings back, and what stays on the device. */
type Crossing = {
  readonly host: readonly { readonly name: string; readonly bytes: number }[];
  readonly device: readonly string[];
};
const crossings = vi.hoisted((): Crossing[] => []);
vi.mock(import('../../../gpu-backend/onnx/session.ts'), async (original) => {
  const real = await original();
  const counted = (session: Session): Session => ({
    ...session,
    async run(feeds, fetches) {
      const outputs = await session.run(feeds, fetches);
      const all = [...Object.entries(feeds), ...Object.entries(outputs)];
      crossings.push({
        host: all.flatMap(([name, value]) =>
          real.isOnDevice(value) ? [] : [{ name, bytes: (value.data as Uint8Array).byteLength }],
        ),
        device: all.flatMap(([name, value]) => (real.isOnDevice(value) ? [name] : [])),
      });
      return outputs;
    },
  });
  return {
    ...real,
    createSession: async (...asked) => counted(await real.createSession(...asked)),
    createSessionIn: async (...asked) => counted(await real.createSessionIn(...asked)),
  };
});

const device = testDevice();
const V = TINY_CONFIG.vocabularySize;
const DENSE = denseMask(8);
const SOME = maskFromSkippedLayers(8, { skipAttention: [1, 2], skipFfn: [0, 2] });
const OTHERS = maskFromSkippedLayers(8, { skipAttention: [0, 3], skipFfn: [1, 2] });
const NOTHING: Mask = { runs: new Uint8Array(8) };
const DIFFERENCE_MAX = 5e-3;

const tokensOf = (seed: number, count: number): number[] => {
  const random = createRandom(seed);
  return Array.from({ length: count }, () => random.below(V));
};
const planOf = (mask: Mask): MaskPlan => ({ mask, kv: 'preserve' });
const furthest = (a: Float32Array, b: Float32Array): number =>
  a.reduce((most, value, i) => Math.max(most, Math.abs(value - b[i]!)), a.length === b.length ? 0 : Infinity);

/**
 * The processor rounds a product's inputs to 8 bits where weights have 8 or 4, the device does not: both are held to the same
 * arithmetic here. The folder's own graphs are replaced.
 */
async function exactOnProcessor(runner: Runner & { readonly folder: string }): Promise<Runner> {
  const { folder, config, surrogates } = runner;
  const stored = await readStoredLlama(folder, config, 'with surrogates');
  const write = (file: string, graph: Graph) =>
    writeFile(join(folder, file), encodeModel(withExactProducts(graph)));
  await write(MODEL_FILE, llamaGraph(config, stored));
  await write(BATCHED_MODEL_FILE, batchedLlamaGraph(config, stored));
  return openRunner(folder, config, { threads: 1, surrogates, batches: true });
}

describe.each(['f32', 'q8', 'q4'] as const)('weights in %s', (kind) => {
  let onDevice: Runner & AsyncDisposable & { readonly folder: string };
  let onProcessor: Runner;
  beforeAll(async () => {
    onDevice = await openEmitted(randomLlama(), kind, randomSurrogates(TINY_CONFIG, 32), device);
    onProcessor = await exactOnProcessor(onDevice);
  });
  afterAll(async () => {
    await onProcessor.close();
    await onDevice[Symbol.asyncDispose]();
  });

  /** The same step on both; the greatest difference of a logit. */
  async function step(
    inputs: readonly (Omit<RunInput, 'cache'> & {
      readonly caches: readonly [RunInput['cache'], RunInput['cache']];
    })[],
  ): Promise<number> {
    const on = (which: 0 | 1) => inputs.map(({ caches, ...input }) => ({ ...input, cache: caches[which] }));
    const found = await onDevice.runMany(on(0));
    const expected = await onProcessor.runMany(on(1));
    return Math.max(...found.map((logits, i) => furthest(logits, expected[i]!)));
  }
  const twoCaches = () => [onDevice.newCache(), onProcessor.newCache()] as const;

  test.each([
    ['dense', DENSE],
    ['masked', SOME],
    ['masked with surrogates', withSurrogates(SOME, RANDOM_TABLE_ID)],
    ['with no block at all', NOTHING],
  ])('one sequence %s: a prompt and 20 tokens, over a place of 256', async (_, mask) => {
    const caches = twoCaches();
    const plan = planOf(mask);
    const prompt = tokensOf(1, 245);
    const rows = prompt.map((_, row) => row);
    expect(await step([{ caches, tokenIds: prompt, plan, logitRows: rows }])).toBeLessThan(DIFFERENCE_MAX);
    let most = 0;
    for (const tokenId of tokensOf(2, 20))
      most = Math.max(most, await step([{ caches, tokenIds: [tokenId], plan, logitRows: [0] }]));
    expect(most).toBeLessThan(DIFFERENCE_MAX);
    caches[0].truncate(0);
  });

  test('four sequences of their own lengths and masks: prompts come in the middle, and a mask changes', async () => {
    const plans = [DENSE, SOME, withSurrogates(OTHERS, RANDOM_TABLE_ID), NOTHING].map(planOf);
    const sequences = plans.map((plan) => ({ plan, caches: twoCaches() }));
    let most = 0;
    for (let turn = 0; turn < 32; turn++) {
      // One begins after the other, the third has more of its prompt later, and the second runs dense in the end.
      const present = sequences.slice(0, 1 + Math.floor(turn / 4));
      const inputs = present.map(({ plan, caches }, i) => {
        const isPiece = caches[0].length === 0 || (turn === 16 && i === 2);
        const tokenIds = tokensOf(100 * turn + i, isPiece ? 20 + 60 * i : 1);
        return {
          caches,
          tokenIds,
          plan: turn > 22 && i === 1 ? plans[0]! : plan,
          logitRows: [tokenIds.length - 1],
        };
      });
      most = Math.max(most, await step(inputs));
    }
    expect(most).toBeLessThan(DIFFERENCE_MAX);
    for (const { caches } of sequences) caches[0].truncate(0);
  });
});

test('skipped attention writes K and V, so that a sequence may change its mask', async () => {
  await using runner = await openEmitted(randomLlama(), 'f32', undefined, device);
  const after = async (mask: Mask) => {
    const cache = runner.newCache();
    await runner.run({ cache, tokenIds: tokensOf(1, 20), plan: planOf(mask), logitRows: [] });
    return runner.run({ cache, tokenIds: [7], plan: planOf(DENSE), logitRows: [0] });
  };
  await using processor = await openEmitted(randomLlama(), 'f32');
  const cache = processor.newCache();
  await processor.run({ cache, tokenIds: tokensOf(1, 20), plan: planOf(NOTHING), logitRows: [] });
  const expected = await processor.run({ cache, tokenIds: [7], plan: planOf(DENSE), logitRows: [0] });
  expect(furthest(await after(NOTHING), expected)).toBeLessThan(1e-4);
  expect(furthest(await after(DENSE), expected)).toBeGreaterThan(0.1);
});

test('K and V in half precision are refused, with what to take instead', async () => {
  await using emitted = await openEmitted(randomLlama({ layerCount: 1 }), 'f32');
  const options = { threads: 1, device, kvType: 'f16' } as const;
  const { folder, config } = emitted;
  await expect(openRunner(folder, config, options)).rejects.toThrow(/--device cpu, or --kv-type f32/);
});

describe('what crosses the bus', () => {
  test('decoding feeds and fetches no K or V from the host, and as many bytes after 300 tokens as after 20', async () => {
    await using runner = await openEmitted(randomLlama(), 'f32', undefined, device);
    const caches = [0, 1].map(() => runner.newCache());
    const inputs = (tokens: number) =>
      caches.map((cache, i): RunInput => {
        const tokenIds = tokensOf(i, tokens);
        return { cache, tokenIds, plan: planOf([DENSE, SOME][i]!), logitRows: [tokens - 1] };
      });
    const bytesOfStep = async () => {
      crossings.splice(0);
      await runner.runMany(inputs(1));
      return crossings.map(({ host }) => host.reduce((sum, { bytes }) => sum + bytes, 0));
    };
    await runner.runMany(inputs(20));
    await runner.runMany(inputs(1));
    const soon = await bytesOfStep();
    const [{ host, device: stays }] = crossings as [Crossing];
    expect(host.map(({ name }) => name).filter((name) => /^(past|present)_/.test(name))).toEqual([]);
    // K and V of each layer, fed and fetched.
    expect(stays.toSorted()).toEqual(
      ['past', 'present']
        .flatMap((which) => ['k', 'v'].flatMap((of) => [0, 1, 2, 3].map((i) => `${which}_${of}_${i}`)))
        .toSorted(),
    );
    // Two rows of logits, and some numbers for each row and block.
    expect(soon[0]).toBeLessThan(2 * 4 * V + 1000);
    await runner.runMany(inputs(240));
    expect(await bytesOfStep()).toEqual(soon);
    expect(soon).toHaveLength(1);
    for (const cache of caches) cache.truncate(0);
  });

  test('inside a run nothing of K and V is copied to the host either: attention and its caches have one device', async () => {
    await using emitted = await openEmitted(randomLlama(), 'q8');
    const { folder, config } = emitted;
    const profileFile = join(folder, 'profile');
    const runner = await openRunner(folder, config, { threads: 1, device, profileFile });
    const cache = runner.newCache();
    for (let i = 0; i < 3; i++)
      await runner.run({ cache, tokenIds: [i + 1], plan: planOf(i === 2 ? NOTHING : DENSE), logitRows: [0] });
    await runner.close();
    const file = (await readdir(folder)).find((name) => name.startsWith('profile'))!;
    type Event = {
      name: string;
      args?: { op_name?: string; provider?: string; input_type_shape?: object[] };
    };
    const events: Event[] = JSON.parse(await readFile(join(folder, file), 'utf8'));
    const providerOf = (op: string) =>
      new Set(events.flatMap(({ args }) => (args?.op_name === op ? (args.provider ?? []) : [])));
    for (const op of ['GroupQueryAttention', 'ScatterElements', 'MatMulNBits', 'RotaryEmbedding'])
      expect(providerOf(op), op).toEqual(new Set(['WebGpuExecutionProvider']));
    const copied = events
      .filter(({ args }) => args?.op_name?.startsWith('Memcpy'))
      .map(({ args }) => JSON.stringify(args?.input_type_shape));
    // K and V alone have four dimensions and a capacity of 256 tokens.
    for (const shape of copied) expect(shape).not.toContain('256');
    await rm(join(folder, file));
  });
});

test('the real model, dense and with a quarter of its blocks out', async () => {
  const { folder: installed, manifest } = await installedModel();
  const folder = await mkdtemp(join(tmpdir(), 'maskroute-webgpu-'));
  await using cleaning = new AsyncDisposableStack();
  cleaning.defer(() => rm(folder, { recursive: true }));
  for (const name of Object.keys(manifest.files)) await copyFile(join(installed, name), join(folder, name));
  const surrogates = manifest.surrogates?.id as SurrogatesId | undefined;
  const { config } = manifest;
  const onDevice = await openRunner(folder, config, { threads: 1, surrogates, device, batches: true });
  cleaning.defer(() => onDevice.close());
  const onProcessor = await exactOnProcessor({ ...onDevice, folder });
  cleaning.defer(() => onProcessor.close());
  const masks = [denseMask(2 * config.layerCount), quarterMask(config.layerCount)];
  const caches = masks.map(() => [onDevice.newCache(), onProcessor.newCache()] as const);
  for (const tokens of [12, 1, 1]) {
    const inputs = (which: 0 | 1) =>
      masks.map((mask, i): RunInput => {
        const tokenIds = somePrompt(tokens, config.vocabularySize, tokens + caches[i]![which].length);
        return { cache: caches[i]![which], tokenIds, plan: planOf(mask), logitRows: [tokens - 1] };
      });
    const [found, expected] = [await onDevice.runMany(inputs(0)), await onProcessor.runMany(inputs(1))];
    for (const [i, logits] of found.entries())
      expect(furthest(logits, expected[i]!)).toBeLessThan(DIFFERENCE_MAX);
  }
}, 120_000);

describe.each(families.variants)('$name', (variant) => {
  test('gives the logits of the processor, dense and masked, in one piece and token by token', async () => {
    const source = randomLlama(configFromHuggingFace(variant.config));
    await using onDevice = await openEmitted(source, 'f32', undefined, device);
    await using onProcessor = await openEmitted(source, 'f32');
    const { tokens, skipped } = families;
    const masked = { runs: Uint8Array.from({ length: 8 }, (_, block) => (skipped.includes(block) ? 0 : 1)) };
    for (const mask of [DENSE, masked]) {
      const caches = [onDevice.newCache(), onProcessor.newCache()] as const;
      const both = (tokenIds: readonly number[]) =>
        Promise.all(
          [onDevice, onProcessor].map((runner, which) => {
            const logitRows = tokenIds.map((_, row) => row);
            return runner.run({ cache: caches[which]!, tokenIds, plan: planOf(mask), logitRows });
          }),
        );
      for (const tokenIds of [tokens, [5], [6], tokens.slice(0, 20), [7]]) {
        const [found, expected] = await both(tokenIds);
        expect(furthest(found!, expected!)).toBeLessThan(1e-3);
      }
      caches[0].truncate(0);
    }
  });
});

test('a runner gives places back: sequences that come and go leave the device as it was', async () => {
  await using runner = await openEmitted(randomLlama({ layerCount: 1 }), 'f32', undefined, device);
  const answers: Float32Array[] = [];
  const prompt = tokensOf(3, 12);
  for (let turn = 0; turn < 30; turn++) {
    const caches = Array.from({ length: 1 + (turn % 5) }, () => runner.newCache());
    const inputs = caches.map((cache): RunInput => {
      const plan = planOf({ runs: Uint8Array.of(1, 1) });
      return { cache, tokenIds: prompt, plan, logitRows: [prompt.length - 1] };
    });
    answers.push(...(await runner.runMany(inputs)));
    for (const cache of caches) cache.truncate(0);
    expect(caches[0]!.capacity_tokens).toBe(0);
  }
  for (const answer of answers) expect(furthest(answer, answers[0]!)).toBeLessThan(1e-5);
});

test('the engine on a device answers many requests at once as the processor does', async () => {
  await using emitted = await openEmitted(randomLlama(), 'f32');
  const answersOn = async (where: typeof device | undefined) => {
    const engine = await createEngine({
      ...{ modelDir: emitted.folder, hash: `m_${'a'.repeat(24)}` as ModelHash },
      ...{ config: emitted.config, threads: 1, device: where },
    });
    expect(engine.model.device.kind).toBe(where?.kind ?? 'cpu');
    const answers = await Promise.all(
      [DENSE, SOME, OTHERS, DENSE].map(async (mask, i) => {
        const request = {
          ...{ requestId: `r${i}`, tenant: '', promptTokenIds: Int32Array.from(tokensOf(i, 10 + 30 * i)) },
          ...{ plan: planOf(mask), sampling: PLAIN_SAMPLING, maxTokens: 12, minTokens: 0, stopTokenIds: [] },
          ...{ logprobs: undefined, promptLogprobs: undefined },
        };
        const tokens: number[] = [];
        for await (const event of engine.generate(request, new AbortController().signal))
          if (event.type === 'token') tokens.push(event.tokenId);
        return tokens;
      }),
    );
    await engine.close();
    return answers;
  };
  const found = await answersOn(device);
  expect(found.map(({ length }) => length)).toEqual([12, 12, 12, 12]);
  expect(found).toEqual(await answersOn(undefined));
});
