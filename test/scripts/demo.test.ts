/** Columns of the demo, and its end when the edge ends. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { createServer, type RequestListener } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { text } from 'node:stream/consumers';
import { expect, onTestFinished, test } from 'vitest';
import { agreementOf, decodeSpeed, figuresOf, sideBySide, summaryOf, wrap } from '../../scripts/demo.ts';

test('wraps at words, keeps paragraphs and indentation, cuts what is too long', () => {
  expect(wrap('one two three', 7)).toEqual(['one two', 'three']);
  expect(wrap('a\n\nb', 7)).toEqual(['a', '', 'b']);
  expect(wrap('    return fib(n)', 12)).toEqual(['    return', '    fib(n)']);
  expect(wrap('abcdefgh', 3)).toEqual(['abc', 'def', 'gh']);
  expect(wrap('', 5)).toEqual(['']);
});

test('no line is wider than it may be', () => {
  const text = `def f():\n${' '.repeat(90)}x = ${'y'.repeat(100)} 日本語のテキスト ${'word '.repeat(50)}`;
  for (const line of wrap(text, 20)) expect([...line].length).toBeLessThanOrEqual(20);
});

test('the shorter text is padded', () => {
  expect(sideBySide('left', 'a b c', 30)).toEqual(['left          │  a b c']);
  expect(sideBySide('l', '1\n2', 30).map((line) => line.split('│')[1]?.trim())).toEqual(['1', '2']);
});

test('agreement is the share of words before the first that differs', () => {
  expect(agreementOf('one two three', 'one two three')).toBe(1);
  expect(agreementOf('one two four', 'one two three six')).toBe(0.5);
  expect(agreementOf('', 'one')).toBe(0);
});

const answer = { text: 'a b', cluster: '0', mask: 'm', sparsity: 0.1, tokens_per_s: 0 };
const speeds = (masked: number[], dense: number[]) => [
  { masked: answer, dense: answer, speeds: masked.map((one, i) => ({ masked: one, dense: dense[i]! })) },
];

test('an answer of one token has no speed, and does not disturb the others', () => {
  expect(decodeSpeed(1, 0)).toBeNull();
  expect(decodeSpeed(11, 100)).toBe(100);
  const figures = figuresOf([...speeds([110, 111, 112], [100, 101, 99]), ...speeds([], [])], 0.5);
  expect(figures).toMatchObject({ prompts: 2, masked_tokens_per_s: 111, dense_tokens_per_s: 100 });
  expect(figures.spread).toBeLessThan(1.1);
});

test('when every answer has one token the summary says that there is no speed', () => {
  const figures = figuresOf([...speeds([], []), ...speeds([], [])], 4);
  expect(figures).toMatchObject({ masked_tokens_per_s: null, dense_tokens_per_s: null, spread: null });
  const summary = summaryOf(figures);
  expect(summary).toContain('speed      not measured');
  expect(summary).toContain('The machine is busy: 4.0 programs');
  expect(summary).not.toContain('NaN');
});

test('the summary has medians of all rounds, and says so when the machine is busy', () => {
  const calm = summaryOf(figuresOf(speeds([110, 111, 112], [100, 101, 99]), 0.5));
  expect(calm).toMatch(/masked {5}111\.0 tokens\/s \(median\)/);
  expect(calm).toMatch(/dense {6}100\.0 tokens\/s \(median\); masked is 11 % faster/);
  expect(calm).toContain('agreement  100 %');
  expect(calm).not.toContain('busy');
  expect(summaryOf(figuresOf(speeds([60, 111, 112], [100, 50, 99]), 0.5))).toContain('The machine is busy');
  expect(summaryOf(figuresOf(speeds([110, 111, 112], [100, 101, 99]), 4))).toContain('4.0 programs');
  // Figures stand together, and whether to trust them comes last.
  const lines = summaryOf(figuresOf(speeds([110, 111, 112], [100, 101, 99]), 4, 0.874)).split('\n');
  expect(lines.map((line) => line.trim().split(/\s/)[0])).toEqual([
    ...['Summary', 'masked', 'dense', 'agreement', 'evaluated', 'The', 'want'],
  ]);
  expect(lines[4]).toContain('evaluated  87 %');
});

test.each<[string, RequestListener, string]>([
  ['is gone', ({ socket }) => socket.destroy(), ' gives no answer: Connection error.'],
  ['refuses', (_, response) => response.writeHead(404).end(), ': 404 status code (no body)'],
])('an edge that %s ends it with one line', async (_, answer, said) => {
  const server = createServer((request, response) =>
    request.url === '/healthz' ? response.end('ok') : answer(request, response),
  );
  await once(server.listen(0, '127.0.0.1'), 'listening');
  const home = mkdtempSync(join(tmpdir(), 'maskroute-demo-'));
  onTestFinished(() => {
    server.close();
    rmSync(home, { recursive: true });
  });
  const edge = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
  const dev = { edge, backend: edge, apiKey: 'a', adminKey: 'b', backendKey: 'c', model: 'm' };
  writeFileSync(join(home, 'dev.json'), JSON.stringify(dev));
  const child = spawn(process.execPath, ['scripts/demo.ts'], {
    env: { ...process.env, MASKROUTE_HOME: home },
    stdio: ['ignore', 'ignore', 'pipe'],
  });
  expect(await text(child.stderr)).toBe(`error: ${edge}/v1${said}\n`);
});
