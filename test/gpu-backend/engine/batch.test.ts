/** Many sequences at once: the batched graph against the graph of one sequence, and the loop under anything that may happen. */
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import {
  type EngineEvent,
  type GenerateRequest,
  type KvMode,
  type MaskPlan,
  PLAIN_SAMPLING,
  type PredictedTokens,
} from '../../../gpu-backend/engine/engine.ts';
import { EngineLoop, type LoopLimits } from '../../../gpu-backend/engine/engine-loop.ts';
import { type CacheShape, KvCache, type SequenceCache } from '../../../gpu-backend/engine/kv-cache.ts';
import { PAGE_TOKENS, PrefixCache } from '../../../gpu-backend/engine/prefix-cache.ts';
import { onHost, type RunInput } from '../../../gpu-backend/engine/run-input.ts';
import { openRunner } from '../../../gpu-backend/engine/runner.ts';
import type { Runner } from '../../../gpu-backend/engine/runner-interface.ts';
import { floats } from '../../../gpu-backend/onnx/session.ts';
import { seededRandom } from '../../../gpu-backend/random.ts';
import { denseMask, type Mask, maskFromSkippedLayers, withSurrogates } from '../../../shared/mask/mask.ts';
import { furthest } from '../../support/furthest.ts';
import { openGrammarPlayer } from '../../support/grammar-player.ts';
import { naiveLlama } from '../../support/naive-llama.ts';
import {
  asGemma,
  openEmitted,
  RANDOM_TABLE_ID,
  randomLlama,
  randomSurrogates,
  TINY_CONFIG,
} from '../../support/random-llama.ts';

const NEVER = new AbortController().signal;
const V = TINY_CONFIG.vocabularySize;
const tokensOf = (seed: number, count: number) => {
  const random = seededRandom(seed);
  return Array.from({ length: count }, () => Math.floor(random() * V));
};
const MASKS: readonly Mask[] = [
  denseMask(8),
  maskFromSkippedLayers(8, { skipAttention: [1, 2], skipFfn: [0, 2] }),
  maskFromSkippedLayers(8, { skipAttention: [0], skipFfn: [3] }),
  maskFromSkippedLayers(8, { skipAttention: [0, 1, 2, 3], skipFfn: [] }),
  { runs: new Uint8Array(8) },
];

describe.each([
  ['q8', 'f32', 16, 'Llama'],
  ['f32', 'f32', 16, 'Llama'],
  ['q8', 'f16', 16, 'Llama'],
  ['q8', 'f32', 12, 'Llama'],
  ['q8-columns', 'f32', 16, 'Llama'],
  ['q8', 'f32', 16, 'Gemma'],
  ['f32', 'f16', 16, 'Gemma'],
] as const)(
  'several sequences at once in %s, K and V in %s, heads of %i, a %s',
  (kind, kvType, headSize, family) => {
    // fp32 products are summed otherwise for one row than for several; quantized ones are not.
    const [most, mostOfFew] = kind === 'f32' ? [1e-4, 5e-5] : [0, 0];
    let runner: Runner & AsyncDisposable;
    beforeAll(async () => {
      const table = randomSurrogates(TINY_CONFIG, 32);
      const sizes = { headSize, headCount: 96 / headSize };
      const source = randomLlama(family === 'Gemma' ? asGemma(sizes) : sizes);
      runner = await openEmitted(source, kind, table, undefined, kvType);
    });
    afterAll(async () => runner[Symbol.asyncDispose]());

    const plans: MaskPlan[] = MASKS.flatMap((mask) => [
      { mask, kv: 'preserve' as KvMode },
      { mask, kv: 'elide' as KvMode },
      { mask: withSurrogates(mask, RANDOM_TABLE_ID), kv: 'preserve' as KvMode },
    ]);

    test('gives every sequence the bits that it has alone, whoever else is in the step', async () => {
      const random = seededRandom(5);
      for (let turn = 0; turn < 6; turn++) {
        const chosen = Array.from({ length: 2 + Math.floor(random() * 7) }, () => ({
          plan: plans[Math.floor(random() * plans.length)]!,
          alone: runner.newCache(),
          together: runner.newCache(),
        }));
        for (let step = 0; step < 4; step++) {
          const inputs = chosen.map(({ plan, together }, i): RunInput => {
            const count = random() < 0.5 && step > 0 ? 1 : 2 + Math.floor(random() * 30);
            const tokenIds = tokensOf(100 * turn + 10 * step + i, count);
            const all = random() < 0.3;
            const logitRows = all ? tokenIds.map((_, row) => row) : random() < 0.2 ? [] : [count - 1];
            return { cache: together, tokenIds, plan, logitRows };
          });
          const found = await runner.runMany(inputs);
          for (const [i, input] of inputs.entries()) {
            const expected = await runner.run({ ...input, cache: chosen[i]!.alone });
            expect(furthest(found[i]!, expected)).toBeLessThanOrEqual(most);
          }
        }
      }
    });

    test('tokens under one mask have the bits that they have alone, whoever takes part and whoever pauses between them', async () => {
      const random = seededRandom(6);
      // Each mask once, and each way to skip: in turns.
      for (const plan of plans.filter((_, i) => i % 3 === Math.floor(i / 3) % 3)) {
        const pairs = Array.from({ length: 8 }, (_, i) => ({
          tokenIds: tokensOf(i, 1 + Math.floor(random() * 12)),
          alone: runner.newCache(),
          together: runner.newCache(),
        }));
        for (const { tokenIds, alone, together } of pairs) {
          await runner.run({ cache: alone, tokenIds, plan, logitRows: [] });
          await runner.run({ cache: together, tokenIds, plan, logitRows: [] });
        }
        for (let step = 0; step < 5; step++) {
          const some = pairs.filter(() => step === 0 || random() < 0.6);
          if (some.length === 0) continue;
          const inputs = some.map(({ together }, i): RunInput => {
            return { cache: together, tokenIds: tokensOf(10 * step + i, 1), plan, logitRows: [0] };
          });
          const found = await runner.runMany(inputs);
          for (const [i, input] of inputs.entries()) {
            const expected = await runner.run({ ...input, cache: some[i]!.alone });
            expect(furthest(found[i]!, expected)).toBeLessThanOrEqual(most);
          }
        }
      }
    });

    test('a prompt that begins in a place between the tokens of others keeps its first token', async () => {
      const plan: MaskPlan = { mask: MASKS[0]!, kv: 'preserve' };
      const caches = Array.from({ length: 3 }, () => runner.newCache());
      const inputs = (tokens: (i: number) => number[]) =>
        caches.map((cache, i): RunInput => ({ cache, tokenIds: tokens(i), plan, logitRows: [0] }));
      await runner.runMany(inputs((i) => tokensOf(i, 5 + i)));
      await runner.runMany(inputs((i) => tokensOf(10 + i, 1)));
      caches[1]!.truncate(0);
      // It takes the place in the middle, whose former owner is gone.
      caches[1] = runner.newCache();
      const prompt = tokensOf(20, 9);
      await runner.runMany(inputs((i) => (i === 1 ? prompt.slice(0, 6) : tokensOf(30 + i, 1))));
      const [, found] = await runner.runMany(
        inputs((i) => (i === 1 ? prompt.slice(6) : tokensOf(40 + i, 1))),
      );
      const alone = runner.newCache();
      await runner.run({ cache: alone, tokenIds: prompt.slice(0, 6), plan, logitRows: [] });
      const expected = await runner.run({ cache: alone, tokenIds: prompt.slice(6), plan, logitRows: [0] });
      expect(furthest(found!, expected)).toBeLessThanOrEqual(mostOfFew);
    });

    test('writes K and V of skipped attention, so that a sequence may change its mask', async () => {
      const tokenIds = tokensOf(1, 20);
      const pair = [runner.newCache(), runner.newCache()] as const;
      const step = (plan: MaskPlan, ids: readonly number[]) =>
        pair.map((cache): RunInput => ({ cache, tokenIds: ids, plan, logitRows: [ids.length - 1] }));
      await runner.runMany(step({ mask: MASKS[3]!, kv: 'preserve' }, tokenIds));
      const [found] = await runner.runMany(step({ mask: MASKS[0]!, kv: 'preserve' }, [7, 8]));
      const alone = runner.newCache();
      await runner.run({ cache: alone, tokenIds, plan: { mask: MASKS[3]!, kv: 'preserve' }, logitRows: [] });
      const expected = await runner.run({
        cache: alone,
        tokenIds: [7, 8],
        logitRows: [1],
        plan: { mask: MASKS[0]!, kv: 'preserve' },
      });
      expect(furthest(found!, expected)).toBeLessThanOrEqual(mostOfFew);
    });

    test('takes more rows than the context has positions', async () => {
      const plan: MaskPlan = { mask: MASKS[0]!, kv: 'preserve' };
      const counts = [TINY_CONFIG.contextTokens - 10, 30, TINY_CONFIG.contextTokens];
      const inputs = () =>
        counts.map((count, i): RunInput => {
          const tokenIds = tokensOf(i, count);
          return { cache: runner.newCache(), tokenIds, plan, logitRows: [count - 1] };
        });
      const found = await runner.runMany(inputs());
      const alone: Float32Array[] = [];
      for (const input of inputs()) alone.push(await runner.run(input));
      found.forEach((logits, i) => {
        expect(furthest(logits, alone[i]!)).toBeLessThanOrEqual(mostOfFew);
      });
    });

    test('refuses more sequences than it has places, and other surrogates', async () => {
      const input = (mask: Mask): RunInput => ({
        cache: runner.newCache(),
        tokenIds: [1],
        logitRows: [0],
        plan: { mask, kv: 'preserve' },
      });
      const many = Array.from({ length: 9 }, () => input(MASKS[0]!));
      await expect(runner.runMany(many)).rejects.toThrow('9 sequences for 8 places');
      const other = withSurrogates(MASKS[1]!, `s_${'b'.repeat(24)}` as typeof RANDOM_TABLE_ID);
      await expect(runner.runMany([input(MASKS[0]!), input(other)])).rejects.toThrow('surrogates');
    });
  },
);

test('logits in memory that is used again are the same, in a step of several runs too', async () => {
  const source = randomLlama();
  await using fresh = await openEmitted(source, 'q8');
  const options = { threads: 1, batches: true, reuseLogits: true };
  const reusing = await openRunner(fresh.folder, source.config, options);
  const steps = (runner: Runner): RunInput[][] => {
    const caches = [0, 1, 2, 3, 4].map(() => runner.newCache());
    const input = (which: number, tokenIds: readonly number[], logitRows: readonly number[]): RunInput => ({
      cache: caches[which]!,
      tokenIds,
      logitRows,
      plan: { mask: MASKS[which % 2]!, kv: 'preserve' },
    });
    return [
      caches.map((_, which) => input(which, tokensOf(which, 9), [8])),
      caches.map((_, which) => input(which, [which], [0])),
      [
        input(0, [5], [0]),
        input(1, [6], [0]),
        input(
          2,
          tokensOf(9, 30),
          tokensOf(9, 30).map((_, row) => row),
        ),
      ],
    ];
  };
  const [own, expected] = [steps(reusing), steps(fresh)];
  const memory = new Set<unknown>();
  for (const [i, inputs] of own.entries()) {
    const found = await reusing.runMany(inputs);
    expect(found).toEqual(await fresh.runMany(expected[i]!));
    memory.add(found[0]!.buffer);
  }
  // All rows of a piece are too many to keep.
  expect(memory.size).toBe(2);
  await reusing.close();
});

test('with more threads than heads a long answer has the bits that it has in company', async () => {
  const source = randomLlama({ contextTokens: 4096 });
  await using fresh = await openEmitted(source, 'q8');
  const runner = await openRunner(fresh.folder, source.config, { threads: 8, batches: true });
  const plan: MaskPlan = { mask: MASKS[0]!, kv: 'preserve' };
  const [alone, together, other] = [runner.newCache(), runner.newCache(), runner.newCache()];
  const { layerCount, kvHeadCount, headSize } = source.config;
  const random = seededRandom(3);
  const past = Float32Array.from({ length: 2 * layerCount * kvHeadCount * headSize * 3500 }, random);
  for (const cache of [alone, together, other]) {
    cache.reserve(3500);
    cache.appendPage(past, 3500);
  }
  const next = (cache: SequenceCache): RunInput => ({ cache, tokenIds: [7], plan, logitRows: [0] });
  const [found] = await runner.runMany([next(together), next(other)]);
  expect(found).toEqual(await runner.run(next(alone)));
  await runner.close();
});

test.each([
  ['f32', 1e-4],
  // fp32 and fp64 fall on two sides of a half now and then.
  ['f16', 2e-3],
] as const)('the batched graph equals plain loops, K and V in %s', async (kvType, most) => {
  const source = randomLlama();
  await using runner = await openEmitted(source, 'f32', undefined, undefined, kvType);
  const inputs = MASKS.map((mask, i): RunInput => {
    const tokenIds = tokensOf(i, 10 + 3 * i);
    const plan = { mask, kv: 'preserve' as const };
    return { cache: runner.newCache(), tokenIds, plan, logitRows: tokenIds.map((_, row) => row) };
  });
  const found = await runner.runMany(inputs);
  for (const [i, { tokenIds, plan }] of inputs.entries()) {
    const naive = await naiveLlama(source, undefined, kvType === 'f16' ? Math.f16round : undefined);
    const expected = [...(tokenIds as number[])].flatMap((id) => [...naive.next(id, plan.mask)]);
    expect(furthest(found[i]!, expected)).toBeLessThan(most);
  }
});

/*
 * Histories: requests that come, wait, run beside each other, give their pages back, are cancelled.
 */

type Asked = {
  readonly tenant: string;
  readonly mask: number;
  readonly prompt: readonly number[];
  readonly maxTokens: number;
  /** Steps of the loop before it comes, and after which it leaves. */
  readonly comesAfter: number;
  readonly leavesAfter: number | undefined;
  readonly predicted?: readonly number[] | undefined;
};

const requestOf = (asked: Asked, index: number): GenerateRequest => ({
  requestId: `r${index}`,
  tenant: asked.tenant,
  promptTokenIds: Int32Array.from(asked.prompt),
  plan: { mask: MASKS[asked.mask]!, kv: 'preserve' },
  sampling: { ...PLAIN_SAMPLING, temperature: 0 },
  maxTokens: asked.maxTokens,
  minTokens: 0,
  stopTokenIds: [],
  logprobs: undefined,
  promptLogprobs: undefined,
  predictedTokenIds: asked.predicted && Int32Array.from(asked.predicted),
});

type Ended = {
  readonly tokenIds: number[];
  readonly how: string;
  readonly predicted?: PredictedTokens | undefined;
};

const TIMES = { fixed_ms: 1, row_ms: 1, key_ms: 0, pieceKey_ms: 0, rowKey_ms: 0 };

/** Plays a history to its end. @throws Error when a request ends twice or never. */
async function play(
  runner: Runner,
  limits: LoopLimits,
  history: readonly Asked[],
  requests = history.map(requestOf),
) {
  const ended = new Map<string, Ended>();
  const tokens = new Map<string, number[]>();
  const end = (id: string, how: string, predicted?: PredictedTokens) => {
    if (ended.has(id)) throw new Error(`${id} ended twice`);
    ended.set(id, { tokenIds: tokens.get(id) ?? [], how, predicted });
  };
  const loop = new EngineLoop(runner, limits, TIMES, {
    event(id, event: EngineEvent) {
      if (event.type === 'token') tokens.set(id, [...(tokens.get(id) ?? []), event.tokenId]);
      if (event.type === 'finished') end(id, event.reason, event.predicted);
    },
    failed: (id, error) => end(id, error.code),
  });
  let step = 0;
  const act = () => {
    history.forEach((asked, index) => {
      if (asked.comesAfter === step) loop.add(requests[index]!);
      const isThere = asked.comesAfter <= step && !ended.has(`r${index}`);
      if (isThere && asked.leavesAfter !== undefined && asked.comesAfter + asked.leavesAfter <= step)
        loop.cancel(`r${index}`);
    });
    step++;
    // An idle loop has no steps: whoever is to come then comes now.
    const { requestsRunning, requestsWaiting } = loop.stats();
    if (requestsRunning + requestsWaiting > 0) return;
    if (ended.size === history.length) loop.close();
    else act();
  };
  act();
  await loop.run(act);
  for (const index of history.keys()) if (!ended.has(`r${index}`)) throw new Error(`r${index} never ended`);
  return { ended, stats: loop.stats() };
}

/** What a test does not say itself. */
const LIMITS = {
  waitingMax: 20,
  queueTimeout_ms: 60_000,
  stepMax_ms: 40,
  chunkTokens: 64,
  prefixTokensMax: 0,
};

/**
 * A runner without a model: K of a token says what it is and under which mask, and the next token follows from all K
 * before it. So a page in a wrong place, or of another mask, gives another answer.
 */
const SHAPE: CacheShape = { layerCount: 1, width: 1, contextTokens: 512, kvType: 'f32' };
const WORDS = 97;
const scripted = scriptedRunner(WORDS, (logits, hash) => {
  logits[hash % WORDS] = 1;
});
/** `score` writes logits that follow from the hash of all keys. */
function scriptedRunner(words: number, score: (logits: Float32Array, hash: number) => void): Runner {
  const runMany: Runner['runMany'] = async (inputs) =>
    inputs.map(onHost).map(({ cache, tokenIds, plan, logitRows }) => {
      cache.reserve(tokenIds.length);
      const salt = plan.mask.runs.reduce((sum, bit, i) => sum + bit * 2 ** i, 0);
      const keys = Float32Array.from(tokenIds, (id) => id * 256 + salt);
      cache.write(0, keys, 0, keys.length);
      cache.write(1, keys, 0, keys.length);
      const seen = floats(cache.past(tokenIds.length)[1]!);
      const logits = new Float32Array(logitRows.length * words);
      logitRows.forEach((row, i) => {
        score(logits.subarray(i * words, (i + 1) * words), hashOf(seen.subarray(0, cache.length + row + 1)));
      });
      cache.advance(tokenIds.length);
      return logits;
    });
  return {
    config: { ...TINY_CONFIG, vocabularySize: words, contextTokens: 512 },
    surrogates: undefined,
    newCache: () => new KvCache(SHAPE),
    run: async (input) => (await runMany([input]))[0]!,
    runMany,
    close: async () => {},
  };
}
const hashed = (hash: number, key: number): number => (hash * 31 + key) % 1_000_003;
function hashOf(keys: ArrayLike<number>): number {
  let hash = 7;
  for (let i = 0; i < keys.length; i++) hash = hashed(hash, keys[i]!);
  return hash;
}
function expectedAnswer({ prompt, mask, maxTokens }: Asked): number[] {
  const salt = MASKS[mask]!.runs.reduce((sum, bit, i) => sum + bit * 2 ** i, 0);
  const answer: number[] = [];
  let hash = hashOf(prompt.map((id) => id * 256 + salt));
  while (answer.length < maxTokens) {
    answer.push(hash % WORDS);
    hash = hashed(hash, answer.at(-1)! * 256 + salt);
  }
  return answer;
}

/** Prompts begin as one of three, so that pages are shared. */
const anyUnpredicted: fc.Arbitrary<Asked> = fc.record({
  tenant: fc.constantFrom('a', 'b', 'c'),
  mask: fc.nat(2),
  prompt: fc
    .tuple(fc.nat(2), fc.integer({ min: 1, max: 70 }), fc.array(fc.nat(WORDS - 1), { maxLength: 30 }))
    .map(([begin, length, rest]) => [
      ...Array.from({ length }, (_, i) => (i * 13 + begin * 5) % WORDS),
      ...rest,
    ]),
  maxTokens: fc.oneof(fc.constant(0), fc.integer({ min: 1, max: 12 }), fc.integer({ min: 20, max: 60 })),
  comesAfter: fc.nat(30),
  leavesAfter: fc.option(fc.nat(25), { nil: undefined, freq: 4 }),
});
/** A prediction is the answer, with other tokens in some places, without its beginning, or as part of something longer. */
const anyAsked: fc.Arbitrary<Asked> = fc
  .tuple(anyUnpredicted, fc.option(fc.tuple(fc.nat(9), fc.nat(20), fc.nat(8)), { nil: undefined, freq: 2 }))
  .map(([asked, changes]) => {
    if (changes === undefined) return asked;
    const [every, skipped, before] = changes;
    const changed = expectedAnswer(asked).map((id, i) =>
      every > 0 && i % every === 0 ? (id + 1) % WORDS : id,
    );
    return {
      ...asked,
      predicted: [...tokensOf(before, before), ...changed.slice(skipped)].map((id) => id % WORDS),
    };
  });
const anyLimits: fc.Arbitrary<LoopLimits> = fc.record({
  runningMax: fc.integer({ min: 1, max: 8 }),
  waitingMax: fc.constant(6),
  queueTimeout_ms: fc.constant(60_000),
  stepMax_ms: fc.constantFrom(5, 40),
  chunkTokens: fc.integer({ min: 2, max: 64 }),
  // 160 tokens are the longest request: some must give their pages back.
  cacheTokensMax: fc.integer({ min: 160, max: 260 }),
  prefixTokensMax: fc.constantFrom(0, 3 * PAGE_TOKENS, 40 * PAGE_TOKENS),
  promptLookup: fc.boolean(),
});

const ENDS = ['length', 'cancelled', 'queue_full'];

test('whatever comes and goes, each request ends once, with the answer that it has alone, and pages are given back', async () => {
  let preemptions = 0;
  let hits = 0;
  const predicted = { accepted: 0, rejected: 0 };
  await fc.assert(
    fc.asyncProperty(
      fc.array(anyAsked, { minLength: 1, maxLength: 14 }),
      anyLimits,
      async (history, limits) => {
        const { ended, stats } = await play(scripted, limits, history);
        preemptions += stats.preemptionsTotal;
        hits += stats.prefixHitsTotal;
        history.forEach((asked, index) => {
          const { tokenIds, how, predicted: own } = ended.get(`r${index}`)!;
          predicted.accepted += own?.accepted ?? 0;
          predicted.rejected += own?.rejected ?? 0;
          const whole = expectedAnswer(asked);
          const expected = how === 'length' ? whole : whole.slice(0, tokenIds.length);
          // Plainer than `expect`, which takes most of the time where so much is checked.
          if (tokenIds.join() !== expected.join() || !ENDS.includes(how))
            throw new Error(`r${index} ended by ${how} with ${tokenIds}, expected ${expected}`);
        });
        expect(stats).toMatchObject({ requestsRunning: 0, requestsWaiting: 0, kvCacheUsage: 0 });
        expect(stats.pagesUsed).toBeLessThanOrEqual(limits.prefixTokensMax / PAGE_TOKENS);
      },
    ),
    { seed: 1611, numRuns: 2000 },
  );
  // The histories are worth their name.
  expect(preemptions).toBeGreaterThan(100);
  expect(hits).toBeGreaterThan(1000);
  expect(predicted.accepted).toBeGreaterThan(1000);
  expect(predicted.rejected).toBeGreaterThan(1000);
}, 180_000);

describe('an answer that is predicted', () => {
  const asked: Asked = {
    tenant: 'a',
    mask: 1,
    prompt: tokensOf(3, 20).map((id) => id % WORDS),
    maxTokens: 60,
    comesAfter: 0,
    leavesAfter: undefined,
  };
  const answer = expectedAnswer(asked);
  const limits: LoopLimits = { ...LIMITS, runningMax: 4, cacheTokensMax: 1024 };
  const stepsOf = async (predicted: readonly number[]) => {
    const { ended, stats } = await play(scripted, limits, [{ ...asked, predicted }]);
    expect(ended.get('r0')!.tokenIds).toEqual(answer);
    return { steps: stats.stepsTotal, ...ended.get('r0')!.predicted! };
  };

  test('takes a step for the prompt, and then one for each draft and the token behind it', async () => {
    // The first token comes with the prompt. Drafts of 4, 8, 15 and 15 tokens, and one of 12 before the last.
    expect(await stepsOf(answer)).toEqual({ steps: 6, by: 'client', accepted: 54, rejected: 0 });
    expect(await stepsOf([])).toEqual({ steps: 60, by: 'client', accepted: 0, rejected: 0 });
  });

  test('goes on behind a word that is wrong, behind words that are missing, and where it comes back to', async () => {
    const wrong = answer.map((id, i) => (i === 20 ? (id + 1) % WORDS : id));
    const missing = answer.filter((_, i) => i < 20 || i > 25);
    const turned = [...answer.slice(30), ...answer.slice(0, 30)];
    for (const predicted of [wrong, missing, turned]) {
      const { steps, accepted } = await stepsOf(predicted);
      expect(steps).toBeLessThan(20);
      expect(accepted).toBeGreaterThan(40);
    }
  });

  test('counts what was computed in vain, and computes little of a prediction that is wrong throughout', async () => {
    const wrong = answer.map((id) => (id + 1) % WORDS);
    const { steps, accepted, rejected } = await stepsOf(wrong);
    expect({ steps, accepted }).toEqual({ steps: 60, accepted: 0 });
    expect(rejected).toBeLessThan(30);
  });

  test('ends where it may have no more tokens, and at a stop id in a draft', async () => {
    const longer = [...answer, ...answer];
    const { ended } = await play(scripted, limits, [{ ...asked, maxTokens: 7, predicted: longer }]);
    expect(ended.get('r0')).toMatchObject({ how: 'length', tokenIds: answer.slice(0, 7) });
    const end = answer.findIndex((id, i) => i > 8 && answer.indexOf(id) === i);
    const request: GenerateRequest = {
      ...requestOf({ ...asked, predicted: answer }, 0),
      stopTokenIds: [answer[end]!],
    };
    const stopped = await play(scripted, limits, [asked], [request]);
    expect(stopped.ended.get('r0')).toMatchObject({ how: 'stop', tokenIds: answer.slice(0, end) });
  });

  test('leaves none of its predicted tokens in its cache if it is cancelled while they are computed', async () => {
    const kept: { tokens: number; computed: number }[] = [];
    const runner: Runner = {
      ...scripted,
      async runMany(inputs) {
        const logits = await scripted.runMany(inputs);
        if (inputs[0]!.cache.length > asked.prompt.length) loop.cancel('r0');
        return logits;
      },
      newPrefixes: (tokensMax) =>
        Object.assign(new PrefixCache(tokensMax), {
          keepLast: (
            _: unknown,
            { length: tokens }: ArrayLike<number>,
            { length: computed }: SequenceCache,
          ) => kept.push({ tokens, computed }),
        }),
    };
    const loop = new EngineLoop(runner, limits, TIMES, { event() {}, failed() {} });
    loop.add(requestOf({ ...asked, predicted: answer }, 0));
    loop.close();
    await loop.run(() => {});
    expect(kept).toEqual([{ tokens: 21, computed: 21 }]);
  });

  test('leaves as many pages for later prompts as the same answer does without a prediction, wherever it ends', async () => {
    const keeping: LoopLimits = { ...limits, prefixTokensMax: 40 * PAGE_TOKENS };
    const pagesOf = async (changes: Partial<GenerateRequest>): Promise<number> => {
      const { stats } = await play(scripted, keeping, [asked], [{ ...requestOf(asked, 0), ...changes }]);
      return stats.pagesUsed;
    };
    const lengths = answer.map((_, i) => ({ maxTokens: i + 1 }));
    const stops = answer.map((stop) => ({ stopTokenIds: [stop] }));
    for (const end of [...lengths, ...stops]) {
      const predicted = await pagesOf({ ...end, predictedTokenIds: Int32Array.from(answer) });
      expect(predicted, JSON.stringify(end)).toBe(await pagesOf(end));
    }
  });

  test.each(['f32', 'f16'] as const)(
    'is the same on a real graph, alone and beside others, sampled and greedy, K and V in %s',
    async (kvType) => {
      await using runner = await openEmitted(randomLlama(), 'f32', undefined, undefined, kvType);
      for (const sampling of [
        { ...PLAIN_SAMPLING, temperature: 0 },
        { ...PLAIN_SAMPLING, repetitionPenalty: 1.1, seed: 5 },
      ]) {
        const history = Array.from(
          { length: 4 },
          (_, i): Asked => ({ ...asked, mask: i, prompt: tokensOf(i, 8 + 9 * i) }),
        );
        const plain = history.map((one, i): GenerateRequest => ({ ...requestOf(one, i), sampling }));
        const { ended, stats } = await play(runner, limits, history, plain);
        const known = plain.map(({ requestId }) => ended.get(requestId)!.tokenIds);
        const predicted = plain.map((request, i): GenerateRequest => {
          const ids = known[i]!.map((id, at) => (at % 7 === 6 ? id + 1 : id));
          return { ...request, predictedTokenIds: Int32Array.from(ids) };
        });
        const found = await play(runner, limits, history, predicted);
        expect(found.stats.stepsTotal).toBeLessThan(stats.stepsTotal);
        predicted.forEach(({ requestId }, i) => {
          expect(found.ended.get(requestId)!.tokenIds).toEqual(known[i]);
          expect(found.ended.get(requestId)!.predicted!.accepted).toBeGreaterThan(0);
        });
      }
    },
  );
});

describe('with prompt lookup', () => {
  const limits: LoopLimits = { ...LIMITS, runningMax: 4, cacheTokensMax: 1024, promptLookup: true };
  /** Each token is followed by the next higher one, up to `period`. */
  const counting = (period: number): Runner => ({
    ...scripted,
    async runMany(inputs) {
      await scripted.runMany(inputs);
      return inputs.map(({ tokenIds, logitRows }) => {
        const logits = new Float32Array(logitRows.length * WORDS);
        for (const [i, row] of logitRows.entries()) logits[i * WORDS + ((tokenIds[row]! + 1) % period)] = 1;
        return logits;
      });
    },
  });
  const asked = (prompt: readonly number[]): Asked => {
    const common = { tenant: 'a', mask: 0, maxTokens: 60, comesAfter: 0, leavesAfter: undefined };
    return { ...common, prompt };
  };
  const play1 = async (
    period: number,
    prompt: readonly number[],
    lookup: boolean,
    more: Partial<Asked> = {},
  ) => {
    const history = [{ ...asked(prompt), ...more }];
    const found = await play(counting(period), { ...limits, promptLookup: lookup }, history);
    return { steps: found.stats.stepsTotal, ...found.ended.get('r0')! };
  };
  const upTo = (count: number) => Array.from({ length: count }, (_, i) => i);

  test('an answer that repeats its prompt, or itself, takes fewer steps to the same tokens', async () => {
    // The prompt has the answer already; or the answer repeats itself after ten tokens.
    for (const [period, prompt] of [
      [80, [...upTo(80), ...upTo(10)]],
      [10, [0, 1, 2]],
    ] as const) {
      const plain = await play1(period, prompt, false);
      const { steps, tokenIds, predicted } = await play1(period, prompt, true);
      expect(tokenIds).toEqual(plain.tokenIds);
      expect(plain.steps).toBeGreaterThanOrEqual(60);
      expect(plain.predicted).toBeUndefined();
      expect(steps).toBeLessThan(20);
      expect(predicted).toMatchObject({ by: 'prompt', rejected: 0 });
      expect(predicted!.accepted).toBeGreaterThan(40);
    }
  });

  test('nothing is predicted from fewer than three tokens that the prompt has, too', async () => {
    const { steps, predicted } = await play1(80, [5, 6, 9, 1, 4, 5], true, { maxTokens: 2 });
    expect({ steps, ...predicted }).toEqual({ steps: 2, by: 'prompt', accepted: 0, rejected: 0 });
  });

  test("a client's own prediction counts, and the prompt is left alone", async () => {
    const prompt = [...upTo(80), ...upTo(10)];
    const { steps, predicted } = await play1(80, prompt, true, { predicted: [90, 91] });
    expect(steps).toBeGreaterThanOrEqual(60);
    expect(predicted!.by).toBe('client');
  });
});

test.each(['f32', 'f16'] as const)(
  'on a real graph an answer is the same alone and in company, cut anywhere, and after its pages were given back, K and V in %s',
  async (kvType) => {
    await using runner = await openEmitted(randomLlama(), 'q8', undefined, undefined, kvType);
    const limits: LoopLimits = { ...LIMITS, runningMax: 8, cacheTokensMax: 512 };
    const history = Array.from({ length: 10 }, (_, i): Asked => {
      const common = { tenant: 'abc'[i % 3]!, mask: i % MASKS.length, leavesAfter: undefined };
      return { ...common, prompt: tokensOf(i, 8 + 9 * i), maxTokens: 40, comesAfter: 2 * i };
    });
    const alone = await Promise.all(
      history.map(
        async (asked) =>
          (await play(runner, limits, [{ ...asked, comesAfter: 0 }])).ended.get('r0')!.tokenIds,
      ),
    );
    for (const changes of [{ chunkTokens: 64 }, { chunkTokens: 3 }, { cacheTokensMax: 160 }]) {
      const { ended, stats } = await play(runner, { ...limits, ...changes }, history);
      history.forEach((_, index) => {
        expect(ended.get(`r${index}`)!.tokenIds).toEqual(alone[index]);
      });
      if ('cacheTokensMax' in changes) expect(stats.preemptionsTotal).toBeGreaterThan(0);
    }
  },
);

test.each(['f32', 'f16'] as const)(
  'a prompt that begins as another one has the answer that it has alone, K and V in %s',
  async (kvType) => {
    await using runner = await openEmitted(randomLlama(), 'q8', undefined, undefined, kvType);
    const limits: LoopLimits = {
      ...LIMITS,
      runningMax: 4,
      cacheTokensMax: 2048,
      prefixTokensMax: 40 * PAGE_TOKENS,
    };
    const common = { tenant: 'a', mask: 1, maxTokens: 20, leavesAfter: undefined };
    const history = [0, 1, 2].map((i): Asked => {
      const prompt = [...tokensOf(1, 5 * PAGE_TOKENS), ...tokensOf(2 + i, 10 + i)];
      return { ...common, prompt, comesAfter: 40 * i };
    });
    const { ended, stats } = await play(runner, limits, history);
    expect(stats.prefixHitsTotal).toBe(2 * 5 * PAGE_TOKENS);
    for (const [index, asked] of history.entries()) {
      const alone = await play(runner, { ...limits, prefixTokensMax: 0 }, [{ ...asked, comesAfter: 0 }]);
      expect(ended.get(`r${index}`)).toEqual(alone.ended.get('r0'));
    }
  },
);

test('an answer of a form ends where all that may follow are stop ids, though it is not whole', async () => {
  await using player = await openGrammarPlayer();
  const runner = scriptedRunner(player.vocabularySize, (logits) => logits.fill(0));
  const call = { tenant: 'a', signal: NEVER, param: 'schema' };
  const prepared = await player.grammars.prepare({ answer: 'root ::= "7" "8"', calls: undefined }, call);
  const open = await player.grammars.open(prepared, call);
  const limits: LoopLimits = { ...LIMITS, runningMax: 1, cacheTokensMax: 160 };
  const asked: Asked = {
    tenant: 'a',
    mask: 0,
    comesAfter: 0,
    leavesAfter: undefined,
    prompt: tokensOf(0, 5),
    maxTokens: 60,
  };
  const [seven, eight] = ['7', '8'].map((digit) => player.text.tokenizer.tokenId(digit)!);
  const request: GenerateRequest = {
    ...requestOf(asked, 0),
    grammar: open.session,
    minTokens: 9,
    stopTokenIds: [player.endTokenId, eight!],
  };
  const { ended } = await play(runner, limits, [asked], [request]);
  open.close();
  expect(ended.get('r0')).toMatchObject({ how: 'stop', tokenIds: [seven] });
});

test('an answer of a form goes on in its form after its pages were given back, as it would have alone', async () => {
  await using player = await openGrammarPlayer();
  const runner = scriptedRunner(player.vocabularySize, (logits, hash) => {
    const random = seededRandom(hash);
    for (let id = 0; id < logits.length; id++) logits[id] = random();
  });
  const call = { tenant: 'a', signal: NEVER, param: 'schema' };
  // Ten numbers, so that nobody is done before there is no room for all.
  const list = `root ::= "[" number ${'"," number '.repeat(9)}"]"\nnumber ::= [0-9] [0-9]? [0-9]? [0-9]?`;
  const prepared = await player.grammars.prepare({ answer: list, calls: undefined }, call);
  const limits: LoopLimits = { ...LIMITS, runningMax: 4, cacheTokensMax: 160 };
  const history = Array.from({ length: 4 }, (_, i): Asked => {
    const common = { tenant: 'abcd'[i]!, mask: 0, comesAfter: i, leavesAfter: undefined };
    return { ...common, prompt: tokensOf(i, 20 + i), maxTokens: 60 };
  });
  const played = async (
    limits: LoopLimits,
    asked: readonly Asked[],
    predicted: readonly (readonly number[])[] = [],
  ) => {
    const opened = await Promise.all(asked.map(() => player.grammars.open(prepared, call)));
    const requests = asked.map(
      (one, i): GenerateRequest => ({
        ...requestOf(one, i),
        grammar: opened[i]!.session,
        stopTokenIds: [player.endTokenId],
        predictedTokenIds: predicted[i] && Int32Array.from(predicted[i]!),
      }),
    );
    const found = await play(runner, limits, asked, requests);
    for (const { close } of opened) close();
    return found;
  };
  const { ended, stats } = await played(limits, history);
  expect(stats.preemptionsTotal).toBeGreaterThan(0);
  const answers = history.map((_, index) => ended.get(`r${index}`)!.tokenIds);
  const predicted = answers.map((ids) => ids.map((id, at) => (at % 9 === 8 ? id + 1 : id)));
  const sooner = await played(limits, history, predicted);
  for (const [index, asked] of history.entries()) {
    const alone = (await played(limits, [{ ...asked, comesAfter: 0 }])).ended.get('r0')!;
    expect(ended.get(`r${index}`)).toEqual(alone);
    const { how, tokenIds, predicted: drafts } = sooner.ended.get(`r${index}`)!;
    expect({ how, tokenIds }).toMatchObject({ how: alone.how, tokenIds: alone.tokenIds });
    expect(drafts!.accepted).toBeGreaterThan(0);
    const text = player.text.tokenizer.decode(alone.tokenIds);
    expect(text).toMatch(alone.how === 'stop' ? /^\[\d{1,4}(,\d{1,4}){9}\]$/ : /^\[[\d,]+\]?$/);
  }
}, 60_000);

test('a sequence that makes the engine fail takes no other along', async () => {
  const poisoned = 66;
  const runner: Runner = {
    ...scripted,
    async runMany(inputs) {
      if (inputs.some(({ tokenIds }) => Array.from(tokenIds).includes(poisoned))) throw new Error('it fails');
      return scripted.runMany(inputs);
    },
  };
  const limits: LoopLimits = { ...LIMITS, runningMax: 4, cacheTokensMax: 1024 };
  const asked = { tenant: 'a', mask: 0, maxTokens: 3, comesAfter: 0, leavesAfter: undefined };
  const history = [
    [1, 2, 3],
    [4, poisoned],
    [5, 6],
  ].map((prompt): Asked => ({ ...asked, prompt }));
  const { ended } = await play(runner, limits, history);
  expect([0, 1, 2].map((index) => ended.get(`r${index}`)!.how)).toEqual([
    'length',
    'engine_failed',
    'length',
  ]);
  expect(ended.get('r0')!.tokenIds).toEqual(expectedAnswer(history[0]!));
});
