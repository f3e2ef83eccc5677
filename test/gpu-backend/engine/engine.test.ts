/** The engine in its thread, on a small model: what the API relies on. */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import {
  type Engine,
  type EngineEvent,
  type GenerateRequest,
  PLAIN_SAMPLING,
  type Sampling,
} from '../../../gpu-backend/engine/engine.ts';
import type { LoopLimits } from '../../../gpu-backend/engine/engine-loop.ts';
import { createEngine } from '../../../gpu-backend/engine/start-engine.ts';
import {
  denseMask,
  type ModelHash,
  maskFromSkippedLayers,
  type SurrogatesId,
  withSurrogates,
} from '../../../shared/mask/mask.ts';
import { emitFromMemory, randomLlama } from '../../support/random-llama.ts';

/** Room for answers that do not end by themselves while a test looks on. */
const CONTEXT_TOKENS = 8192;
const ENDLESS = { maxTokens: 8000 };
const source = randomLlama({ contextTokens: CONTEXT_TOKENS });
const OTHER_TABLE = `s_${'0'.repeat(24)}` as SurrogatesId;
const NEVER = new AbortController().signal;
let modelDir: string;
beforeAll(async () => {
  modelDir = await mkdtemp(join(tmpdir(), 'maskroute-engine-'));
  await emitFromMemory(source, 'q8', modelDir, () => {});
});
afterAll(() => rm(modelDir, { recursive: true }));

async function open(
  limits: Partial<LoopLimits> = {},
  model = { modelDir, config: source.config },
): Promise<Engine & AsyncDisposable> {
  const hash = '0'.repeat(64) as ModelHash;
  const engine = await createEngine({ ...model, hash, threads: 1, limits });
  return Object.assign(engine, { [Symbol.asyncDispose]: () => engine.close() });
}

let count = 0;
const request = (changes: Partial<GenerateRequest> = {}): GenerateRequest => ({
  requestId: `request-${count++}`,
  tenant: 'acme',
  promptTokenIds: Int32Array.from({ length: 40 }, (_, i) => (i * 37) % 320),
  plan: { mask: denseMask(8), kv: 'preserve' },
  sampling: { ...PLAIN_SAMPLING, seed: 11 },
  maxTokens: 20,
  minTokens: 0,
  stopTokenIds: [],
  logprobs: undefined,
  promptLogprobs: undefined,
  ...changes,
});

async function collect(engine: Engine, wanted: GenerateRequest, signal = NEVER) {
  const events: EngineEvent[] = [];
  for await (const event of engine.generate(wanted, signal)) events.push(event);
  const finished = events.at(-1);
  if (finished?.type !== 'finished') throw new Error('the stream must end with finished');
  const tokens = events.flatMap((event) => (event.type === 'token' ? [event] : []));
  return { events, finished, tokens, tokenIds: tokens.map(({ tokenId }) => tokenId) };
}

test('the same seed gives the same tokens, alone or beside others under other masks', async () => {
  await using engine = await open({ chunkTokens: 16 });
  const alone = await collect(engine, request());
  expect(alone.tokenIds).toHaveLength(20);
  expect(alone.finished).toMatchObject({ reason: 'length', promptTokens: 40, completionTokens: 20 });
  const masked = {
    mask: maskFromSkippedLayers(8, { skipAttention: [1], skipFfn: [2] }),
    kv: 'preserve',
  } as const;
  const together = await Promise.all([
    collect(engine, request({ plan: masked, promptTokenIds: Int32Array.from({ length: 90 }, (_, i) => i) })),
    collect(engine, request()),
    collect(engine, request({ plan: { ...masked, kv: 'elide' } })),
  ]);
  expect(together[1]!.tokenIds).toEqual(alone.tokenIds);
  expect(together[2]!.tokenIds).not.toEqual(alone.tokenIds);
});

describe('prompts that begin as one that was computed', () => {
  const tokens = (length: number, from = 0) => Int32Array.from({ length }, (_, i) => ((from + i) * 37) % 320);
  const masked = (kv: 'preserve' | 'elide') =>
    ({ mask: maskFromSkippedLayers(8, { skipAttention: [1], skipFfn: [2] }), kv }) as const;

  test('take it over, to the same answer as without', async () => {
    await using engine = await open();
    await using other = await open({ prefixTokensMax: 0 });
    expect((await collect(engine, request({ promptTokenIds: tokens(70) }))).finished.cachedTokens).toBe(0);
    const longer = Int32Array.from([...tokens(70), ...tokens(30, 500)]);
    const changes: Partial<GenerateRequest>[] = [
      { promptTokenIds: tokens(70) },
      { promptTokenIds: longer },
      { promptTokenIds: longer.subarray(0, 64) },
      { promptTokenIds: Int32Array.from([...tokens(40), ...tokens(40, 900)]) },
    ];
    const cached: number[] = [];
    for (const change of changes) {
      const [found, expected] = [
        await collect(engine, request({ ...change, logprobs: 3 })),
        await collect(other, request({ ...change, logprobs: 3 })),
      ];
      expect(found.tokens).toEqual(expected.tokens);
      expect(expected.finished.cachedTokens).toBe(0);
      cached.push(found.finished.cachedTokens);
    }
    // Whole pages of 16 tokens, and never a prompt's last two.
    expect(cached).toEqual([64, 64, 48, 32]);
  });

  test("take over an earlier answer's pages too, to the same answer but for rounding", async () => {
    await using engine = await open();
    await using other = await open({ prefixTokensMax: 0 });
    const first = await collect(engine, request({ promptTokenIds: tokens(70), maxTokens: 40 }));
    const promptTokenIds = Int32Array.from([...tokens(70), ...first.tokenIds, ...tokens(30, 500)]);
    const asked = { promptTokenIds, maxTokens: 1, logprobs: 1 };
    const [found, expected] = [await collect(engine, request(asked)), await collect(other, request(asked))];
    // The answer's last token was not computed: nothing came after it.
    expect(found.finished.cachedTokens).toBe(96);
    const best = ({ tokens: [token] }: typeof found) => token!.logprob!.top[0]!;
    expect(best(found).tokenId).toBe(best(expected).tokenId);
    expect(best(found).logprob).toBeCloseTo(best(expected).logprob, 1);
  });

  test("are found by the same tenant's alone, and under the same mask alone", async () => {
    await using engine = await open();
    const cachedTokens = async (changes: Partial<GenerateRequest>) =>
      (await collect(engine, request({ promptTokenIds: tokens(70), maxTokens: 1, ...changes }))).finished
        .cachedTokens;
    for (const changes of [
      {},
      { tenant: 'other' },
      { plan: masked('preserve') },
      { plan: masked('elide') },
      { promptTokenIds: tokens(70, 1) },
    ]) {
      expect(await cachedTokens(changes)).toBe(0);
      expect(await cachedTokens(changes)).toBe(64);
    }
  });

  test('are computed whole when they are to be scored', async () => {
    await using engine = await open();
    await collect(engine, request({ promptTokenIds: tokens(70) }));
    const scored = await collect(engine, request({ promptTokenIds: tokens(70), promptLogprobs: 0 }));
    expect(scored.finished.cachedTokens).toBe(0);
    expect(scored.events[0]).toMatchObject({ type: 'prompt', logprobs: { length: 70 } });
  });

  test('go when there is no more room, the longest unused first', async () => {
    // Four pages each.
    await using engine = await open({ prefixTokensMax: 8 * 16 });
    const cachedTokens = async (from: number) => {
      const wanted = request({ promptTokenIds: tokens(70, from), maxTokens: 1 });
      return (await collect(engine, wanted)).finished.cachedTokens;
    };
    expect([await cachedTokens(0), await cachedTokens(1)]).toEqual([0, 0]);
    expect(await cachedTokens(0)).toBe(64);
    expect(await cachedTokens(2)).toBe(0);
    expect([await cachedTokens(0), await cachedTokens(1)]).toEqual([64, 0]);
  });

  test('of one tenant, however many, do not push out those of another', async () => {
    await using engine = await open({ prefixTokensMax: 16 * 16 });
    const cachedTokens = async (tenant: string, from: number) => {
      const wanted = request({ tenant, promptTokenIds: tokens(70, from), maxTokens: 1 });
      return (await collect(engine, wanted)).finished.cachedTokens;
    };
    await cachedTokens('quiet', 0);
    for (let from = 1; from <= 25; from++) await cachedTokens('busy', from);
    expect(await cachedTokens('quiet', 0)).toBe(64);
    // The busy one has what is left.
    expect([await cachedTokens('busy', 25), await cachedTokens('busy', 23)]).toEqual([64, 64]);
    expect(await cachedTokens('busy', 1)).toBe(0);
  });
});

test('stop ids end the answer without being part of it; min_tokens holds them off', async () => {
  await using engine = await open();
  const { tokenIds } = await collect(engine, request());
  const stop = tokenIds[4]!;
  const stopped = await collect(engine, request({ stopTokenIds: [stop] }));
  expect(stopped.tokenIds).toEqual(tokenIds.slice(0, tokenIds.indexOf(stop)));
  expect(stopped.finished.reason).toBe('stop');
  const held = await collect(engine, request({ stopTokenIds: [stop], minTokens: 12 }));
  expect(held.tokenIds.length).toBeGreaterThanOrEqual(12);
  expect(held.tokenIds.slice(0, 12)).not.toContain(stop);
});

test('penalties count the tokens of the answer so far, and repetition_penalty those of the prompt too', async () => {
  await using engine = await open();
  const tokensUnder = async (sampling: Partial<Sampling>) =>
    (await collect(engine, request({ sampling: { ...PLAIN_SAMPLING, temperature: 0, ...sampling } })))
      .tokenIds;
  // 1000, 600, 200, and then less than any other token.
  const thrice = await tokensUnder({ logitBias: [[7, 1000]], frequencyPenalty: 400 });
  expect(thrice.filter((id) => id === 7)).toHaveLength(3);
  expect(new Set(await tokensUnder({ presencePenalty: 1000 })).size).toBe(20);
  const isInPrompt = new Set(request().promptTokenIds);
  const fresh = await tokensUnder({ repetitionPenalty: 1e9 });
  expect([new Set(fresh).size, fresh.filter((id) => isInPrompt.has(id))]).toEqual([20, []]);
});

test('a prompt is scored without generating, and scoring equals what generating would say', async () => {
  await using engine = await open({ chunkTokens: 16 });
  const first = await collect(engine, request({ logprobs: 3 }));
  const whole = Int32Array.from([...request().promptTokenIds, ...first.tokenIds]);
  const scored = await collect(engine, request({ promptTokenIds: whole, maxTokens: 0, promptLogprobs: 3 }));
  expect(scored.tokenIds).toEqual([]);
  const prompt = scored.events[0];
  if (prompt?.type !== 'prompt') throw new Error('the prompt event comes first');
  expect(prompt.logprobs).toHaveLength(60);
  expect(prompt.logprobs[0]).toBeNull();
  first.tokens.forEach(({ logprob }, i) => {
    expect(prompt.logprobs[40 + i]!.logprob).toBeCloseTo(logprob!.logprob, 1);
    expect(logprob!.top).toHaveLength(3);
  });
});

test('a cancel ends a prompt of many chunks within a step, and its place is free again', async () => {
  await using engine = await open({ chunkTokens: 2, runningMax: 1 });
  const controller = new AbortController();
  const long = collect(
    engine,
    request({ promptTokenIds: Int32Array.from({ length: 500 }, () => 5), maxTokens: 5 }),
    controller.signal,
  );
  await expect.poll(() => engine.stats().stepsTotal, { interval: 5 }).toBeGreaterThan(3);
  const next = collect(engine, request({ maxTokens: 1 }));
  controller.abort();
  expect((await long).finished).toMatchObject({ reason: 'cancelled', completionTokens: 0 });
  expect(engine.stats().stepsTotal).toBeLessThan(250);
  expect((await next).tokenIds).toHaveLength(1);
});

test('a consumer that walks away cancels, and so does a signal that was aborted before', async () => {
  await using engine = await open();
  for await (const event of engine.generate(request({ maxTokens: 400 }), NEVER))
    if (event.type === 'token') break;
  await expect.poll(() => engine.stats().requestsRunning, { timeout: 20_000 }).toBe(0);
  const aborted = await collect(engine, request(), AbortSignal.abort());
  expect(aborted.finished.reason).toBe('cancelled');
});

test('tokens are told as they are computed, before anybody reads them', async () => {
  await using engine = await open();
  let computed = 0;
  const events = engine.generate(request({ maxTokens: 12 }), NEVER, () => computed++)[Symbol.asyncIterator]();
  await events.next();
  await expect.poll(() => computed, { timeout: 20_000 }).toBe(12);
  await events.return?.();
});

/** Runs on until `stop`; resolves once its first token is there. */
async function occupy(engine: Engine) {
  const controller = new AbortController();
  const events = engine.generate(request(ENDLESS), controller.signal)[Symbol.asyncIterator]();
  await events.next();
  return {
    async stop() {
      controller.abort();
      for (let next = await events.next(); next.done !== true; ) next = await events.next();
    },
  };
}

test('a full line and a long wait are answered, each with its code', async () => {
  await using engine = await open({ runningMax: 1, waitingMax: 1, queueTimeout_ms: 150 });
  const running = await occupy(engine);
  const waiting = collect(engine, request());
  const refused = collect(engine, request());
  await Promise.all([
    expect(refused).rejects.toMatchObject({ code: 'queue_full', retryAfter_s: 1 }),
    expect(waiting).rejects.toMatchObject({ code: 'queue_timeout', retryAfter_s: 1 }),
  ]);
  await expect.poll(() => engine.stats().requestsWaiting, { timeout: 20_000 }).toBe(0);
  expect(engine.stats().requestsRunning).toBe(1);
  await running.stop();
});

test('whether the line is full can be asked before a request is sent; a tenant that has less there is let in', async () => {
  await using engine = await open({ runningMax: 1, waitingMax: 2 });
  engine.expectRoom('acme');
  const running = await occupy(engine);
  const leave = new AbortController();
  const waiting = [1, 2].map(() => collect(engine, request(), leave.signal));
  await expect.poll(() => engine.stats().requestsWaiting, { timeout: 20_000 }).toBe(2);
  const full = expect.objectContaining({ code: 'queue_full', retryAfter_s: 1 });
  expect(() => engine.expectRoom('acme')).toThrow(full);
  engine.expectRoom('other');
  // The engine says the same.
  await expect(collect(engine, request())).rejects.toEqual(full);
  const other = collect(engine, request({ tenant: 'other' }));
  await expect(Promise.race(waiting)).rejects.toEqual(full);
  expect(() => engine.expectRoom('other')).toThrow(full);
  await running.stop();
  await Promise.allSettled([...waiting, other]);
  engine.expectRoom('acme');
});

test('a request that is about to come has its place in the line, and others of its tenant find it full', async () => {
  await using engine = await open({ runningMax: 1, waitingMax: 2 });
  const full = expect.objectContaining({ code: 'queue_full', retryAfter_s: 1 });
  const places = [1, 2, 3].flatMap(() => engine.reserve('acme', 1));
  expect(() => engine.expectRoom('acme')).toThrow(full);
  engine.expectRoom('other');
  places[0]!();
  engine.expectRoom('acme');
});

test('requests for several places at once do not get more of them than requests for one', async () => {
  await using engine = await open({ runningMax: 2, waitingMax: 8 });
  const takenBy: Record<string, number> = { acme: 0, other: 0 };
  /** Until the line is full. */
  const take = (tenant: string) => {
    for (let i = 0; i < 50; i++) {
      try {
        takenBy[tenant]! += engine.reserve(tenant, 4).length;
      } catch {
        return;
      }
    }
  };
  take('acme');
  expect(takenBy).toEqual({ acme: 10, other: 0 });
  // With four places at a time each could pass the other, and let it in again.
  for (let turn = 0; turn < 10; turn++) for (const tenant of ['other', 'acme']) take(tenant);
  expect(takenBy).toEqual({ acme: 10, other: 9 });
});

test('requests that are refused all at once end in a turn of the event loop each', async () => {
  await using engine = await open({ runningMax: 1, waitingMax: 40, queueTimeout_ms: 150 });
  const running = await occupy(engine);
  let turn = 0;
  const ended: number[] = [];
  const waiting = Array.from({ length: 40 }, () =>
    collect(engine, request()).catch(({ code }) => {
      expect(code).toBe('queue_timeout');
      ended.push(turn);
    }),
  );
  const count = () => {
    turn++;
    if (ended.length < 40) setImmediate(count);
  };
  count();
  await Promise.all(waiting);
  expect(new Set(ended).size).toBe(40);
  await running.stop();
});

test.each<[string, Partial<GenerateRequest>, string]>([
  ['an empty prompt', { promptTokenIds: new Int32Array(0) }, 'invalid_request'],
  [
    'a prompt over the context',
    { promptTokenIds: new Int32Array(CONTEXT_TOKENS + 1) },
    'context_length_exceeded',
  ],
  [
    'a prompt that leaves no room',
    { promptTokenIds: new Int32Array(CONTEXT_TOKENS) },
    'context_length_exceeded',
  ],
  ['a token outside the vocabulary', { promptTokenIds: Int32Array.of(320) }, 'invalid_request'],
  ['a mask of another size', { plan: { mask: denseMask(6), kv: 'preserve' } }, 'mask_model_mismatch'],
  [
    'surrogates that the model lacks',
    { plan: { mask: withSurrogates(denseMask(8), OTHER_TABLE), kv: 'preserve' } },
    'surrogates_mismatch',
  ],
])('%s is refused with a code', async (_name, changes, code) => {
  await using engine = await open();
  await expect(collect(engine, request(changes))).rejects.toMatchObject({ code });
});

test('the answer ends where the context does', async () => {
  const small = randomLlama({ contextTokens: 64 });
  const folder = await mkdtemp(join(tmpdir(), 'maskroute-engine-'));
  await using cleaning = new AsyncDisposableStack();
  cleaning.defer(() => rm(folder, { recursive: true }));
  await emitFromMemory(small, 'q8', folder, () => {});
  await using engine = await open({}, { modelDir: folder, config: small.config });
  const { finished } = await collect(
    engine,
    request({ promptTokenIds: new Int32Array(64 - 12), maxTokens: 100 }),
  );
  expect(finished).toMatchObject({ reason: 'length', completionTokens: 12 });
});

test('closing lets what runs finish and takes nothing new', async () => {
  const engine = await open();
  const running = await occupy(engine);
  const last = collect(engine, request({ maxTokens: 50 }));
  const closed = engine.close();
  await expect(collect(engine, request())).rejects.toMatchObject({ code: 'not_ready' });
  expect((await last).tokenIds).toHaveLength(50);
  await running.stop();
  await closed;
  await expect(collect(engine, request())).rejects.toMatchObject({ code: 'engine_failed' });
});

test('a model that cannot be opened fails the start, clearly', async () => {
  const options = { modelDir: '/nowhere', hash: '0'.repeat(64) as ModelHash, config: source.config as never };
  await expect(createEngine(options)).rejects.toMatchObject({ code: 'engine_failed' });
});
