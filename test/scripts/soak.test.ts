/** Each check of a soak can fail: a small soak that holds, and one fault at a time. */
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { describe, expect, it } from 'vitest';
import { createRandom } from '../../gpu-backend/random.ts';
import {
  type Outcome,
  type Result,
  type Routed,
  readAnswer,
  sendTraffic,
} from '../../scripts/load/clients.ts';
import { disturb } from '../../scripts/soak/disturbances.ts';
import {
  answersAreCounted,
  answersOf,
  booksAgree,
  type CountedEvent,
  failuresAreDeclared,
  type MemorySample,
  memoryIsFlat,
  noVersionIsMixed,
  seenSpans,
} from '../../scripts/soak/soak-checks.ts';
import { soakPage } from '../../scripts/soak/soak-page.ts';
import type { SoakProduct } from '../../scripts/soak/soak-product.ts';
import { maskSetSchema, maskSetVersion } from '../../shared/mask/mask-set.ts';

const preset = maskSetSchema.parse(
  JSON.parse(
    readFileSync(
      new URL('../../gpu-backend/presets/smollm2-135m-instruct/mask-set.json', import.meta.url),
      'utf8',
    ),
  ),
);
const OLD = maskSetVersion(preset);
const NEXT_SET = { ...preset, name: 'next', createdAt: '2026-01-02T00:00:00Z' };
const NEXT = maskSetVersion(NEXT_SET);
const MASK_SETS = new Map([
  [OLD, preset],
  [NEXT, NEXT_SET],
]);

const routed = (version: string, change: Partial<Routed> = {}): Routed => ({
  version,
  maskSet: MASK_SETS.get(version)!.name,
  cluster: '1',
  mask: preset.clusters[1]!.mask,
  ...change,
});

/** Seconds of the soak are milliseconds times a thousand: it begins at 0. */
const outcome = (sent_s: number, ended_s: number, result: Result): Outcome => ({
  tenant: 'counted',
  isStream: false,
  firstAt_ms: undefined,
  result,
  sentAt_ms: sent_s * 1000,
  endedAt_ms: ended_s * 1000,
});
const answer = (
  requestId: string,
  at_s: number,
  inHeaders: Routed,
  inBody: Routed = inHeaders,
  tokens = { prompt_tokens: 30, completion_tokens: 5 },
): Outcome => outcome(at_s, at_s + 1, { kind: 'answer', requestId, ...tokens, said: [inHeaders, inBody] });
const error = (code: string, at_s: number): Outcome =>
  outcome(at_s, at_s + 1, { kind: 'error', code, requestId: `req_${code}` });

const event = (request_id: string, version: string, change: Partial<CountedEvent> = {}): CountedEvent => ({
  request_id,
  tenant: 'counted',
  version,
  mask: preset.clusters[1]!.mask,
  status: 200,
  prompt_tokens: 30,
  completion_tokens: 5,
  ...change,
});

/** One publication a hundred seconds in, and D1 that stalls right after it. */
const DONE = {
  publications: [{ tenant: '', version: NEXT, begunAt_ms: 100_000, doneAt_ms: 101_000 }],
  kills: [{ begunAt_ms: 200_000, doneAt_ms: 203_000 }],
  stalls: [{ begunAt_ms: 102_000, doneAt_ms: 122_000 }],
};
const ANSWERS = [answer('a', 10, routed(OLD)), answer('b', 150, routed(NEXT))];
const EVENTS = [event('a', OLD), event('b', NEXT)];
const mixed = (outcomes: readonly Outcome[], done = DONE) =>
  noVersionIsMixed(answersOf(outcomes), () => seenSpans(done, '', [OLD]), MASK_SETS);

describe('the books', () => {
  const books = { tenant: 'counted', requests: 2, prompt_tokens: 60, completion_tokens: 10 };
  it.each([
    ['hold', books, 70, true],
    ['have no budget to compare', books, null, true],
    ['differ from the budget by a token', books, 71, false],
    ['differ from the events by a token', { ...books, completion_tokens: 11 }, 71, false],
    ['lack a request', { ...books, requests: 1 }, 70, false],
  ])('%s', (_, usage, budget_tokens, isKept) => {
    expect(booksAgree([{ ...usage, budget_tokens }], EVENTS).isKept).toBe(isKept);
  });

  it.each([
    ['hold', EVENTS, true],
    ['lack an answer', [event('a', OLD)], false],
    ['have an answer twice', [...EVENTS, event('b', NEXT)], false],
    [
      'have other tokens than its client saw',
      [event('a', OLD), event('b', NEXT, { prompt_tokens: 31 })],
      false,
    ],
    ['have another version than its client was told', [event('a', NEXT), event('b', NEXT)], false],
  ])('of whole answers %s', (_, events, isKept) => {
    expect(answersAreCounted(answersOf(ANSWERS), events).isKept).toBe(isKept);
  });
});

describe('versions', () => {
  it.each([
    ['are the ones that were live', [], true],
    ['that come before their publication are found', [answer('c', 90, routed(NEXT))], false],
    ['may be the old ones while D1 stalls', [answer('c', 125, routed(OLD))], true],
    ['that are old when everybody has heard of the next are found', [answer('c', 130, routed(OLD))], false],
    ['that headers and body say differently are found', [answer('c', 150, routed(NEXT), routed(OLD))], false],
    [
      'that ran under a mask of another cluster are found',
      [answer('c', 150, routed(NEXT, { mask: preset.clusters[0]!.mask, cluster: '1' }))],
      preset.clusters[0]!.mask === preset.clusters[1]!.mask,
    ],
    ['with the name of another set are found', [answer('c', 150, routed(NEXT, { maskSet: 'x' }))], false],
  ])('%s', (_, more, isKept) => {
    expect(mixed([...ANSWERS, ...more]).isKept).toBe(isKept);
  });
});

it.each([
  ['a refusal that is documented', error('queue_full', 10), true],
  ['a backend that is gone in the seconds of its kill', error('backend_unreachable', 201), true],
  ['a backend that is gone for no reason', error('backend_unreachable', 10), false],
  ['any other failure in the seconds of a kill', error('internal_error', 201), false],
])('%s', (_, failed, isKept) => {
  expect(failuresAreDeclared([...ANSWERS, failed], DONE).isKept).toBe(isKept);
});

it.each([
  ['stays as it is', 'workerd', () => 300, true],
  ['grows in its first third', 'workerd', (at_s: number) => Math.min(500, at_s * 5), true],
  ['grows for four minutes', 'workerd', (at_s: number) => Math.min(600, at_s * 2.5), false],
  ['grows by 17 MB after it', 'workerd', (at_s: number) => 100 + at_s / 11.5, false],
  ['grows for two minutes', 'backend', (at_s: number) => Math.min(600, at_s * 5), true],
  ['grows by a fifth in three minutes', 'backend', (at_s: number) => 300 + at_s / 3, false],
])('memory that %s, of %s', (_, name, rss, isKept) => {
  const samples: MemorySample[] = Array.from({ length: 300 }, (_, at_s) => ({
    at_s,
    pid: 7,
    name,
    rss_MB: rss(at_s),
  }));
  expect(memoryIsFlat(samples).isKept).toBe(isKept);
});

describe('what a client saw', () => {
  const info = {
    mask_set: 'set',
    version: OLD,
    cluster: 1,
    mask: 'm',
    prompt_tokens: 3,
    completion_tokens: 2,
  };
  const chunk = `data: {"choices":[],"maskroute":${JSON.stringify(info)}}\n\n`;
  it.each([
    [200, JSON.stringify({ choices: [], maskroute: info }), 'answer'],
    [200, `data: {"choices":[]}\n\n${chunk}data: [DONE]\n\n`, 'answer'],
    [200, `data: {"choices":[]}\n\n${chunk}`, 'stream_without_end'],
    [
      200,
      'data: {"choices":[]}\n\nevent: error\ndata: {"error":{"code":"backend_error"}}\n\n',
      'backend_error',
    ],
    [429, '{"error":{"code":"queue_full"}}', 'queue_full'],
    [502, '<html>', 'status_502'],
  ])('%i %s', (status, text, expected) => {
    const result = readAnswer(status, text, { 'X-Request-Id': 'req_1' });
    expect(result.kind === 'error' ? result.code : result.kind).toBe(expected);
  });
});

describe('what goes on for half an hour', () => {
  it('ends with its clients when it is to end', async () => {
    const server = createServer((_, response) => void setTimeout(() => response.end('{}'), 100));
    await once(server.listen(0, '127.0.0.1'), 'listening');
    const { port } = server.address() as AddressInfo;
    const begun_ms = performance.now();
    const { sent, outcomes } = await sendTraffic({
      edge: `http://127.0.0.1:${port}`,
      model: 'm',
      tenants: [{ id: 'a', key: 'k' }],
      clients: 2,
      seconds: 600,
      rate: 5,
      hangUps: 0,
      random: createRandom(1),
      signal: AbortSignal.timeout(500),
    });
    expect(performance.now() - begun_ms).toBeLessThan(10_000);
    expect(sent).toBeGreaterThan(0);
    expect(outcomes.length).toBeGreaterThan(0);
    server.close();
  });

  it('disturbs nobody any more when it is to end', async () => {
    const said: string[] = [];
    const nobody = {} as SoakProduct;
    const disturbed = disturb(nobody, 1_800_000, (line) => said.push(line), AbortSignal.timeout(50));
    await expect(disturbed).rejects.toThrow(/aborted/);
    expect(said).toEqual([]);
  });
});

it('the page is one file with a picture of each thing, and says what did not hold', () => {
  const outcomes = [...ANSWERS, error('queue_full', 20)];
  const checks = [failuresAreDeclared(outcomes, DONE), booksAgree([], [])];
  const memory = [0, 1].map((at_s) => ({ at_s, pid: 7, name: 'workerd', rss_MB: 100 }));
  const settings = [['clients', '64']] as const;
  const html = soakPage({
    begunAt_ms: 0,
    seconds: 300,
    settings,
    outcomes,
    disturbances: DONE,
    memory,
    checks,
  });
  expect(html).toContain('Did not hold: budgets, usage and events agree to the token.');
  expect(html.match(/<svg/g)).toHaveLength(4);
  expect(html).not.toMatch(/<script|https?:\/\/(?!www\.w3\.org)/);
});
