/** The scheduler alone: requests and token counts, no model. */
import fc from 'fast-check';
import { expect, test, vi } from 'vitest';
import { type CacheShape, KvCache } from '../../../gpu-backend/engine/kv-cache.ts';
import type { RunInput } from '../../../gpu-backend/engine/run-input.ts';
import type { ScheduledRequest, SchedulerLimits, Step } from '../../../gpu-backend/engine/scheduler.ts';
import { Scheduler } from '../../../gpu-backend/engine/scheduler.ts';
import { addLoads, measureStepTimes, StepCost } from '../../../gpu-backend/engine/step-cost.ts';

const LIMITS: SchedulerLimits = {
  runningMax: 2,
  waitingMax: 3,
  queueTimeout_ms: 1000,
  stepMax_ms: 60,
  chunkTokens: 8,
  cacheTokensMax: 160,
};
/** A token takes 10 ms, and a step with eight tokens of a prompt 18. */
const TIMES = { fixed_ms: 9, row_ms: 1, key_ms: 0, pieceKey_ms: 0, rowKey_ms: 0 };
const timesOf = new WeakMap<Scheduler, typeof TIMES>();
function open(limits: Partial<SchedulerLimits> = {}, times = TIMES): Scheduler {
  const scheduler = new Scheduler({ ...LIMITS, ...limits }, new StepCost(times));
  timesOf.set(scheduler, times);
  return scheduler;
}

const request = (
  requestId: string,
  promptCount: number,
  cacheTokens = promptCount,
  arrivedAt_ms = 0,
): ScheduledRequest => ({
  requestId,
  // `a2` is tenant a's.
  tenant: /^[a-z](?=\d$)/.exec(requestId)?.[0] ?? '',
  cacheTokens,
  promptCount,
  arrivedAt_ms,
  answerSince_ms: arrivedAt_ms,
  isScored: false,
  tokenCount: promptCount,
  computedCount: 0,
  draftCount: 0,
  preemptions: 0,
});

const expected_ms = (scheduler: Scheduler, step: Step): number =>
  new StepCost(timesOf.get(scheduler)!).ms(step.parts.map(({ load }) => load).reduce(addLoads));

/** An answer whose next token waits to be computed, with predicted ones behind it. */
const predicted = (requestId: string, draftCount: number): ScheduledRequest => ({
  ...request(requestId, 1, 100),
  tokenCount: 2,
  computedCount: 1,
  draftCount,
});

/** What a step computed, of whom. An answer goes on by a token when it is computed whole. */
function runStep(scheduler: Scheduler, took_ms?: number): [string, number][] {
  const step = scheduler.schedule();
  if (step === undefined) return [];
  const computed = step.parts.map(({ request: one, tokens }): [string, number] => [one.requestId, tokens]);
  for (const part of step.parts) {
    scheduler.update(part);
    if (part.request.computedCount === part.request.tokenCount) part.request.tokenCount++;
  }
  scheduler.charge(step, took_ms ?? expected_ms(scheduler, step));
  return computed;
}
const ids = (step: [string, number][]): string => step.map(([id]) => id).join(' ');

test('a step has a token of everybody who generates, and a piece of a prompt beside them', () => {
  const scheduler = open({ runningMax: 4 });
  scheduler.add(request('a', 1, 100));
  scheduler.add(request('b', 1, 100));
  expect(runStep(scheduler)).toEqual([
    ['a', 1],
    ['b', 1],
  ]);
  scheduler.add(request('long', 20));
  for (const piece of [8, 8, 4])
    expect(runStep(scheduler)).toEqual([
      ['a', 1],
      ['b', 1],
      ['long', piece],
    ]);
  expect(ids(runStep(scheduler)).split(' ').sort().join(' ')).toBe('a b long');
});

test('a piece is as large as its time, and a step without answers as long as a step may be', () => {
  const scheduler = open({ runningMax: 4, chunkTokens: 1000, cacheTokensMax: 4000 });
  scheduler.add(request('a1', 1, 100));
  runStep(scheduler);
  scheduler.add(request('b1', 1000));
  // One token takes 10 ms, and beside a piece 35.
  expect(runStep(scheduler)).toEqual([
    ['a1', 1],
    ['b1', 25],
  ]);
  scheduler.remove('a1');
  expect(runStep(scheduler)).toEqual([['b1', 51]]);
  // Where a token alone takes longer, a step may take as long as four.
  const slow = open({ chunkTokens: 1000, cacheTokensMax: 4000 }, { ...TIMES, fixed_ms: 90 });
  slow.add(request('a1', 1000));
  expect(runStep(slow)).toEqual([['a1', 274]]);
});

test('a piece shrinks where keys are many, and while the machine is slow', () => {
  const limits = { chunkTokens: 1000, cacheTokensMax: 10_000 };
  const scheduler = open(limits, { ...TIMES, rowKey_ms: 0.001 });
  const far = { ...request('far', 9000), computedCount: 5000 };
  scheduler.add(far);
  const [[, first]] = runStep(scheduler) as [[string, number]];
  expect(first).toBe(8);
  scheduler.remove('far');
  scheduler.add(request('near', 9000));
  const [[, near]] = runStep(scheduler) as [[string, number]];
  expect(near).toBe(51);
  for (let step = 0; step < 40; step++) runStep(scheduler, 400);
  const [[, slow]] = runStep(scheduler) as [[string, number]];
  // Not so small that reading the weights takes most of the time.
  expect(slow).toBeLessThan(near / 2);
  expect(slow).toBeGreaterThan(8);
});

test('the first prompt of a step advances by eight tokens however long that takes, and no other beside it', () => {
  // Four rows would take as long as a step may.
  const scheduler = open({ cacheTokensMax: 1000 }, { ...TIMES, row_ms: 1000 });
  scheduler.add(request('a1', 100));
  scheduler.add(request('b1', 100));
  expect([runStep(scheduler), runStep(scheduler)]).toEqual([[['a1', 8]], [['b1', 8]]]);
});

test('as many predicted tokens are computed as there is time for, behind the tokens of two answers', () => {
  const drafts = (times: typeof TIMES, answers: number): number[] => {
    const scheduler = open({ runningMax: 4 }, times);
    for (const id of ['a1', 'b1', 'c1'].slice(0, answers)) scheduler.add(predicted(id, 15));
    return runStep(scheduler).map(([, tokens]) => tokens);
  };
  expect([drafts(TIMES, 1), drafts(TIMES, 3)]).toEqual([[16], [16, 16, 1]]);
  // At 6 ms a row there is no time for all of them, at 60 ms for none.
  expect([drafts({ ...TIMES, row_ms: 6 }, 1), drafts({ ...TIMES, row_ms: 6 }, 3)]).toEqual([[5], [4, 1, 1]]);
  expect(drafts({ ...TIMES, fixed_ms: 0, row_ms: 60 }, 1)).toEqual([2]);
  expect(drafts({ ...TIMES, fixed_ms: 0, row_ms: 60, pieceKey_ms: 60 }, 1)).toEqual([1]);
});

test('steps of predicted tokens, whose logits are read, teach nothing wrong of the time that prompts take', () => {
  const limits = { chunkTokens: 1000, cacheTokensMax: 4000 };
  const scheduler = open(limits);
  const answer = predicted('a1', 15);
  scheduler.add(answer);
  // A row whose logits are read takes as long as 1.5 others.
  for (let step = 0; step < 40; step++) {
    expect(runStep(scheduler, 9 + 1.5 * 16)).toEqual([['a1', 16]]);
    answer.computedCount = answer.tokenCount - 1;
  }
  scheduler.remove('a1');
  scheduler.add(request('b1', 1000));
  expect(runStep(scheduler)).toEqual([['b1', 51]]);
});

test('no piece of several tokens leaves one, or is one', () => {
  const pieces = (promptCount: number, chunkTokens: number): number[] => {
    const scheduler = open({ chunkTokens });
    scheduler.add(request('one', promptCount));
    const found: number[] = [];
    for (let left = promptCount; left > 0; left -= found.at(-1)!) found.push(runStep(scheduler)[0]![1]);
    return found;
  };
  expect(pieces(9, 8)).toEqual([7, 2]);
  expect(pieces(1, 8)).toEqual([1]);
  expect(pieces(3, 2)).toEqual([3]);
  expect(pieces(5, 2)).toEqual([2, 3]);
  for (let count = 2; count < 40; count++) expect(pieces(count, 8)).not.toContain(1);
});

test('when caches are full the newest gives its pages back, and goes on when there is room', () => {
  // Ten pages of 16 tokens.
  const scheduler = open({ runningMax: 3, chunkTokens: 100 });
  const [old, young] = [request('old', 63, 160, 1), request('young', 63, 160, 2)];
  scheduler.add(old);
  scheduler.add(young);
  expect(scheduler.pagesUsed).toBe(8);
  let preempted: string[] = [];
  for (let step = 0; step < 60 && preempted.length === 0; step++) {
    const next = scheduler.schedule()!;
    preempted = next.preempted.map((one) => one.requestId);
    for (const part of next.parts) {
      scheduler.update(part);
      if (part.request.computedCount === part.request.tokenCount) part.request.tokenCount++;
    }
    scheduler.charge(next, expected_ms(scheduler, next));
  }
  expect(preempted).toEqual(['young']);
  expect(young).toMatchObject({ computedCount: 0, preemptions: 1 });
  const generated = young.tokenCount - 63;
  expect(generated).toBeGreaterThan(10);
  // It waits at the head of the line, for as long as it takes.
  scheduler.add(request('newcomer', 1));
  expect(scheduler.expire(1e9).map((one) => one.requestId)).toEqual(['newcomer']);
  expect(ids(runStep(scheduler))).toBe('old');
  scheduler.remove('old');
  // Its prompt is computed in pieces, and what it generated token by token, as before.
  expect(runStep(scheduler)).toEqual([['young', 51]]);
  expect(runStep(scheduler)).toEqual([['young', 12]]);
  expect(runStep(scheduler)).toEqual([['young', 1]]);
  expect(young.tokenCount).toBe(63 + generated);
});

test('a full line answers at once, and gives way when somebody leaves', () => {
  const scheduler = open();
  for (const id of ['a', 'b', 'c', 'd', 'e']) scheduler.add(request(id, 1));
  expect(() => scheduler.add(request('f', 1))).toThrow(expect.objectContaining({ code: 'queue_full' }));
  expect([scheduler.runningCount, scheduler.waitingCount]).toEqual([2, 3]);
  scheduler.remove('a');
  expect([scheduler.runningCount, scheduler.waitingCount]).toEqual([2, 2]);
  scheduler.add(request('f', 1));
});

test('a request starts when its prompt has room, in order of arrival', () => {
  const scheduler = open();
  scheduler.add(request('a', 100, 160));
  scheduler.add(request('large', 60, 160));
  scheduler.add(request('small', 10, 160));
  expect([scheduler.runningCount, scheduler.pagesUsed]).toEqual([1, 7]);
  scheduler.remove('a');
  expect([scheduler.runningCount, scheduler.pagesUsed]).toEqual([2, 5]);
  expect(() => scheduler.add(request('never', 1, 161))).toThrow(
    expect.objectContaining({ code: 'context_length_exceeded' }),
  );
});

/** Prompts that do not end while a test looks on. */
function endless(scheduler: Scheduler, ...names: string[]): void {
  for (const id of names) scheduler.add(request(id, 100_000, 100_000));
}
const PROMPTS = { runningMax: 8, waitingMax: 9, cacheTokensMax: 10_000_000 };
const turns = (scheduler: Scheduler, count: number) =>
  Array.from({ length: count }, () => ids(runStep(scheduler))).join(' ');

test('tenants take turns with their prompts, and so do the requests of one', () => {
  const scheduler = open(PROMPTS);
  endless(scheduler, 'a1', 'a2', 'a3', 'b1', 'c1', 'c2');
  const found = turns(scheduler, 12);
  expect(found.replace(/[\d ]/g, '')).toBe('abcabcabcabc');
  expect(turns(scheduler, 18).match(/a\d/g)).toHaveLength(6);
  expect(new Set(turns(scheduler, 18).match(/a\d/g))).toEqual(new Set(['a1', 'a2', 'a3']));
});

test('where not everybody fits into a step, tenants take turns with their tokens', () => {
  // With so many keys a token takes 29 ms, and each further one 20: five fit into the time of four alone.
  const scheduler = open({ ...PROMPTS, stepMax_ms: 50 }, { ...TIMES, key_ms: 0.0019 });
  for (const id of ['a1', 'a2', 'a3', 'a4', 'b1', 'b2', 'c1', 'c2'])
    scheduler.add({ ...request(id, 10_000, 100_000), tokenCount: 10_001, computedCount: 10_000 });
  const found = Array.from({ length: 30 }, () => ids(runStep(scheduler)));
  expect(new Set(found.map((step) => step.split(' ').length))).toEqual(new Set([5]));
  const steps = (tenant: string) => found.join(' ').split(tenant).length - 1;
  for (const tenant of 'abc') {
    expect(steps(tenant)).toBeGreaterThan(42);
    expect(steps(tenant)).toBeLessThan(58);
  }
});

test('a step as long as several counts as so many turns', () => {
  const scheduler = open(PROMPTS);
  endless(scheduler, 'a1', 'b1', 'c1');
  const found: string[] = [];
  for (let step = 0; step < 26; step++) {
    const next = scheduler.schedule()!;
    const { tenant } = next.parts[0]!.request;
    found.push(tenant);
    for (const part of next.parts) scheduler.update(part);
    scheduler.charge(next, tenant === 'a' ? 420 : 5);
  }
  expect(found.join('')).toMatch(/^abc(bc){3,6}abc(bc){5}/);
});

test('a step with several requests of a tenant counts as that of the longest', () => {
  const scheduler = open(PROMPTS);
  scheduler.add(request('a1', 6));
  endless(scheduler, 'a2');
  expect(runStep(scheduler, 1680)).toEqual([
    ['a1', 6],
    ['a2', 2],
  ]);
  scheduler.remove('a1');
  endless(scheduler, 'b1');
  // Of 1680 ms the prompt of six tokens took 969, which are 14 turns.
  expect(turns(scheduler, 15)).toMatch(/^(b1 ){13}a2 b1$/);
});

test('who leaves after a long step and comes back waits as if it had stayed, but not longer', () => {
  const scheduler = open(PROMPTS);
  endless(scheduler, 'a1', 'b1');
  expect(turns(scheduler, 2)).toBe('a1 b1');
  expect(ids(runStep(scheduler, 700))).toBe('a1');
  scheduler.remove('a1');
  endless(scheduler, 'a2');
  expect(turns(scheduler, 10)).toMatch(/^(b1 ){9}a2$/);
  // Its turns are made up for: it is a newcomer, and the next one.
  scheduler.remove('a2');
  turns(scheduler, 10);
  endless(scheduler, 'a3');
  expect(turns(scheduler, 2)).toBe('a3 b1');
  // All others are gone: nobody is left to make up for.
  for (const id of ['a3', 'b1', 'a3']) expect(ids(runStep(scheduler, 2000))).toBe(id);
  scheduler.remove('a3');
  scheduler.remove('b1');
  endless(scheduler, 'a4', 'b2');
  expect(turns(scheduler, 4)).toBe('a4 b2 a4 b2');
});

test("a tenant's newcomer is next among its own requests", () => {
  const scheduler = open(PROMPTS);
  endless(scheduler, 'a1', 'a2', 'a3');
  expect(turns(scheduler, 4)).toBe('a1 a2 a3 a1');
  endless(scheduler, 'a4');
  expect(turns(scheduler, 4)).toBe('a4 a2 a3 a1');
});

test('a machine that slept keeps nobody out for long', () => {
  const scheduler = open(PROMPTS);
  endless(scheduler, 'b1', 'a1');
  runStep(scheduler);
  runStep(scheduler, 3_600_000);
  expect(turns(scheduler, 1)).toBe('b1');
  expect(turns(scheduler, 40)).toContain('a1');
});

test('a flood of one tenant leaves places to the others, and who waits of them is next', () => {
  const scheduler = open({ ...PROMPTS, runningMax: 4, waitingMax: 9 });
  endless(scheduler, 'a1', 'a2', 'a3', 'a4', 'a5');
  expect([scheduler.runningCount, scheduler.waitingCount]).toEqual([3, 2]);
  endless(scheduler, 'b1', 'b2', 'c1');
  expect([scheduler.runningCount, scheduler.waitingCount]).toEqual([4, 4]);
  const runs = () => new Set(turns(scheduler, 12).split(' '));
  expect(runs()).toEqual(new Set(['a1', 'a2', 'a3', 'b1']));
  scheduler.remove('a1');
  expect(runs()).toEqual(new Set(['a2', 'a3', 'b1', 'c1']));
  scheduler.remove('b1');
  expect(runs()).toEqual(new Set(['a2', 'a3', 'b2', 'c1']));
});

test('in a full line the newest of who has most there gives way to a tenant that has less', () => {
  const scheduler = open({ ...PROMPTS, runningMax: 1, waitingMax: 3 });
  endless(scheduler, 'a1', 'a2', 'a3', 'a4');
  expect(() => scheduler.add(request('a5', 1))).toThrow(expect.objectContaining({ code: 'queue_full' }));
  expect(scheduler.add(request('b1', 1))?.requestId).toBe('a4');
  expect(scheduler.add(request('c1', 1))?.requestId).toBe('a3');
  expect(() => scheduler.add(request('c2', 1))).toThrow(expect.objectContaining({ code: 'queue_full' }));
  expect([scheduler.runningCount, scheduler.waitingCount]).toEqual([1, 3]);
});

test('who waited too long is taken out; who runs is not', () => {
  const scheduler = open();
  for (const id of ['a', 'b', 'late']) scheduler.add(request(id, 1, 1, 0));
  scheduler.add(request('fresh', 1, 1, 900));
  expect(scheduler.expire(1001).map((late) => late.requestId)).toEqual(['late']);
  expect([scheduler.runningCount, scheduler.waitingCount]).toEqual([2, 1]);
});

test("a tenant's second request gets its place, though tenants with none keep coming", () => {
  const scheduler = open({ ...PROMPTS, runningMax: 4, waitingMax: 99 });
  endless(scheduler, 'a1');
  for (const id of ['b1', 'c1', 'd1']) scheduler.add(request(id, 1));
  const second = request('a2', 100);
  scheduler.add(second);
  for (const id of ['e1', 'f1', 'g1']) scheduler.add(request(id, 1));
  let passed = 0;
  while (!scheduler.running.includes(second)) {
    for (const [id] of runStep(scheduler)) {
      if (id === 'a1') continue;
      expect(++passed).toBeLessThanOrEqual(5);
      scheduler.remove(id);
      if (scheduler.running.includes(second)) break;
      scheduler.add(request(id, 1));
    }
  }
});

test('in a full line a choice of an older answer goes before newcomers, of its tenant and of others', () => {
  const scheduler = open({ ...PROMPTS, runningMax: 1, waitingMax: 2 });
  endless(scheduler, 'r1');
  const since = (id: string, answerSince_ms: number) => ({ ...request(id, 1, 1, 50), answerSince_ms });
  scheduler.add(since('a1', 40));
  scheduler.add(since('b1', 30));
  expect(() => scheduler.add(since('a2', 41))).toThrow(expect.objectContaining({ code: 'queue_full' }));
  expect(scheduler.add(since('a3', 10))?.requestId).toBe('a1');
  expect(scheduler.add(since('c1', 20))?.requestId).toBe('b1');
  expect(() => scheduler.add(since('d1', 50))).toThrow(expect.objectContaining({ code: 'queue_full' }));
});

type Client = {
  readonly tenant: string;
  readonly prompt: number;
  readonly generated: number;
  /** Steps between its answer and its next request: with 0 it asks again at once. */
  readonly pause: number;
  /** It leaves after so many steps of the engine. */
  readonly patience: number | undefined;
};

const anyClient: fc.Arbitrary<Client> = fc.record({
  tenant: fc.constantFrom('a', 'b', 'c', 'd', 'e', 'f'),
  prompt: fc.oneof(fc.constant(1), fc.integer({ min: 1, max: 60 })),
  generated: fc.oneof(fc.constant(0), fc.integer({ min: 0, max: 10 }), fc.constant(90)),
  pause: fc.oneof(fc.constant(0), fc.nat(6)),
  patience: fc.option(fc.nat(60), { nil: undefined, freq: 4 }),
});

const FAIR_LIMITS = { ...LIMITS, runningMax: 5, waitingMax: 7, cacheTokensMax: 240, stepMax_ms: 14 };
const SHARE = Math.ceil(0.75 * FAIR_LIMITS.runningMax);

/** Plainer than `expect`, which takes most of the time where so much is checked. */
function atMost(what: string, count: number, limit: number): void {
  if (count > limit) throw new Error(`${count} ${what}, of at most ${limit}`);
}

type Entry = {
  readonly client: Client;
  readonly request: ScheduledRequest;
  generated: number;
  computed: number;
  /** Steps without it since it got its place or had its last one. */
  leftOut: number;
};

/** A machine that clients use for some steps. Every step checks pages, tokens, and how long everybody waits. */
function useFor(steps: number, clients: readonly Client[], took_ms: () => number): void {
  const scheduler = new Scheduler(FAIR_LIMITS, new StepCost(TIMES));
  const entries = new Map<ScheduledRequest, Entry>();
  const asksAt = clients.map((_, i) => i % 3);
  /** Of a tenant with a request in the line: requests of others that got a place since its own last one did. */
  const passed = new Map<string, number>();
  const running = () => scheduler.running.filter((one) => entries.has(one));
  const end = (one: ScheduledRequest, at: number) => {
    asksAt[clients.indexOf(entries.get(one)!.client)] = at;
    entries.delete(one);
  };
  const ask = (client: Client, index: number, now: number) => {
    const { tenant, prompt, generated } = client;
    const id = `${tenant}.${index}.${now}`;
    const asked = { ...request(id, prompt, prompt + generated, now), tenant };
    asksAt[index] = Number.POSITIVE_INFINITY;
    entries.set(asked, { client, request: asked, generated: 0, computed: 0, leftOut: 0 });
    try {
      const displaced = scheduler.add(asked);
      if (displaced !== undefined) end(displaced, now + client.pause);
    } catch {
      end(asked, now + 1);
    }
  };
  /** Who got a place, in the order of their tenant's line, and whom they went past. */
  const countAdmissions = (act: () => void) => {
    const before = new Set(running());
    act();
    const runs = running();
    const admitted = runs.filter((one) => !before.has(one));
    const stays = [...entries.keys()].filter(
      (one) => !scheduler.running.includes(one) && one.preemptions === 0,
    );
    for (const one of admitted) entries.get(one)!.leftOut = 0;
    const tenants = new Set(stays.map(({ tenant }) => tenant));
    for (const tenant of [...passed.keys()]) if (!tenants.has(tenant)) passed.delete(tenant);
    for (const tenant of tenants) {
      const own = runs.filter((one) => one.tenant === tenant).length;
      if (admitted.some((one) => one.tenant === tenant)) passed.set(tenant, 0);
      else if (own < SHARE)
        passed.set(
          tenant,
          (passed.get(tenant) ?? 0) + admitted.filter((one) => one.preemptions === 0).length,
        );
      // As many as there are places, and one of each other tenant in the line.
      atMost(`past the line of ${tenant}`, passed.get(tenant) ?? 0, FAIR_LIMITS.runningMax + 5);
    }
  };
  const computed = (entry: Entry, tokens: number) => {
    const { request: one, client } = entry;
    entry.computed += tokens;
    if (one.computedCount > one.tokenCount) throw new Error('more than there is');
    if (one.computedCount < one.tokenCount) return false;
    if (entry.generated === client.generated) return true;
    entry.generated++;
    one.tokenCount++;
    return false;
  };

  for (let now = 0; now < steps; now++) {
    countAdmissions(() => {
      clients.forEach((client, i) => {
        if (asksAt[i]! <= now) ask(client, i, now);
      });
      for (const entry of [...entries.values()]) {
        if (entry.request.arrivedAt_ms + (entry.client.patience ?? steps) >= now) continue;
        scheduler.remove(entry.request.requestId);
        end(entry.request, now + entry.client.pause);
      }
    });
    const step = scheduler.schedule();
    if (step === undefined) continue;
    if (step.parts.length === 0) throw new Error('a step of nobody');
    atMost('pages', scheduler.pagesUsed, scheduler.pagesTotal);
    atMost('requests run', scheduler.runningCount, FAIR_LIMITS.runningMax);
    for (const { request: one } of step.parts)
      if (!scheduler.running.includes(one)) throw new Error('it gave its pages back');
    for (const one of step.preempted) entries.get(one)!.computed = 0;
    const present = new Set(step.parts.map((part) => part.request));
    for (const one of running()) {
      const entry = entries.get(one)!;
      entry.leftOut = present.has(one) ? 0 : entry.leftOut + 1;
      // Each place once, and a newcomer for each, for tokens and for prompts.
      atMost(`steps without ${one.requestId}`, entry.leftOut, 2 * FAIR_LIMITS.runningMax + 2);
    }
    countAdmissions(() => {
      for (const part of step.parts) {
        scheduler.update(part);
        const entry = entries.get(part.request)!;
        if (!computed(entry, part.tokens)) continue;
        if (entry.computed !== part.request.tokenCount) throw new Error('a token was computed twice');
        scheduler.remove(part.request.requestId);
        end(part.request, now + entry.client.pause);
      }
      scheduler.charge(step, took_ms());
    });
  }
  for (const one of [...entries.keys()]) scheduler.remove(one.requestId);
  expect([scheduler.runningCount, scheduler.waitingCount, scheduler.pagesUsed]).toEqual([0, 0, 0]);
}

test('whoever comes and goes: pages suffice, every token is computed once, and nobody waits for more than a fair turn', () => {
  fc.assert(
    fc.property(fc.array(anyClient, { minLength: 1, maxLength: 16 }), (clients) =>
      useFor(150, clients, () => 12),
    ),
    { seed: 2511, numRuns: 2000 },
  );
}, 120_000);

test('the times of steps are found by running some; each runs twice, and the faster counts', async () => {
  vi.useFakeTimers({ toFake: ['performance'] });
  try {
    const times = { fixed_ms: 7, row_ms: 2, key_ms: 0.25, pieceKey_ms: 0.5, rowKey_ms: 0.125 };
    const shape: CacheShape = { layerCount: 1, width: 1, contextTokens: 4096, kvType: 'f32' };
    let runs = 0;
    const runner = {
      config: shape,
      newCache: () => new KvCache(shape),
      run: async ({ cache, tokenIds }: RunInput) => {
        const [rows, keys] = [tokenIds.length, cache.length];
        const perKey_ms = rows === 1 ? times.key_ms : times.pieceKey_ms + times.rowKey_ms * rows;
        const stall_ms = [50, 0, 0, 50][runs++ % 4]!;
        await Promise.resolve();
        vi.advanceTimersByTime(times.fixed_ms + times.row_ms * rows + perKey_ms * keys + stall_ms);
      },
    };
    expect(await measureStepTimes(runner as never)).toEqual(times);
  } finally {
    vi.useRealTimers();
  }
});

test('limits that cannot be met are refused at the start', () => {
  expect(() => open({ stepMax_ms: 0 })).toThrow(RangeError);
  expect(() => open({ chunkTokens: 1 })).toThrow(RangeError);
});
