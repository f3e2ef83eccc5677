/** What waits in memory while D1 does not store kept texts. */
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import { afterEach, expect, it, vi } from 'vitest';
import { AnswerText, keepTexts } from '../../../workers/requests/read-answer.ts';

afterEach(() => void vi.useRealTimers());

it('is their first 64 K, and no body of a request', async () => {
  setFlagsFromString('--expose-gc');
  const collect = runInNewContext('gc') as () => void;
  const held_MB = () => {
    collect();
    return process.memoryUsage().heapUsed / 1e6;
  };
  vi.useFakeTimers();
  let isBack = false;
  const prompts: string[] = [];
  const values = ({ prompt }: { prompt: string }) => ({
    onConflictDoNothing: async () => {
      if (!isBack) throw new Error('D1_ERROR: the storage is overloaded');
      prompts.push(prompt);
    },
  });
  const keep = (i: number) => {
    const messages = [{ role: 'user', content: `${i} `.padEnd(2_000_000, 'north ') }];
    const account = {
      event: `${i}`,
      caller: { tenant: 'a', policy: { textsKept_days: 1 } },
      routable: { kind: 'chat', body: JSON.parse(JSON.stringify({ messages })) },
    };
    return keepTexts({ insert: () => ({ values }) } as never, account as never, new AnswerText());
  };
  const before_MB = held_MB();
  const all = Array.from({ length: 20 }, (_, i) => keep(i));
  await vi.advanceTimersByTimeAsync(100);
  expect(held_MB() - before_MB).toBeLessThan(20);
  isBack = true;
  await vi.advanceTimersByTimeAsync(1_000);
  await Promise.all(all);
  expect(prompts.map((prompt) => prompt.length)).toEqual(Array(20).fill(64 * 1024));
  expect(prompts[7]).toMatch(/^user: 7 north north/);
});
