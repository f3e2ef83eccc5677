/** Schedules of publications: who sees the new version when. */
import { describe, expect, it } from 'vitest';
import { completesAt_ms, type Rollout, seesNew, shareAt } from '../../shared/rollout.ts';
import { stickyKey } from '../../shared/sticky-key.ts';

const ROLLOUT: Rollout = {
  id: 'p_1',
  activateAt_ms: 1_000_000,
  steps: [
    { share: 0.01, duration_s: 60 },
    { share: 0.1, duration_s: 600 },
  ],
};

describe('a rollout', () => {
  it('goes through its steps by the clock alone', () => {
    const at = (seconds: number) => shareAt(ROLLOUT, 1_000_000 + seconds * 1000);
    expect([-1, 0, 59.999, 60, 659.999, 660].map(at)).toEqual([0, 0.01, 0.01, 0.1, 0.1, 1]);
    expect(completesAt_ms(ROLLOUT)).toBe(1_660_000);
    const atOnce = { ...ROLLOUT, steps: [] };
    expect([999_999, 1_000_000].map((now_ms) => shareAt(atOnce, now_ms))).toEqual([0, 1]);
  });

  it('shows the new version to its share of 100,000 keys, and never takes it from one again', () => {
    const keys = Array.from({ length: 100_000 }, (_, i) => `key ${i}`);
    const seenBy = (seconds: number) =>
      keys.filter((key) => seesNew(ROLLOUT, key, 1_000_000 + seconds * 1000));
    const [first, second] = [seenBy(0), seenBy(60)];
    expect(first.length / keys.length).toBeCloseTo(0.01, 2.5);
    expect(second.length / keys.length).toBeCloseTo(0.1, 2);
    expect(new Set([...first, ...second]).size).toBe(second.length);
    expect(seenBy(-1)).toHaveLength(0);
    expect(seenBy(660)).toHaveLength(keys.length);
    const other = keys.filter((key) => seesNew({ ...ROLLOUT, id: 'p_2' }, key, 1_000_000));
    expect(other.filter((key) => first.includes(key)).length).toBeLessThan(50);
  });
});

describe('a sticky key', () => {
  const caller = { tenant: 'a', keyId: 'k1' };
  const chat = (...messages: [string, string][]) => ({
    kind: 'chat' as const,
    body: { messages: messages.map(([role, content]) => ({ role: role as 'user', content })) },
  });
  const conversation = (source: Parameters<typeof stickyKey>[2], who = caller) =>
    stickyKey('conversation', who, source);

  it('of a conversation stays while it grows, and is another for another tenant', () => {
    const start = chat(['system', 'be kind'], ['user', 'hello']);
    const later = chat(['system', 'be kind'], ['user', 'hello'], ['assistant', 'hi'], ['user', 'more']);
    expect(conversation(later)).toBe(conversation(start));
    expect(conversation(start, { tenant: 'a', keyId: 'k2' })).toBe(conversation(start));
    expect(conversation(start, { tenant: 'b', keyId: 'k1' })).not.toBe(conversation(start));
    expect(conversation(chat(['user', 'hello']))).not.toBe(conversation(start));
  });

  it('of a completion is the beginning of its prompt', () => {
    const prompt = 'x'.repeat(300);
    const completion = (text: string | number[]) => ({ kind: 'completion' as const, body: { prompt: text } });
    expect(conversation(completion(`${prompt} and more`))).toBe(conversation(completion(prompt)));
    expect(conversation(completion([1, 2, 3]))).not.toBe(conversation(completion([1, 2, 4])));
  });

  it('of a user is the user field, and the conversation without one', () => {
    const hello = chat(['user', 'hello']);
    const named = { ...hello, body: { ...hello.body, user: 'ann' } };
    expect(stickyKey('user', caller, named)).toBe(stickyKey('user', { ...caller, keyId: 'k2' }, named));
    expect(stickyKey('user', caller, hello)).toBe(conversation(hello));
    expect(stickyKey('api_key', caller, hello)).not.toBe(
      stickyKey('api_key', { ...caller, keyId: 'k2' }, hello),
    );
  });
});
