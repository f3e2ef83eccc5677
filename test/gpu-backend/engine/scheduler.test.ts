/** The scheduler alone: requests and token counts, no model. */
import fc from 'fast-check';
import { expect, test } from 'vitest';
import type { ScheduledRequest, SchedulerLimits } from '../../../gpu-backend/engine/scheduler.ts';
import { Scheduler } from '../../../gpu-backend/engine/scheduler.ts';

const LIMITS: SchedulerLimits = {
  runningMax: 2,
  waitingMax: 3,
  queueTimeout_ms: 1000,
  chunkTokens: 8,
  cacheTokensMax: 100,
};

const request = (
  requestId: string,
  tokenCount: number,
  cacheTokens = tokenCount,
  arrivedAt_ms = 0,
): ScheduledRequest => ({
  requestId,
  // `a2` is tenant a's.
  tenant: /^[a-z](?=\d$)/.exec(requestId)?.[0] ?? '',
  cacheTokens,
  arrivedAt_ms,
  answerSince_ms: arrivedAt_ms,
  tokenCount,
  computedCount: 0,
});

function runStep(scheduler: Scheduler, took_ms = 5): [string, number] | undefined {
  const step = scheduler.schedule();
  if (step === undefined) return undefined;
  scheduler.update(step);
  scheduler.charge(step.request, took_ms);
  return [step.request.requestId, step.tokens];
}

test('a long prompt is computed in chunks, and others take turns with it', () => {
  const scheduler = new Scheduler(LIMITS);
  scheduler.add(request('long', 20));
  expect(runStep(scheduler)).toEqual(['long', 8]);
  scheduler.add(request('short', 3));
  expect(runStep(scheduler)).toEqual(['long', 8]);
  expect(runStep(scheduler)).toEqual(['short', 3]);
  scheduler.remove('short');
  expect(runStep(scheduler)).toEqual(['long', 4]);
});

test('chunks start at multiples of the chunk size whatever happened before', () => {
  const scheduler = new Scheduler(LIMITS);
  const resumed = { ...request('resumed', 20), computedCount: 5 };
  scheduler.add(resumed);
  expect(runStep(scheduler)).toEqual(['resumed', 3]);
  expect(runStep(scheduler)).toEqual(['resumed', 8]);
});

test('a full line answers at once, and gives way when somebody leaves', () => {
  const scheduler = new Scheduler(LIMITS);
  for (const id of ['a', 'b', 'c', 'd', 'e']) scheduler.add(request(id, 1));
  expect(() => scheduler.add(request('f', 1))).toThrow(expect.objectContaining({ code: 'queue_full' }));
  expect([scheduler.runningCount, scheduler.waitingCount]).toEqual([2, 3]);
  scheduler.remove('a');
  expect([scheduler.runningCount, scheduler.waitingCount]).toEqual([2, 2]);
  scheduler.add(request('f', 1));
});

test('cache room is reserved when a request starts, in order of arrival', () => {
  const scheduler = new Scheduler(LIMITS);
  scheduler.add(request('a', 1, 70));
  scheduler.add(request('large', 1, 60));
  scheduler.add(request('small', 1, 10));
  expect(scheduler.runningCount).toBe(1);
  scheduler.remove('a');
  expect([scheduler.runningCount, scheduler.cacheTokensReserved]).toEqual([2, 70]);
  expect(() => scheduler.add(request('never', 1, 101))).toThrow(
    expect.objectContaining({ code: 'context_length_exceeded' }),
  );
});

const turns = (scheduler: Scheduler, count: number) =>
  Array.from({ length: count }, () => runStep(scheduler)![0]).join(' ');

/** Some that never end: each step leaves one more token to compute. */
function endless(scheduler: Scheduler, ...ids: string[]): void {
  for (const id of ids) scheduler.add(request(id, 8000, 1));
}

test('tenants take turns, and so do the requests of one', () => {
  const scheduler = new Scheduler({ ...LIMITS, runningMax: 8, waitingMax: 9 });
  endless(scheduler, 'a1', 'a2', 'a3', 'b1', 'c1', 'c2');
  expect(
    turns(scheduler, 12)
      .split(' ')
      .map(([tenant]) => tenant)
      .join(''),
  ).toBe('abcabcabcabc');
  expect(turns(scheduler, 18).match(/a\d/g)).toHaveLength(6);
  expect(new Set(turns(scheduler, 18).match(/a\d/g))).toEqual(new Set(['a1', 'a2', 'a3']));
});

/** As `turns`, on a clock: tenant a's steps take as long as six of the others. */
const turnsOnClock = (scheduler: Scheduler, count: number): string =>
  Array.from({ length: count }, () => {
    const tenant = scheduler.next!.tenant;
    runStep(scheduler, tenant === 'a' ? 420 : 5);
    return tenant;
  }).join('');

test('a step as long as several counts as so many turns', () => {
  const scheduler = new Scheduler({ ...LIMITS, runningMax: 8, waitingMax: 9 });
  endless(scheduler, 'a1', 'a2');
  expect(turnsOnClock(scheduler, 10)).toBe('aaaaaaaaaa');
  // What it had to itself is not held against it, but for its last step.
  endless(scheduler, 'b1', 'c1');
  expect(turnsOnClock(scheduler, 25)).toBe('bcbcbcbcbcb' + 'a' + 'cbcbcbcbcbcb' + 'a');
});

test('who leaves owing turns and comes back owes them still, as long as the others have not had as many', () => {
  const scheduler = new Scheduler({ ...LIMITS, runningMax: 8, waitingMax: 9 });
  endless(scheduler, 'b1', 'a1');
  expect(turnsOnClock(scheduler, 2)).toBe('ba');
  scheduler.remove('a1');
  endless(scheduler, 'a2');
  expect(turnsOnClock(scheduler, 7)).toBe('bbbbbba');
  scheduler.remove('a2');
  expect(turnsOnClock(scheduler, 20)).toBe('b'.repeat(20));
  endless(scheduler, 'a3');
  expect(turnsOnClock(scheduler, 3)).toBe('abb');
  scheduler.remove('a3');
  scheduler.remove('b1');
  endless(scheduler, 'a4', 'b2');
  expect(turnsOnClock(scheduler, 2)).toBe('ab');
});

test('a machine that slept keeps nobody out for long', () => {
  const scheduler = new Scheduler({ ...LIMITS, runningMax: 8, waitingMax: 9 });
  endless(scheduler, 'b1', 'a1');
  runStep(scheduler);
  scheduler.charge(scheduler.schedule()!.request, 3_600_000);
  expect(turns(scheduler, 1)).toBe('b1');
  expect(turnsOnClock(scheduler, 40)).toContain('a');
});

test('a flood of one tenant leaves places to the others, and who waits of them is next', () => {
  const scheduler = new Scheduler({ ...LIMITS, runningMax: 4, waitingMax: 9 });
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
  const scheduler = new Scheduler({ ...LIMITS, runningMax: 1, waitingMax: 3 });
  endless(scheduler, 'a1', 'a2', 'a3', 'a4');
  expect(() => scheduler.add(request('a5', 1))).toThrow(expect.objectContaining({ code: 'queue_full' }));
  expect(scheduler.add(request('b1', 1))?.requestId).toBe('a4');
  expect(scheduler.add(request('c1', 1))?.requestId).toBe('a3');
  expect(() => scheduler.add(request('c2', 1))).toThrow(expect.objectContaining({ code: 'queue_full' }));
  expect([scheduler.runningCount, scheduler.waitingCount]).toEqual([1, 3]);
});

test('who waited too long is taken out; who runs is not', () => {
  const scheduler = new Scheduler(LIMITS);
  for (const id of ['a', 'b', 'late']) scheduler.add(request(id, 1, 1, 0));
  scheduler.add(request('fresh', 1, 1, 900));
  expect(scheduler.expire(1001).map((late) => late.requestId)).toEqual(['late']);
  expect([scheduler.runningCount, scheduler.waitingCount]).toEqual([2, 1]);
});

test('newcomers of a tenant, however fast they come, cost its older request little more than a turn each', () => {
  const scheduler = new Scheduler({ ...LIMITS, runningMax: 8, waitingMax: 99 });
  endless(scheduler, 'a0');
  const ids = Array.from({ length: 4 }, (_, i) => `a${i + 1}`);
  for (const id of ids) scheduler.add(request(id, 1));
  const seen: string[] = [];
  for (let step = 0; step < 100; step++) {
    const [id] = runStep(scheduler)!;
    seen.push(id);
    if (id === 'a0') continue;
    scheduler.remove(id);
    scheduler.add(request(id, 1));
  }
  // One turn of six: four clients, and one of them again.
  expect(seen.filter((id) => id === 'a0').length).toBeGreaterThanOrEqual(16);
});

test('a newcomer is next, unless another one was next in the same round', () => {
  const scheduler = new Scheduler({ ...LIMITS, runningMax: 8, waitingMax: 9 });
  endless(scheduler, 'a1', 'a2', 'a3');
  turns(scheduler, 7);
  scheduler.add(request('a4', 1));
  scheduler.add(request('a5', 1));
  const next = turns(scheduler, 5).split(' ');
  expect(next[0]).toBe('a4');
  expect(next.indexOf('a5')).toBeGreaterThan(1);
});

test('tenants that come for one step each cost an older request little more than a turn each', () => {
  const scheduler = new Scheduler({ ...LIMITS, runningMax: 3, waitingMax: 9 });
  endless(scheduler, 'a1');
  for (const id of ['b1', 'c1']) scheduler.add(request(id, 1));
  let others = 0;
  for (let step = 0; step < 60; step++) {
    const { request: next } = scheduler.schedule()!;
    // As the engine does: who is done leaves, the next comes, and then the step is charged.
    if (next.requestId === 'a1') others = 0;
    else {
      expect(++others).toBeLessThanOrEqual(4);
      scheduler.remove(next.requestId);
      scheduler.add(request(`${'bcdefgh'[step % 7]}1`, 1));
    }
    scheduler.charge(next, 5);
  }
});

test("a tenant's second request gets its place, though tenants with none keep coming", () => {
  const scheduler = new Scheduler({ ...LIMITS, runningMax: 4, waitingMax: 99 });
  endless(scheduler, 'a1');
  for (const id of ['b1', 'c1', 'd1']) scheduler.add(request(id, 1));
  const second = request('a2', 8000, 1);
  scheduler.add(second);
  for (const id of ['e1', 'f1', 'g1']) scheduler.add(request(id, 1));
  let passed = 0;
  while (!scheduler.isRunning(second)) {
    const [id] = runStep(scheduler)!;
    if (id === 'a1') continue;
    expect(++passed).toBeLessThanOrEqual(5);
    scheduler.remove(id);
    scheduler.add(request(id, 1));
  }
});

test('in a full line a choice of an older answer goes before newcomers, of its tenant and of others', () => {
  const scheduler = new Scheduler({ ...LIMITS, runningMax: 1, waitingMax: 2 });
  endless(scheduler, 'r1');
  const since = (id: string, answerSince_ms: number) => ({ ...request(id, 1, 1, 50), answerSince_ms });
  scheduler.add(since('a1', 40));
  scheduler.add(since('b1', 30));
  expect(() => scheduler.add(since('a2', 41))).toThrow(expect.objectContaining({ code: 'queue_full' }));
  expect(scheduler.add(since('a3', 10))?.requestId).toBe('a1');
  expect(scheduler.add(since('c1', 20))?.requestId).toBe('b1');
  expect(() => scheduler.add(since('d1', 50))).toThrow(expect.objectContaining({ code: 'queue_full' }));
});

test('whatever comes and goes: bounds hold, nobody starves, every token is computed once', () => {
  const arrivals = fc.array(
    fc.record({
      tokens: fc.integer({ min: 1, max: 40 }),
      generated: fc.integer({ min: 0, max: 10 }),
      cancelledAfter: fc.option(fc.nat(20)),
      step_ms: fc.integer({ min: 1, max: 1000 }),
    }),
    { minLength: 1, maxLength: 12 },
  );
  fc.assert(
    fc.property(arrivals, (wanted) => {
      const scheduler = new Scheduler({ ...LIMITS, waitingMax: 12 });
      const left = new Map(wanted.map((entry, i) => [`r${i}`, { ...entry, steps: 0, computed: 0 }]));
      for (const [id, { tokens, generated }] of left) scheduler.add(request(id, tokens, tokens + generated));
      for (let turn = 0; left.size > 0; turn++) {
        if (turn > 2000) throw new Error('somebody starves');
        const step = scheduler.schedule()!;
        const entry = left.get(step.request.requestId)!;
        expect(scheduler.runningCount).toBeLessThanOrEqual(LIMITS.runningMax);
        expect(scheduler.cacheTokensReserved).toBeLessThanOrEqual(LIMITS.cacheTokensMax);
        expect(step.tokens).toBeGreaterThan(0);
        expect(step.tokens).toBeLessThanOrEqual(LIMITS.chunkTokens);
        scheduler.update(step);
        entry.steps++;
        entry.computed += step.tokens;
        const whole = step.request.computedCount === step.request.tokenCount;
        const done = whole && step.request.tokenCount === entry.tokens + entry.generated;
        if (whole && !done) step.request.tokenCount++;
        if (done) expect(entry.computed).toBe(entry.tokens + entry.generated);
        if (done || entry.steps === entry.cancelledAfter) {
          scheduler.remove(step.request.requestId);
          left.delete(step.request.requestId);
        }
        scheduler.charge(step.request, entry.step_ms);
      }
      expect([scheduler.runningCount, scheduler.waitingCount]).toEqual([0, 0]);
    }),
  );
});

type Client = {
  readonly tenant: string;
  readonly tokens: number;
  readonly generated: number;
  /** Steps between its answer and its next request: with 0 it asks again at once. */
  readonly pause: number;
  /** Its requests come while a step is computed, not between two. */
  readonly comesDuring: boolean;
  /** It leaves after so many steps of the engine. */
  readonly patience: number | undefined;
  readonly step_ms: number;
};

const anyClient: fc.Arbitrary<Client> = fc.record({
  tenant: fc.constantFrom('a', 'b', 'c', 'd', 'e', 'f'),
  tokens: fc.oneof(fc.constant(1), fc.integer({ min: 1, max: 40 })),
  generated: fc.oneof(fc.constant(0), fc.integer({ min: 0, max: 10 }), fc.constant(2000)),
  pause: fc.oneof(fc.constant(0), fc.nat(6)),
  comesDuring: fc.boolean(),
  patience: fc.option(fc.nat(60), { nil: undefined, freq: 4 }),
  step_ms: fc.oneof(fc.constant(5), fc.integer({ min: 1, max: 400 }), fc.constant(60_000)),
});

/** What a request that runs has waited for since its last step, or since it got its place. */
type Wait = {
  /** Steps of its tenant's other requests, and of other tenants. */
  own: number;
  others: number;
  /** What its own last step counted as, and all of its tenant's since. */
  turns: number;
  /** The most that ran beside it at a time: requests of its tenant, and other tenants. */
  ownBeside: number;
  tenantsBeside: number;
};

const FAIR_LIMITS = { ...LIMITS, runningMax: 5, waitingMax: 7, cacheTokensMax: 10_000 };
const SHARE = Math.ceil(0.75 * FAIR_LIMITS.runningMax);

/** Plainer than `expect`, which takes most of the time where so much is checked. */
function atMost(what: string, count: number, limit: number): void {
  if (count > limit) throw new Error(`${count} ${what}, of at most ${limit}`);
}

/** A machine that clients use for some steps. Every step checks how long everybody has waited. */
function useFor(steps: number, clients: readonly Client[]): void {
  const scheduler = new Scheduler(FAIR_LIMITS);
  type Entry = { readonly client: Client; readonly request: ScheduledRequest; left: number };
  const entries = new Map<string, Entry>();
  const asksAt = clients.map((_, i) => i % 3);
  const waits = new Map<ScheduledRequest, Wait>();
  const lastTurns = new Map<string, number>();
  /** Of a tenant with a request in the line: requests of others that got a place since its own last one did. */
  const passed = new Map<string, number>();
  let now = 0;

  const end = (id: string) => {
    const { client } = entries.get(id)!;
    entries.delete(id);
    asksAt[clients.indexOf(client)] = now + client.pause;
  };
  const ask = (client: Client, index: number) => {
    const { tenant, tokens, generated } = client;
    const id = `${tenant}.${index}.${now}`;
    const asked = { ...request(id, tokens, tokens + generated, now), tenant };
    asksAt[index] = Number.POSITIVE_INFINITY;
    entries.set(id, { client, request: asked, left: generated });
    try {
      const displaced = scheduler.add(asked);
      if (displaced !== undefined) end(displaced.requestId);
    } catch {
      end(id);
      asksAt[index] = now + 1;
    }
  };
  const running = () =>
    [...entries.values()].map((entry) => entry.request).filter((one) => scheduler.isRunning(one));
  const waiting = () =>
    [...entries.values()].map((entry) => entry.request).filter((one) => !scheduler.isRunning(one));

  /** Who got a place, in the order of their tenant's line, and whom they went past. */
  const countAdmissions = (act: () => void) => {
    const [before, line] = [new Set(running()), waiting()];
    act();
    const runs = running();
    const admitted = runs.filter((one) => !before.has(one));
    const stays = waiting();
    for (const one of admitted) {
      const ahead = line.slice(0, Math.max(0, line.indexOf(one)));
      const overtaken = ahead.some((other) => other.tenant === one.tenant && stays.includes(other));
      if (overtaken) throw new Error(`${one.requestId} overtook one of its tenant`);
      waits.set(one, {
        ...{ own: 0, others: 0, turns: lastTurns.get(one.tenant) ?? 1 },
        ...{ ownBeside: 0, tenantsBeside: 0 },
      });
    }
    const tenants = new Set(stays.map(({ tenant }) => tenant));
    for (const tenant of [...passed.keys()]) if (!tenants.has(tenant)) passed.delete(tenant);
    for (const tenant of tenants) {
      const own = runs.filter((one) => one.tenant === tenant).length;
      if (admitted.some((one) => one.tenant === tenant)) passed.set(tenant, 0);
      else if (own < SHARE) passed.set(tenant, (passed.get(tenant) ?? 0) + admitted.length);
      // As many as there are places, and one of each other tenant in the line.
      atMost(`past the line of ${tenant}`, passed.get(tenant) ?? 0, FAIR_LIMITS.runningMax + 5);
    }
    for (const one of runs) {
      const wait = waits.get(one)!;
      const beside = new Set(runs.map(({ tenant }) => tenant)).size - 1;
      wait.tenantsBeside = Math.max(wait.tenantsBeside, beside);
      wait.ownBeside = Math.max(
        wait.ownBeside,
        runs.filter(({ tenant }) => tenant === one.tenant).length - 1,
      );
      atMost(`own steps before ${one.requestId}`, wait.own, wait.ownBeside + 2);
      atMost(`others' steps before ${one.requestId}`, wait.others, wait.turns * (wait.tenantsBeside + 2));
    }
  };

  for (now = 0; now < steps; now++) {
    countAdmissions(() => {
      clients.forEach((client, i) => {
        if (!client.comesDuring && asksAt[i]! <= now) ask(client, i);
      });
      for (const [id, entry] of entries) {
        if (entry.request.arrivedAt_ms + (entry.client.patience ?? steps) >= now) continue;
        scheduler.remove(id);
        end(id);
      }
    });
    const step = scheduler.schedule();
    countAdmissions(() => {
      clients.forEach((client, i) => {
        if (client.comesDuring && asksAt[i]! <= now) ask(client, i);
      });
    });
    if (step === undefined) continue;
    const { request: one } = step;
    const entry = entries.get(one.requestId)!;
    const turns = Math.min(Math.max(1, Math.round(entry.client.step_ms / 70)), 32);
    countAdmissions(() => {
      scheduler.update(step);
      lastTurns.set(one.tenant, turns);
      for (const [other, wait] of waits) {
        if (other.tenant !== one.tenant) wait.others++;
        else {
          wait.own++;
          wait.turns += turns;
        }
      }
      Object.assign(waits.get(one)!, {
        own: 0,
        others: 0,
        turns,
        ownBeside: 0,
        tenantsBeside: 0,
      });
      if (one.computedCount === one.tokenCount && entry.left-- > 0) one.tokenCount++;
      else if (one.computedCount === one.tokenCount) {
        scheduler.remove(one.requestId);
        end(one.requestId);
      }
      scheduler.charge(one, entry.client.step_ms);
    });
    for (const gone of [...waits.keys()]) if (!entries.has(gone.requestId)) waits.delete(gone);
  }
}

test('whoever comes and goes, nobody waits for more than a fair turn, and nobody for more than a fair place', () => {
  fc.assert(
    fc.property(fc.array(anyClient, { minLength: 1, maxLength: 16 }), (clients) => useFor(150, clients)),
    { seed: 2511, numRuns: 300 },
  );
});

test('limits that cannot be met are refused at the start', () => {
  expect(() => new Scheduler({ ...LIMITS, chunkTokens: 0 })).toThrow(RangeError);
});
