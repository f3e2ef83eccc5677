/** The cache that stands between requests and D1: what it answers, when it asks, and what it survives. */
import { describe, expect, it } from 'vitest';
import {
  createRoom,
  LOADS_MAX,
  type Room,
  type SourceHealth,
  SwrCache,
  type SwrPolicy,
  unheard,
} from '../../../workers/base/swr-cache.ts';
import { createSteadyClock, type Hold } from '../../../workers/base/waiting.ts';

const POLICY: SwrPolicy = {
  fresh_ms: 100,
  revalidate_ms: 200,
  stale_ms: 1_000,
  negative_ms: 50,
  wait_ms: 30,
  staleWait_ms: 30,
  load_ms: 60,
  retry_ms: 40,
  entriesMax: 3,
};

/** A source that the test answers by hand, and a clock that it moves. */
function setup(policy: Partial<SwrPolicy> = {}, health?: SourceHealth, room?: Room<string>) {
  const asked: { key: string; answer(value: string | null): void; fail(): void }[] = [];
  let now_ms = 1_000;
  const held: Promise<unknown>[] = [];
  const hold: Hold = (work) => void held.push(work);
  const cache = new SwrCache<string>(
    'test',
    (key) =>
      new Promise((resolve, reject) => {
        asked.push({ key, answer: resolve, fail: () => reject(new Error('the source fails')) });
      }),
    { ...POLICY, ...policy },
    { health, ...(room === undefined ? {} : { room }), now: createSteadyClock(() => now_ms) },
  );
  const settle = () => new Promise<void>((resolve) => setTimeout(resolve, 0));
  const get = (key = 'a') => cache.get(key, hold);
  /** Asks for a key that is not there and answers it. */
  const fill = async (key: string, value: string | null) => {
    const result = get(key);
    await settle();
    asked.at(-1)!.answer(value);
    return await result;
  };
  return { cache, asked, get, fill, settle, held, hold, pass: (ms: number) => (now_ms += ms) };
}

describe('a known value', () => {
  it('is answered alone while fresh, then also refreshed behind the request, once', async () => {
    const { get, fill, asked, pass, settle, held } = setup();
    expect(await fill('a', 'one')).toBe('one');
    pass(99);
    expect(await get()).toBe('one');
    expect(asked).toHaveLength(1);
    pass(2);
    expect(await Promise.all([get(), get(), get()])).toEqual(['one', 'one', 'one']);
    await settle();
    expect(asked).toHaveLength(2);
    asked[1]!.answer('two');
    await Promise.all(held);
    expect(await get()).toBe('two');
  });

  it('is asked for again before it is answered once it is old', async () => {
    const { get, fill, asked, pass, settle } = setup();
    await fill('a', 'one');
    pass(201);
    const result = get();
    await settle();
    asked.at(-1)!.answer('two');
    expect(await result).toBe('two');
  });

  it('that retries behind requests is waited for once: after a failure the old value is answered at once', async () => {
    const { get, fill, asked, pass, settle, held } = setup({ retriesBehind: true });
    await fill('a', 'one');
    pass(201);
    const first = get();
    await settle();
    asked.at(-1)!.fail();
    expect(await first).toBe('one');
    for (let failures = 0; failures < 3; failures++) {
      pass(POLICY.retry_ms + 1);
      expect(await get()).toBe('one');
      await settle();
      asked.at(-1)!.fail();
      await settle();
    }
    expect(asked).toHaveLength(5);
    pass(POLICY.retry_ms + 1);
    expect(await get()).toBe('one');
    await settle();
    asked.at(-1)!.answer('two');
    await Promise.allSettled(held);
    expect(await get()).toBe('two');
    // It answers again, so it is waited for again.
    pass(201);
    const later = get();
    await settle();
    asked.at(-1)!.answer('three');
    expect(await later).toBe('three');
  });

  it('that is old is waited for as long as the source may take, and less once it is known to fail', async () => {
    const waits = { staleWait_ms: 60_000, failingWait_ms: 20, load_ms: 120_000 };
    const { get, fill, asked, pass, settle } = setup({ ...waits, stale_ms: 10_000_000 });
    await fill('a', 'one');
    pass(201);
    const slow = get();
    await new Promise((resolve) => setTimeout(resolve, 100));
    asked.at(-1)!.answer('two');
    expect(await slow).toBe('two');
    pass(201);
    const failed = get();
    await settle();
    asked.at(-1)!.fail();
    expect(await failed).toBe('two');
    pass(41);
    // Nobody answers: had it waited for longer, the test would be over.
    expect(await get()).toBe('two');
    // What was heard long ago says nothing any more.
    pass(200_000);
    const later = get();
    await new Promise((resolve) => setTimeout(resolve, 100));
    asked.at(-1)!.answer('three');
    expect(await later).toBe('three');
  });

  it('is waited for less after another cache waited for the same source in vain', async () => {
    const health = unheard();
    const waits = { staleWait_ms: 60_000, failingWait_ms: 20, load_ms: 120_000, stale_ms: 10_000_000 };
    const [keys, table] = [setup({}, health), setup(waits, health)];
    await keys.fill('a', 'one');
    await table.fill('a', 'one');
    for (const { pass } of [keys, table]) pass(201);
    expect(await keys.get()).toBe('one');
    expect(await table.get()).toBe('one');
    expect(table.asked).toHaveLength(2);
  });

  it('that is asked for behind requests, in vain for long, is hardly waited for', async () => {
    const waits = { staleWait_ms: 60_000, failingWait_ms: 20, load_ms: 120_000 };
    const { get, fill, asked, pass } = setup({ ...waits, revalidate_ms: 65_000, stale_ms: 500_000 });
    await fill('a', 'one');
    pass(101);
    expect(await get()).toBe('one');
    pass(70_000);
    expect(await get()).toBe('one');
    expect(asked).toHaveLength(2);
  });

  it('outlives a source that fails or stalls, and only one request waits for it', async () => {
    const { get, fill, asked, pass, settle } = setup();
    await fill('a', 'one');
    pass(201);
    expect(await get()).toBe('one');
    const before = asked.length;
    expect(await get()).toBe('one');
    expect(asked).toHaveLength(before);
    pass(41);
    const result = get();
    await settle();
    asked.at(-1)!.fail();
    expect(await result).toBe('one');
  });

  it('does not outlive its last use-by time', async () => {
    const { get, fill, pass } = setup();
    await fill('a', 'one');
    pass(1_001);
    await expect(get()).rejects.toThrow('more than 30 ms');
  });

  it('stays fresh for no longer when the clock is set back by an hour', async () => {
    const { cache, fill, pass, asked, settle, get } = setup();
    await fill('a', 'one');
    await fill('b', null);
    pass(-3_600_000);
    await get();
    expect(asked).toHaveLength(2);
    pass(POLICY.fresh_ms);
    expect(cache.age_ms('a')).toBe(POLICY.fresh_ms);
    pass(POLICY.revalidate_ms);
    const failed = get();
    await settle();
    asked.at(-1)!.fail();
    expect(await failed).toBe('one');
    pass(-3_600_000);
    expect(cache.age_ms('a')).toBe(POLICY.fresh_ms + POLICY.revalidate_ms);
    // The source failed a moment ago, and a moment later it is asked again. What it lacked may be there now.
    pass(POLICY.retry_ms + 1);
    const [again, missing] = [get(), get('b')];
    await settle();
    for (const question of asked.slice(-2)) question.answer('two');
    expect(await Promise.all([again, missing])).toEqual(['two', 'two']);
  });

  it('goes when the source says that it is gone', async () => {
    const { fill, get, asked, pass, settle, cache } = setup();
    await fill('a', 'one');
    pass(150);
    await get();
    await settle();
    asked.at(-1)!.answer(null);
    await settle();
    expect(await get()).toBeNull();
    expect(cache.peek('a')).toBeUndefined();
  });
});

describe('a value that is not known', () => {
  it('is loaded once for all who ask', async () => {
    const { get, asked, settle } = setup();
    const results = [get(), get(), get()];
    await settle();
    expect(asked).toHaveLength(1);
    asked[0]!.answer('one');
    expect(await Promise.all(results)).toEqual(['one', 'one', 'one']);
  });

  it('is an error after the wait; after a failure nobody asks for a moment, then it works again', async () => {
    const { get, asked, fill, pass } = setup();
    await expect(get()).rejects.toThrow('more than 30 ms');
    await expect(get('b')).rejects.toThrow('a moment ago');
    expect(asked).toHaveLength(1);
    pass(41);
    expect(await fill('b', 'two')).toBe('two');
  });

  it('that the source does not have is remembered for a moment', async () => {
    const { get, fill, asked, pass } = setup();
    expect(await fill('a', null)).toBeNull();
    expect(await get()).toBeNull();
    expect(asked).toHaveLength(1);
    pass(51);
    expect(await fill('a', 'there now')).toBe('there now');
  });

  it('is not waited for longer than the load may take when its request was torn down', async () => {
    const { get, asked, fill, pass } = setup({ load_ms: 1_000_000 });
    await expect(get()).rejects.toThrow();
    pass(1_001_001);
    expect(await fill('a', 'one')).toBe('one');
    expect(asked).toHaveLength(2);
  });
});

describe('bounds', () => {
  it('the entries that were used last stay', async () => {
    const { cache, fill, get } = setup();
    for (const key of ['a', 'b', 'c']) await fill(key, key);
    await get('a');
    await fill('d', 'd');
    expect(['a', 'b', 'c', 'd'].map((key) => cache.peek(key))).toEqual(['a', undefined, 'c', 'd']);
  });

  it('a flood of unknown keys does not push known ones out', async () => {
    const { cache, fill } = setup();
    await fill('known', 'one');
    for (let i = 0; i < 20; i++) await fill(`unknown-${i}`, null);
    expect(cache.peek('known')).toBe('one');
  });

  describe('by what the values hold together', () => {
    /** Room for so many letters, each once, however many values have it. */
    const roomy = (letters: number) =>
      setup(
        { entriesMax: 100 },
        undefined,
        createRoom(
          letters,
          (value: string) => [...value],
          () => 1,
        ),
      );

    it('lets go of those that were used longest ago, and reads them again', async () => {
      const { cache, fill, get, asked } = roomy(4);
      for (const key of ['a', 'b', 'c', 'd']) await fill(key, key);
      expect(await get('a')).toBe('a');
      await fill('e', 'ef');
      expect(['a', 'b', 'c', 'd', 'e'].map((key) => cache.peek(key))).toEqual([
        ...['a', undefined, undefined, 'd', 'ef'],
      ]);
      expect(await fill('b', 'b')).toBe('b');
      expect(asked.map(({ key }) => key).join('')).toBe('abcdeb');
    });

    it('counts what several hold once, and keeps those whose going frees nothing', async () => {
      const { cache, fill } = roomy(4);
      await fill('none', '');
      for (let i = 0; i < 20; i++) await fill(`shared-${i}`, 's');
      for (const key of ['a', 'b', 'c']) await fill(key, key);
      expect(cache.peek('shared-0')).toBe('s');
      await fill('last', 's');
      await fill('d', 'd');
      // Of those with an 's', one was used after 'a', which alone went.
      expect(['none', 'shared-0', 'last', 'a', 'b', 'd'].map((key) => cache.peek(key))).toEqual([
        ...['', 's', 's', undefined, 'b', 'd'],
      ]);
      for (const key of ['e', 'f', 'g']) await fill(key, key);
      // Now nobody used it lately: all of them went together.
      await fill('h', 'h');
      expect(['none', 'shared-0', 'last', 'd', 'e'].map((key) => cache.peek(key))).toEqual([
        ...['', undefined, undefined, undefined, 'e'],
      ]);
    });

    it('keeps count when values change, shrink or are forgotten', async () => {
      const { cache, fill, asked, hold, settle } = roomy(4);
      const change = async (key: string, value: string | null) => {
        const changed = cache.refresh(key, hold);
        await settle();
        asked.at(-1)!.answer(value);
        await changed;
      };
      const held = () => ['a', 'b', 'c', 'd', 'e'].map((key) => cache.peek(key));
      await fill('a', 'a');
      await fill('b', 'bcd');
      for (const value of ['bcd', 'xyz', 'xx', 'xyz', 'x']) await change('b', value);
      await fill('c', 'cd');
      expect(held()).toEqual(['a', 'x', 'cd', undefined, undefined]);
      await change('b', null);
      await fill('d', 'd');
      cache.forget('c');
      await fill('e', 'ef');
      expect(held()).toEqual(['a', undefined, undefined, 'd', 'ef']);
      await fill('c', 'c');
      expect(held()).toEqual([undefined, undefined, 'c', 'd', 'ef']);
    });

    it('keeps the newest though it is too large alone', async () => {
      const { cache, fill } = roomy(2);
      await fill('a', 'a');
      await fill('b', 'bcde');
      expect([cache.peek('a'), cache.peek('b')]).toEqual([undefined, 'bcde']);
      await fill('c', 'c');
      expect([cache.peek('b'), cache.peek('c')]).toEqual([undefined, 'c']);
    });

    it('lets go of nothing while the source fails', async () => {
      const { cache, fill, get, pass, asked, settle } = roomy(2);
      for (const key of ['a', 'b']) await fill(key, key);
      pass(201);
      const results = ['c', 'a', 'b'].map((key) => get(key));
      await settle();
      for (const { fail } of asked.slice(2)) fail();
      await expect(results[0]).rejects.toThrow();
      expect(await Promise.all(results.slice(1))).toEqual(['a', 'b']);
      expect([cache.peek('a'), cache.peek('b')]).toEqual(['a', 'b']);
    });
  });

  it('only so many loads are under way', async () => {
    const { get, asked, settle } = setup();
    const keys = Array.from({ length: LOADS_MAX + 1 }, (_, index) => String(index));
    const results = keys.map((key) => get(key));
    await expect(results.pop()).rejects.toThrow('too many loads');
    await settle();
    expect(asked).toHaveLength(LOADS_MAX);
    for (const { key, answer } of asked) answer(key);
    expect(await Promise.all(results)).toEqual(keys.slice(0, -1));
  });

  it('loads whose requests were torn down leave their places once they must be over', async () => {
    const load_ms = 3_600_000;
    const { get, asked, settle, pass } = setup({ load_ms, wait_ms: load_ms });
    // Their timers do not fire: they went with the requests.
    const torn = Array.from({ length: LOADS_MAX }, (_, index) => get(String(index)));
    await settle();
    pass(load_ms + 1_000);
    await expect(get('next')).rejects.toThrow('too many loads');
    pass(1);
    const result = get('next');
    await settle();
    for (const { key, answer } of asked) answer(key);
    expect(await result).toBe('next');
    await Promise.all(torn);
  });
});

it('what was forgotten does not come back with a load that began before', async () => {
  const { cache, get, asked, settle, fill } = setup();
  const result = get();
  await settle();
  cache.forget('a');
  asked[0]!.answer('old');
  expect(await result).toBe('old');
  expect(cache.peek('a')).toBeUndefined();
  expect(await fill('a', 'new')).toBe('new');
});

it('a refresh asks even when the value is fresh', async () => {
  const { cache, fill, asked, settle, hold } = setup();
  await fill('a', 'one');
  const result = cache.refresh('a', hold);
  await settle();
  asked[1]!.answer('two');
  expect(await result).toBe('two');
  expect(cache.peek('a')).toBe('two');
});
