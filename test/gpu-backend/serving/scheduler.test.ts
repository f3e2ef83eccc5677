/** The scheduler alone: requests and token counts, no model. */
import fc from 'fast-check';
import { expect, test } from 'vitest';
import type { ScheduledRequest, SchedulerLimits } from '../../../gpu-backend/serving/scheduler.ts';
import { Scheduler } from '../../../gpu-backend/serving/scheduler.ts';

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
  tokenCount,
  computedCount: 0,
});

function runStep(scheduler: Scheduler): [string, number] | undefined {
  const step = scheduler.schedule();
  if (step === undefined) return undefined;
  scheduler.update(step);
  return [step.request.requestId, step.tokens];
}

test('a long prompt is computed in chunks, and others take turns with it', () => {
  const scheduler = new Scheduler(LIMITS);
  scheduler.add(request('long', 20));
  expect(runStep(scheduler)).toEqual(['long', 8]);
  scheduler.add(request('short', 3));
  expect(runStep(scheduler)).toEqual(['short', 3]);
  expect(runStep(scheduler)).toEqual(['long', 8]);
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
  ).toBe('cbacbacbacba');
  expect(turns(scheduler, 18).match(/a\d/g)).toHaveLength(6);
  expect(new Set(turns(scheduler, 18).match(/a\d/g))).toEqual(new Set(['a1', 'a2', 'a3']));
});

/** As `turns`, on a clock: tenant a's steps take as long as six of the others. */
function turnsOnClock(scheduler: Scheduler, count: number): string {
  return Array.from({ length: count }, () => {
    const [id] = runStep(scheduler)!;
    scheduler.charge(id[0]!, id.startsWith('a') ? 420 : 5);
    return id[0];
  }).join('');
}

test('a step as long as several counts as so many turns', () => {
  const scheduler = new Scheduler({ ...LIMITS, runningMax: 8, waitingMax: 9 });
  endless(scheduler, 'a1', 'a2');
  expect(turnsOnClock(scheduler, 10)).toBe('aaaaaaaaaa');
  // What it had to itself is not held against it: who comes is level with it.
  endless(scheduler, 'b1', 'c1');
  expect(turnsOnClock(scheduler, 27)).toBe('cba' + 'cbcbcbcbcb' + 'a' + 'cbcbcbcbcbcb' + 'a');
});

test('who leaves owing turns and comes back owes them still, as long as the others have not had as many', () => {
  const scheduler = new Scheduler({ ...LIMITS, runningMax: 8, waitingMax: 9 });
  endless(scheduler, 'b1', 'a1');
  expect(turnsOnClock(scheduler, 2)).toBe('ab');
  scheduler.remove('a1');
  endless(scheduler, 'a2');
  expect(turnsOnClock(scheduler, 6)).toBe('bbbbba');
  scheduler.remove('a2');
  expect(turnsOnClock(scheduler, 20)).toBe('b'.repeat(20));
  endless(scheduler, 'a3');
  expect(turnsOnClock(scheduler, 3)).toBe('abb');
  scheduler.remove('a3');
  scheduler.remove('b1');
  endless(scheduler, 'b2', 'a4');
  expect(turnsOnClock(scheduler, 2)).toBe('ab');
});

test('a machine that slept keeps nobody out for long', () => {
  const scheduler = new Scheduler({ ...LIMITS, runningMax: 8, waitingMax: 9 });
  endless(scheduler, 'b1', 'a1');
  runStep(scheduler);
  scheduler.charge('a', 3_600_000);
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
        scheduler.charge(step.request.tenant, entry.step_ms);
      }
      expect([scheduler.runningCount, scheduler.waitingCount]).toEqual([0, 0]);
    }),
  );
});

test('limits that cannot be met are refused at the start', () => {
  expect(() => new Scheduler({ ...LIMITS, chunkTokens: 0 })).toThrow(RangeError);
});
