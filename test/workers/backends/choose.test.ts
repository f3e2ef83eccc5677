/** The rules by which backends are chosen, left alone and asked again, each on its own. */
import { describe, expect, it } from 'vitest';
import { formatLoad, type LoadReport, parseLoad } from '../../../shared/wire/backend-load.ts';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import type { Attempted } from '../../../workers/backends/attempt.ts';
import { Breaker, Observed } from '../../../workers/backends/backend-state.ts';
import {
  type Called,
  callBackend,
  hedged,
  type Purpose,
  pause,
  retryDelay_ms,
} from '../../../workers/backends/call-backend.ts';
import {
  affinityOf,
  type Candidate,
  homeOf,
  type MaskNeeds,
  orderBackends,
  pagesKey,
  regionDistance,
} from '../../../workers/backends/choose.ts';
import { createSteadyClock, steadyNow_ms } from '../../../workers/base/waiting.ts';

const candidate = (id: string, change: Partial<Candidate> = {}): Candidate => ({
  id,
  regions: ['*'],
  weight: 1,
  load: 0,
  waiting: 0,
  isAway: false,
  models: undefined,
  ...change,
});
const wish = (key: string, region = 'local', model?: string, needs?: MaskNeeds) => ({
  key,
  region,
  model,
  needs,
});
const ids = (candidates: readonly Candidate[]) => candidates.map(({ id }) => id);

describe('the order of backends', () => {
  it('is by region first: data centre, country, continent, everywhere, elsewhere', () => {
    const backends = [
      candidate('us', { regions: ['NA'] }),
      candidate('all'),
      candidate('europe', { regions: ['EU'] }),
      candidate('germany', { regions: ['DE', 'AT'] }),
      candidate('frankfurt', { regions: ['FRA'] }),
    ];
    expect(ids(orderBackends(backends, wish('m', 'EU/DE/FRA')))).toEqual([
      'frankfurt',
      'germany',
      'europe',
      'all',
      'us',
    ]);
    expect(ids(orderBackends(backends, wish('m', 'NA/US/DFW'))).slice(0, 2)).toEqual(['us', 'all']);
    expect(ids(orderBackends(backends, wish('m'))).at(0)).toBe('all');
    expect(regionDistance(['DE'], 'DE')).toBe(0);
  });

  const KEYS = Array.from({ length: 4000 }, (_, i) => `conversation ${i}`);

  it('gives a conversation the same backend, and shares by weight', () => {
    const backends = [candidate('a'), candidate('b'), candidate('c', { weight: 2 })];
    const home = (key: string, some = backends) => orderBackends(some, wish(key))[0]!.id;
    const share = (id: string) => KEYS.filter((key) => home(key) === id).length / KEYS.length;
    expect(share('a')).toBeCloseTo(0.25, 1);
    expect(share('b')).toBeCloseTo(0.25, 1);
    expect(share('c')).toBeCloseTo(0.5, 1);
    const reversed = backends.toReversed();
    for (const key of KEYS.slice(0, 100)) expect(home(key, reversed)).toBe(home(key));
  });

  it('moves only the share of a backend that comes or goes', () => {
    const four = ['a', 'b', 'c', 'd'].map((id) => candidate(id));
    const five = [...four, candidate('e')];
    let moved = 0;
    for (const key of KEYS) {
      const [before, after] = [homeOf(four, wish(key)), homeOf(five, wish(key))];
      if (before === after) continue;
      moved++;
      // Nobody moves between backends that were there before.
      expect(after).toBe('e');
    }
    expect(moved / KEYS.length).toBeCloseTo(1 / 5, 1);
  });

  it('passes over who has a line or too much load, and says so', () => {
    const key = 'conversation';
    const order = ids(orderBackends([candidate('a'), candidate('b')], wish(key)));
    const [first, second] = [candidate(order[0]!), candidate(order[1]!)];
    const affinity = (...candidates: Candidate[]) => {
      const home = homeOf(candidates, wish(key));
      const chosen = orderBackends(candidates, wish(key))[0]!.id;
      return affinityOf(chosen, home, chosen !== home);
    };
    const change = (one: Candidate, what: Partial<Candidate>) => ({ ...one, ...what });
    expect(affinity(first, second)).toBe('hit');
    expect(affinity(change(first, { waiting: 1, load: 9 }), second)).toBe('overflow');
    expect(affinity(change(first, { load: 3 }), second)).toBe('overflow');
    expect(affinity(change(first, { load: 1 }), second)).toBe('hit');
    // With three, one request is more than the average and a quarter; it is no reason to compute pages anew.
    const three = [...order, 'c'].map((id) => candidate(id));
    const [home, ...others] = ids(orderBackends(three, wish(key))).map((id) => candidate(id));
    expect(affinity(change(home!, { load: 1 }), ...others)).toBe('hit');
    expect(affinity(change(home!, { load: 2 }), ...others)).toBe('overflow');
    const bothFull = [change(first, { waiting: 5, load: 13 }), change(second, { waiting: 2, load: 10 })];
    expect(ids(orderBackends(bothFull, wish(key)))[0]).toBe(second.id);
    expect(homeOf([first], wish(key))).toBeUndefined();
    expect(affinityOf(first.id, undefined, false)).toBeUndefined();
    expect(affinityOf(second.id, first.id, false)).toBe('failover');
  });

  it('keeps every load within a quarter above the average, however hot one conversation is', () => {
    const loads = new Map(['a', 'b', 'c', 'd'].map((id) => [id, 0]));
    for (let i = 0; i < 400; i++) {
      // Nine of ten requests are of one conversation.
      const key = i % 10 === 0 ? KEYS[i]! : KEYS[0]!;
      const candidates = [...loads].map(([id, load]) => candidate(id, { load }));
      const { id } = orderBackends(candidates, wish(key))[0]!;
      loads.set(id, loads.get(id)! + 1);
      const bound = Math.max(2, Math.ceil(1.25 * (i + 1) * (1 / 4)));
      for (const load of loads.values()) expect(load).toBeLessThanOrEqual(bound);
    }
  });

  it('is by what pages are kept by: tenant, mask, and the opening that all turns repeat', () => {
    const turn = (...contents: string[]) => ({
      kind: 'chat' as const,
      body: {
        messages: contents.map((content, i) => ({
          role: i % 2 === 0 ? ('user' as const) : ('assistant' as const),
          content,
        })),
      },
    });
    const key = pagesKey('t', 'm', turn('hello'));
    expect(pagesKey('t', 'm', turn('hello', 'hi', 'how are you?'))).toBe(key);
    const others = [
      pagesKey('u', 'm', turn('hello')),
      pagesKey('t', 'dense', turn('hello')),
      pagesKey('t', 'm', turn('good day')),
    ];
    expect(new Set([key, ...others]).size).toBe(4);
  });

  it('leaves out who is known to serve another model, unless nobody else is there', () => {
    const backends = [
      candidate('x', { models: new Map([['other', undefined]]) }),
      candidate('y', { models: new Map([['mine', undefined]]) }),
      candidate('z'),
    ];
    expect(ids(orderBackends(backends, wish('m', 'local', 'mine'))).toSorted()).toEqual(['y', 'z']);
    expect(orderBackends([backends[0]!, backends[1]!], wish('m', 'local', 'third'))).toHaveLength(2);
    expect(orderBackends([], wish('m'))).toEqual([]);
  });
});

describe('where backends serve different weights under one name', () => {
  const serving = (hash: string, surrogates: string | null = null) => {
    const served = { hash, surrogates, block_count: 2, context_tokens: 8, dense: true };
    return new Map([['mine', served]]);
  };
  const needs = { modelHash: 'old', surrogates: undefined };
  const first = (candidates: readonly Candidate[], wanted: MaskNeeds | undefined = needs) =>
    ids(orderBackends(candidates, wish('m', 'EU/DE/FRA', 'mine', wanted)))[0];
  const near = candidate('near', { regions: ['FRA'], models: serving('new') });
  const far = candidate('far', { models: serving('old') });

  it('a mask goes to those that can use it, wherever they are; dense goes to the nearest', () => {
    expect(first([near, far])).toBe('far');
    expect(first([near, far], { modelHash: 'other', surrogates: undefined })).toBe('near');
    expect(ids(orderBackends([near, far], wish('m', 'EU/DE/FRA', 'mine')))).toEqual(['near', 'far']);
    expect(homeOf([near, far], wish('m', 'EU/DE/FRA', 'mine', needs))).toBe('far');
  });

  it('a mask with surrogates goes to those that have them', () => {
    const table = candidate('table', { models: serving('old', 's_1') });
    expect(first([{ ...near, models: serving('old') }, table], { ...needs, surrogates: 's_1' })).toBe(
      'table',
    );
  });

  it('a backend where requests wait, or that is away, is no better than the others', () => {
    expect(first([near, { ...far, waiting: 1 }])).toBe('near');
    expect(first([near, { ...far, isAway: true }])).toBe('near');
  });

  it('a backend that does not say what it serves is asked', () => {
    expect(first([candidate('silent', { regions: ['FRA'] }), near, far])).toBe('silent');
  });
});

describe('a backend that drains', () => {
  it('comes behind all that do not, wherever they are and however full, and is the last resort', () => {
    const draining = { isAway: true };
    const backends = [
      candidate('near', { regions: ['FRA'], ...draining }),
      candidate('full', { regions: ['EU'], waiting: 9, load: 20 }),
      candidate('all', draining),
      candidate('us', { regions: ['NA'] }),
    ];
    expect(ids(orderBackends(backends, wish('m', 'EU/DE/FRA')))).toEqual(['full', 'us', 'near', 'all']);
    expect(ids(orderBackends([backends[0]!], wish('m')))).toEqual(['near']);
  });

  it('is no part of the others’ average', () => {
    const [home, other] = ids(orderBackends([candidate('a'), candidate('b')], wish('m')));
    const loaded = [candidate(home!, { load: 5 }), candidate(other!, { load: 4 })];
    const first = (isAway: boolean) =>
      ids(orderBackends([...loaded, candidate('idle', { isAway })], wish('m')))[0];
    expect(first(true)).toBe(home);
    expect(first(false)).not.toBe(home);
  });

  const report = (draining: boolean): LoadReport => ({
    object: 'maskroute.load',
    model: 'm',
    running: 0,
    waiting: 0,
    capacity: 64,
    draining,
  });

  it('is known for ten seconds after its last word, and no longer than it drains', () => {
    const seen = new Observed();
    const now_ms = steadyNow_ms();
    expect(seen.isDraining(steadyNow_ms())).toBe(false);
    seen.probed(report(true), now_ms - 9_000);
    expect(seen.isDraining(steadyNow_ms())).toBe(true);
    seen.probed(report(false), now_ms);
    expect(seen.isDraining(steadyNow_ms())).toBe(false);
    seen.drains(true, now_ms);
    expect(seen.isDraining(steadyNow_ms())).toBe(true);
    seen.drains(false, now_ms);
    expect(seen.isDraining(steadyNow_ms())).toBe(false);
    seen.drains(true, now_ms - 10_000);
    expect(seen.isDraining(steadyNow_ms())).toBe(false);
  });
});

it('a backend that says nothing is away for ten seconds, or until it says something', () => {
  const seen = new Observed();
  const now_ms = steadyNow_ms();
  seen.silent(now_ms);
  expect([seen.isAway(now_ms), seen.isDraining(now_ms)]).toEqual([true, false]);
  expect(seen.isAway(now_ms + 10_000)).toBe(false);
  seen.reported({ running: 0, waiting: 0, capacity: 64 }, now_ms);
  expect(seen.isAway(now_ms)).toBe(false);
});

describe('a request that the platform ends with its client', () => {
  it('is under way no longer than its backend had', () => {
    const seen = new Observed();
    const now_ms = steadyNow_ms();
    const ended = seen.began(1_000);
    seen.began(1_000);
    expect(seen.load(now_ms)).toBe(2);
    ended();
    ended();
    expect([seen.load(now_ms), seen.summary(now_ms).in_flight]).toEqual([1, 1]);
    expect([seen.load(now_ms + 2_000), seen.summary(now_ms + 2_000).in_flight]).toEqual([0, 0]);
  });
});

describe('the breaker', () => {
  const failed = (breaker: Breaker, times: number, unreachable = false) => {
    for (let i = 0; i < times; i++) breaker.failed(0, unreachable);
  };

  it('opens after failures in a row, lets one through after a while, and closes after successes', () => {
    const breaker = new Breaker();
    failed(breaker, 4);
    breaker.succeeded();
    failed(breaker, 4);
    expect(breaker.state(0)).toBe('closed');
    failed(breaker, 1);
    expect([breaker.state(0), breaker.admits(29_999), breaker.wait_ms(10_000)]).toEqual([
      ...['open', false, 20_000],
    ]);
    expect(breaker.state(30_000)).toBe('half_open');
    expect([breaker.admit(30_000), breaker.admit(30_001)]).toEqual([true, false]);
    breaker.succeeded();
    expect([breaker.state(30_002), breaker.admit(30_002)]).toEqual(['half_open', true]);
    breaker.succeeded();
    expect(breaker.state(30_003)).toBe('closed');
  });

  it('opens again when the trial fails, and gives up a trial that says nothing', () => {
    const breaker = new Breaker();
    failed(breaker, 5);
    expect(breaker.admit(30_000)).toBe(true);
    breaker.failed(31_000, false);
    expect([breaker.state(31_000), breaker.wait_ms(31_000)]).toEqual(['open', 30_000]);
    expect(breaker.admit(61_000)).toBe(true);
    expect([breaker.admit(90_999), breaker.admit(91_000)]).toEqual([false, true]);
    breaker.released();
    expect(breaker.admit(91_001)).toBe(true);
  });

  it('hears that an unreachable backend is back, but takes no such word for one that answered wrongly', () => {
    const [gone, wrong] = [new Breaker(), new Breaker()];
    failed(gone, 5, true);
    failed(wrong, 5);
    gone.heard();
    wrong.heard();
    expect([gone.state(1), wrong.state(1)]).toEqual(['half_open', 'open']);
    gone.heard();
    expect(gone.state(1)).toBe('closed');
  });
});

it('a backend’s state lasts for no longer when the clock is set back by an hour', () => {
  const HOUR_ms = 3_600_000;
  let system_ms = 10 * HOUR_ms;
  const now_ms = createSteadyClock(() => system_ms);
  const seen = new Observed();
  for (let i = 0; i < 5; i++) seen.breaker.failed(now_ms(), false);
  seen.silent(now_ms());
  seen.drains(true, now_ms());
  expect(seen.takeProbe(now_ms())).toBe(true);
  system_ms -= HOUR_ms;
  expect([seen.breaker.state(now_ms()), seen.breaker.wait_ms(now_ms())]).toEqual(['open', 30_000]);
  system_ms += 30_000;
  expect([seen.breaker.state(now_ms()), seen.isAway(now_ms())]).toEqual(['half_open', false]);
  expect(seen.takeProbe(now_ms())).toBe(true);
});

describe('asking again', () => {
  it('waits 50 ms, then twice as long each time up to 5 s, give or take a tenth', () => {
    const waits = Array.from({ length: 9 }, (_, retry) => retryDelay_ms(retry, 0.5));
    expect(waits).toEqual([50, 100, 200, 400, 800, 1600, 3200, 5000, 5000]);
    expect([retryDelay_ms(0, 0), retryDelay_ms(0, 1)]).toEqual([45, 55].map((ms) => expect.closeTo(ms, 9)));
  });

  it('ends its pause when the client hangs up', async () => {
    const HOUR_ms = 3_600_000;
    await expect(pause(HOUR_ms, AbortSignal.timeout(20))).rejects.toMatchObject({ code: 'cancelled' });
    await expect(pause(HOUR_ms, AbortSignal.abort())).rejects.toMatchObject({ code: 'cancelled' });
  });
});

describe('hedging', () => {
  type Named = Attempted & { name: string };
  const asker =
    (name: string, after_ms: number, kind: 'answer' | 'cancelled', seen: string[]) => (signal: AbortSignal) =>
      new Promise<Named>((resolve) => {
        seen.push(name);
        const timer = setTimeout(() => resolve(outcome(kind, name)), after_ms);
        signal.addEventListener('abort', () => {
          seen.push(`${name} off`);
          clearTimeout(timer);
          resolve(outcome('cancelled', name));
        });
      });
  const outcome = (kind: 'answer' | 'cancelled', name: string): Named =>
    kind === 'answer' ? { kind, response: new Response(), rest: undefined, name } : { kind, name };
  const run = async (
    first: [number, 'answer' | 'cancelled'],
    second: [number, 'answer' | 'cancelled'],
    after_ms: number,
  ) => {
    const seen: string[] = [];
    const { signal } = new AbortController();
    const { name } = await hedged(asker('a', ...first, seen), asker('b', ...second, seen), after_ms, signal);
    return [name, ...seen];
  };

  it('asks nobody else when the first is quick or hedging is off', async () => {
    expect(await run([5, 'answer'], [5, 'answer'], 200)).toEqual(['a', 'a']);
    expect(await run([30, 'answer'], [1, 'answer'], 0)).toEqual(['a', 'a']);
  });

  it('takes the first answer and calls the other off', async () => {
    expect(await run([400, 'answer'], [10, 'answer'], 10)).toEqual(['b', 'a', 'b', 'a off']);
    expect(await run([40, 'answer'], [400, 'answer'], 10)).toEqual(['a', 'a', 'b', 'b off']);
  });

  it('waits for the other when one fails', async () => {
    expect((await run([30, 'cancelled'], [60, 'answer'], 10))[0]).toBe('b');
    expect((await run([60, 'answer'], [20, 'cancelled'], 10))[0]).toBe('a');
  });
});

describe('a request to backends', () => {
  const COMPLETION: Purpose = {
    kind: 'completion',
    region: 'EU',
    model: 'm',
    mask: 'dense',
    needs: undefined,
    conversation: { kind: 'chat', body: { messages: [] } },
  };
  const ASIDE: Purpose = { kind: 'aside', region: 'EU' };
  const backend = (id: string, regions: readonly string[] = ['*']) => ({
    id,
    regions,
    url: `https://${id}.test`,
    weight: 1,
    seen: new Observed(),
  });
  const openFor = (seen: Observed, since_ms: number) => {
    for (let i = 0; i < 5; i++) seen.breaker.failed(steadyNow_ms() - since_ms, false);
  };
  const HALF_OPEN_ms = 30_001;
  /** Who was asked in turn, and what came of it. */
  async function ask(
    backends: readonly ReturnType<typeof backend>[],
    purpose: Purpose,
    answer: () => Promise<Response> | Response,
    hedge_ms = 0,
  ): Promise<{ asked: string[]; called: Called }> {
    const asked: string[] = [];
    const parts = {
      send: async (url: string) => {
        asked.push(new URL(url).hostname.replace('.test', ''));
        return await answer();
      },
      token: async () => 'token',
      suspect: async () => {},
      hedge_ms,
    };
    const called = await callBackend(
      parts,
      {
        request: { path: '/v1/x', requestId: 'r', tenant: 't', body: '{}' },
        purpose,
        time: { timeout_ms: 5_000, isFullTime: true },
        retries: { left: 4 },
        signal: new AbortController().signal,
        hold: () => {},
      },
      backends,
    );
    return { asked, called };
  }
  const good = () => Response.json({});
  const slow = async () => {
    await new Promise((resolve) => setTimeout(resolve, 100));
    return good();
  };

  it('asks a second one for a silent one, but no half-open one, whose only trial that would take', async () => {
    const [near, far] = [backend('near', ['EU']), backend('far', ['NA'])];
    expect((await ask([near, far], COMPLETION, slow, 10)).asked).toEqual(['near', 'far']);
    openFor(far.seen, HALF_OPEN_ms);
    expect((await ask([near, far], COMPLETION, slow, 10)).asked).toEqual(['near']);
    expect(far.seen.breaker.admits(steadyNow_ms())).toBe(true);
  });

  it('that is no completion asks a half-open backend, and leaves the only trial to a completion', async () => {
    const one = backend('one');
    openFor(one.seen, HALF_OPEN_ms);
    const asking = ask([one], ASIDE, slow);
    expect(one.seen.breaker.admits(steadyNow_ms())).toBe(true);
    expect((await asking).asked).toEqual(['one']);
    const completing = ask([one], COMPLETION, slow);
    expect(one.seen.breaker.admits(steadyNow_ms())).toBe(false);
    expect((await completing).called.kind).toBe('answer');
  });

  it('that is no completion opens and closes no breaker', async () => {
    const one = backend('one');
    for (let i = 0; i < 6; i++) await ask([one], ASIDE, () => new Response('<html>', { status: 500 }));
    expect(one.seen.breaker.state(steadyNow_ms())).toBe('closed');
    openFor(one.seen, HALF_OPEN_ms);
    for (let i = 0; i < 3; i++) await ask([one], ASIDE, good);
    expect(one.seen.breaker.state(steadyNow_ms())).toBe('half_open');
  });

  it.each(['deadline_exceeded', 'configuration_unavailable'] as const)(
    'that a backend refuses with %s is refused by all, and no backend is to blame',
    async (code) => {
      const backends = [backend('one'), backend('two')];
      const error = new MaskrouteError(code, 'The mask could not be fetched.');
      const refuse = () => Response.json(error.toWire(), { status: error.status });
      for (let i = 0; i < 12; i++) {
        const { asked, called } = await ask(backends, COMPLETION, refuse);
        expect(asked).toHaveLength(1);
        expect(called).toMatchObject({ kind: 'answer', response: { status: error.status } });
      }
      for (const { seen } of backends) expect(seen.breaker.state(steadyNow_ms())).toBe('closed');
    },
  );
});

it('a load in a header is read back, and nothing else is taken for one', () => {
  const load = { running: 2, waiting: 0, capacity: 64 };
  expect(parseLoad(formatLoad(load))).toEqual(load);
  for (const bad of [null, '', 'running=1', 'running=-1;waiting=0;capacity=1', `${formatLoad(load)};x=1`]) {
    expect(parseLoad(bad)).toBeUndefined();
  }
});
