/** The engine's loop in this thread, on a small model whose runs of many scored tokens are made slow. */
import { setTimeout as sleep } from 'node:timers/promises';
import { expect, test } from 'vitest';
import { type GenerateRequest, PLAIN_SAMPLING } from '../../../gpu-backend/engine/engine.ts';
import { EngineLoop } from '../../../gpu-backend/engine/engine-loop.ts';
import { HEADER, newSession } from '../../../gpu-backend/engine/grammar.ts';
import type { RunInput } from '../../../gpu-backend/engine/run-input.ts';
import { denseMask } from '../../../shared/mask/mask.ts';
import { openEmitted, randomLlama } from '../../support/random-llama.ts';

const LIMITS = {
  runningMax: 8,
  waitingMax: 8,
  queueTimeout_ms: 30_000,
  stepMax_ms: 70,
  chunkTokens: 16,
  cacheTokensMax: 1024,
  prefixTokensMax: 0,
};
/** A small model's, roughly. */
const TIMES = { fixed_ms: 1, row_ms: 0.1, key_ms: 0, pieceKey_ms: 0, rowKey_ms: 0 };
const request = (tenant: string, changes: Partial<GenerateRequest>): GenerateRequest => ({
  requestId: tenant,
  tenant,
  promptTokenIds: new Int32Array(10),
  plan: { mask: denseMask(8), kv: 'preserve' },
  sampling: { ...PLAIN_SAMPLING, temperature: 0, seed: 11 },
  maxTokens: 4,
  minTokens: 0,
  stopTokenIds: [],
  logprobs: undefined,
  promptLogprobs: undefined,
  ...changes,
});

test("while a prompt is scored, every step has a token of another tenant's answer", async () => {
  await using runner = await openEmitted(randomLlama(), 'q8');
  const steps: string[] = [];
  const runMany = async (inputs: readonly RunInput[]) => {
    const scores = inputs.some(({ logitRows }) => logitRows.length > 1);
    const answers = inputs.some(({ tokenIds }) => tokenIds.length === 1);
    steps.push(`${scores ? 'scores' : ''} ${answers ? 'answers' : ''}`);
    if (scores) await sleep(40);
    return runner.runMany(inputs);
  };
  const answered = Promise.withResolvers<void>();
  const loop = new EngineLoop({ ...runner, runMany }, LIMITS, TIMES, {
    event: (requestId, { type }) => {
      if (requestId === 'asks' && type === 'finished') answered.resolve();
    },
    failed: (_, error) => answered.reject(error),
  });
  loop.add(request('scores', { promptTokenIds: new Int32Array(500), maxTokens: 0, promptLogprobs: 20 }));
  const ended = loop.run(() => {});
  await expect.poll(() => steps.length).toBe(1);
  loop.add(request('asks', {}));
  await answered.promise;
  const together = steps.slice(steps.indexOf('scores answers'));
  expect(together.slice(0, 3)).toEqual(Array(3).fill('scores answers'));
  loop.cancel('scores');
  loop.close();
  await ended;
});

test('a request with the id of one that runs fails, and the one that runs goes on', async () => {
  await using runner = await openEmitted(randomLlama(), 'q8');
  const heard: string[] = [];
  const loop = new EngineLoop(runner, LIMITS, TIMES, {
    event: (_, { type }) => heard.push(type),
    failed: (_, error) => heard.push(String((error.cause as Error).message)),
  });
  loop.add(request('asks', {}));
  loop.add(request('asks', {}));
  loop.close();
  await loop.run(() => {});
  expect(heard).toEqual(['request asks is already running', ...Array(4).fill('token'), 'finished']);
});

test("a stream goes on while its tenant's clients ask for one token each, again and again", async () => {
  await using runner = await openEmitted(randomLlama(), 'q8');
  const enough = Promise.withResolvers<void>();
  let [answers, tokens, gap_ms] = [0, 0, 0];
  const loop = new EngineLoop(runner, LIMITS, TIMES, {
    event(requestId, event) {
      if (requestId === 'stream') {
        if (event.type === 'token') tokens++;
        if (event.type === 'finished') gap_ms = event.timings.stepGap_ms;
        return;
      }
      if (event.type !== 'finished') return;
      if (++answers >= 200) return enough.resolve();
      loop.add(request('one tenant', { requestId: `r${answers}`, maxTokens: 1 }));
    },
    failed: (_, error) => enough.reject(error),
  });
  loop.add(request('one tenant', { requestId: 'stream', maxTokens: 400 }));
  for (const client of 'abcd') loop.add(request('one tenant', { requestId: client, maxTokens: 1 }));
  expect(loop.stats().leastRecentStep_ms).toBe(0);
  expect(loop.stats().oldestUnstarted_ms).toBeGreaterThan(Date.now() - 60_000);
  const ended = loop.run(() => {});
  await enough.promise;
  // One for every turn of the four: fewer only where this machine stands still for a step.
  expect(tokens).toBeGreaterThan(20);
  expect(loop.stats().leastRecentStep_ms).toBeGreaterThan(Date.now() - 60_000);
  loop.cancel('stream');
  expect(gap_ms).toBeGreaterThan(0);
  loop.close();
  await ended;
  expect(loop.stats()).toMatchObject({ leastRecentStep_ms: 0, oldestUnstarted_ms: 0 });
});

test('an answer whose grammar is slow holds up no other, goes on once it knows, and fails when it never does', async () => {
  await using runner = await openEmitted(randomLlama(), 'q8');
  const grammar = (matched: number) => {
    const session = newSession(runner.config.vocabularySize, new SharedArrayBuffer(4));
    const header = new Int32Array(session.words);
    header.fill(-1, HEADER.words);
    header[HEADER.matched] = matched;
    return { session, header };
  };
  // Both know what comes first, and not what comes after that.
  const [slow, lost] = [grammar(0), grammar(0)];
  const heard: string[] = [];
  const told = new Map<string, PromiseWithResolvers<void>>();
  for (const name of ['slow', 'lost', 'free']) told.set(name, Promise.withResolvers<void>());
  const loop = new EngineLoop(runner, LIMITS, TIMES, {
    event(requestId, { type }) {
      heard.push(`${requestId} ${type}`);
      if (type === 'finished') told.get(requestId)!.resolve();
    },
    failed(requestId, { code }) {
      heard.push(`${requestId} ${code}`);
      told.get(requestId)!.resolve();
    },
  });
  loop.add(request('slow', { grammar: slow.session, maxTokens: 2 }));
  loop.add(request('lost', { grammar: lost.session, maxTokens: 2 }));
  loop.add(request('free', { maxTokens: 30 }));
  const ended = loop.run(() => {});
  await told.get('free')!.promise;
  expect(heard.filter((one) => one.startsWith('slow'))).toEqual(['slow token']);
  Atomics.store(slow.header, HEADER.matched, 1);
  Atomics.notify(slow.header, HEADER.matched);
  await told.get('slow')!.promise;
  expect(heard.filter((one) => one.startsWith('slow'))).toEqual([
    'slow token',
    'slow token',
    'slow finished',
  ]);
  expect(heard).not.toContain('lost engine_failed');
  await told.get('lost')!.promise;
  expect(heard.at(-1)).toBe('lost engine_failed');
  loop.close();
  await ended;
});

test('who leaves while its grammar is late lets the next request run at once', async () => {
  await using runner = await openEmitted(randomLlama(), 'q8');
  const { words, bell } = newSession(runner.config.vocabularySize, new SharedArrayBuffer(4));
  const [waits, told] = [Promise.withResolvers<void>(), Promise.withResolvers<void>()];
  const loop = new EngineLoop(runner, { ...LIMITS, runningMax: 1 }, TIMES, {
    event(requestId, { type }) {
      if (requestId === 'next' && type === 'finished') told.resolve();
    },
    failed: (_, error) => told.reject(error),
  });
  loop.add(request('late', { grammar: { words, bell } }));
  loop.add(request('next', {}));
  const ended = loop.run(() => {
    if (loop.stats().stepsTotal > 0) waits.resolve();
  });
  await waits.promise;
  await sleep(50);
  const start_ms = performance.now();
  loop.cancel('late');
  await told.promise;
  expect(performance.now() - start_ms).toBeLessThan(1000);
  loop.close();
  await ended;
});

test('who leaves while a step runs hands its cache on only when the step is over, and empty', async () => {
  await using runner = await openEmitted(randomLlama(), 'q8');
  const answer = async (leaver: boolean): Promise<number[]> => {
    const tokens: number[] = [];
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    // The runtime begins its work a turn of the event loop later: a client's leaving may come before that.
    const runMany = async (inputs: readonly RunInput[]) => {
      loop.cancel('leaves');
      return runner.runMany(inputs);
    };
    const loop = new EngineLoop({ ...runner, runMany }, LIMITS, TIMES, {
      event: (requestId, event) => {
        if (requestId !== 'stays') loop.add(request('stays', { maxTokens: 8 }));
        else if (event.type === 'token') tokens.push(event.tokenId);
        else if (event.type === 'finished') resolve();
      },
      failed: (_, error) => reject(error),
    });
    const promptTokenIds = Int32Array.from({ length: 12 }, (_, i) => i);
    loop.add(leaver ? request('leaves', { promptTokenIds }) : request('stays', { maxTokens: 8 }));
    const ended = loop.run(() => {});
    await promise;
    loop.close();
    await ended;
    return tokens;
  };
  expect(await answer(true)).toEqual(await answer(false));
});

test('a step that fails when a part of it is written is computed again alone, with the same answers', async () => {
  await using runner = await openEmitted(randomLlama(), 'q8');
  const answers = async (failure: Error | undefined): Promise<Record<string, number[]>> => {
    const tokens: Record<string, number[]> = { a: [], b: [] };
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    const runMany = async (inputs: readonly RunInput[]) => {
      const logits = await runner.runMany(inputs);
      if (failure !== undefined && inputs.length > 1) throw failure;
      return logits;
    };
    let finished = 0;
    const loop = new EngineLoop({ ...runner, runMany }, LIMITS, TIMES, {
      event: (requestId, event) => {
        if (event.type === 'token') tokens[requestId]!.push(event.tokenId);
        if (event.type === 'finished' && ++finished === 2) resolve();
      },
      failed: (_, error) => reject(error),
    });
    for (const name of ['a', 'b']) {
      const promptTokenIds = Int32Array.from({ length: 12 }, (_, i) => i + name.charCodeAt(0));
      loop.add(request(name, { promptTokenIds, maxTokens: 8 }));
    }
    const ended = loop.run(() => {});
    await promise;
    loop.close();
    await ended;
    return tokens;
  };
  expect(await answers(new Error('out of memory'))).toEqual(await answers(undefined));
});

test('a request for which there is no memory fails alone, and the next in the queue runs in its place', async () => {
  await using runner = await openEmitted(randomLlama(), 'q8');
  const heard: string[] = [];
  let asked = 0;
  const newCache = () => {
    if (++asked <= 2) throw new RangeError('Array buffer allocation failed');
    return runner.newCache();
  };
  const loop = new EngineLoop({ ...runner, newCache }, { ...LIMITS, runningMax: 2 }, TIMES, {
    event: (requestId, { type }) => type === 'finished' && heard.push(`${requestId} ${type}`),
    failed: (requestId, { code }) => heard.push(`${requestId} ${code}`),
  });
  for (const name of 'abcd') loop.add(request(name, {}));
  loop.close();
  await loop.run(() => {});
  expect(heard).toEqual(['a engine_failed', 'b engine_failed', 'c finished', 'd finished']);
});
