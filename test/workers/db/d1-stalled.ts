/** D1 answers nothing for half a minute: what was known is served on, at once, and what is new comes after. */
import { afterEach, expect, it, vi } from 'vitest';
import {
  activate,
  admin,
  badD1,
  chat,
  created,
  freshIsolate,
  goLive,
  makeMaskSet,
  newTenant,
  upload,
} from '../support/edge.ts';

afterEach(() => {
  vi.useRealTimers();
});

it.each(['stalled', 'failing'] as const)('30 s of a D1 that is %s', async (mood) => {
  const { tenant, key } = await newTenant();
  const { version: old } = await goLive('before', tenant);
  const { version: next } = await upload(makeMaskSet('after'), tenant);
  const variants = [
    { name: 'a', weight: 1, mask_set: old },
    { name: 'b', weight: 1, mask_set: old },
  ];
  const id = `stall-${mood}`;
  await created(admin('POST', '/experiments', { id, tenant, variants }));
  expect((await admin('POST', `/experiments/${id}/start`)).status).toBe(200);
  const d1 = badD1();
  const isolate = freshIsolate({ DB: d1.DB });
  const seen = async () => {
    const response = await chat(key, {}, isolate);
    expect(response.status).toBe(200);
    const header = (name: string) => response.headers.get(`x-maskroute-${name}`);
    return [header('version'), header('experiment'), header('variant')].join(' ');
  };
  const before = await seen();
  expect(before).toMatch(`${old} ${id}`);
  d1.be(mood);
  // Made known through an isolate that reaches D1; this one hears of it only later.
  expect((await admin('POST', `/experiments/${id}/stop`)).status).toBe(200);
  await activate(next, { tenant });
  vi.useFakeTimers({ toFake: ['Date'], now: Date.now() });
  const times_ms: number[] = [];
  for (let second = 0; second < 30; second += 2) {
    vi.setSystemTime(Date.now() + 2_000);
    const started_ms = performance.now();
    expect(await seen()).toBe(before);
    times_ms.push(performance.now() - started_ms);
  }
  // The first finds out; the others wait for nothing, however busy the machine is now and then.
  expect(times_ms.toSorted((a, b) => a - b)[7]).toBeLessThan(1_000);
  d1.be('good');
  const recovered_ms = Date.now();
  await vi.waitFor(
    async () => {
      vi.setSystemTime(Date.now() + 100);
      expect(await seen()).toBe(`${next} none live`);
    },
    { timeout: 20_000, interval: 20 },
  );
  expect(Date.now() - recovered_ms).toBeLessThan(5_000);
});
