/**
 * What stands between the edge and a backend when something is wrong that no backend of ours does: it is gone or
 * stuck, a proxy answers for it, the connection breaks off half-way through an answer, or the answer is none of the
 * API's. All of these bytes (or their absence) are made up, since the real app would not send them; where an answer
 * is cut, it is the real app's.
 */
import { once } from 'node:events';
import type { ServerResponse } from 'node:http';
import { setTimeout as sleep } from 'node:timers/promises';
import { LONG_WHOLE_EVENT, type Recorded, STREAM_PAUSE_ms } from './constants.ts';

const JSON_TYPE = { 'content-type': 'application/json' };
const STREAM_TYPE = { 'content-type': 'text/event-stream' };
const LONG_EVENT_CHARS = 1536 * 1024;

/** No app is asked. By name, as in a request's `user` or a backend's mood. */
export const UNASKED: Readonly<Record<string, (out: ServerResponse, entry: Recorded) => unknown>> = {
  die: (out) => out.destroy(),
  html: (out) => out.writeHead(200, { 'content-type': 'text/html' }).end('<h1>It works!</h1>'),
  empty: (out) => out.writeHead(200, { ...JSON_TYPE, 'content-length': 0 }).end(),
  'bad-error': (out) => out.writeHead(500, JSON_TYPE).end('{"oops":true}'),
  'stall-error': (out) => halfObject(out, 500),
  /** As some balancers word it. */
  'foreign-error': (out) =>
    out.writeHead(502, JSON_TYPE).end('{"error":{"code":502,"message":"no healthy upstream"}}'),
  redirect: (out) => out.writeHead(302, { location: 'http://127.0.0.1:1/' }).end(),
  'half-event': async (out) => {
    out.writeHead(200, STREAM_TYPE).write('data: {"choices":[]}\n\ndata: {"choi');
    await sleep(STREAM_PAUSE_ms);
    out.destroy();
  },
  /** Longer than the edge holds an event; its end never comes. */
  'long-event': (out) => out.writeHead(200, STREAM_TYPE).write(`data: {"x":"${'x'.repeat(LONG_EVENT_CHARS)}`),
  'long-whole-event': (out) => out.writeHead(200, STREAM_TYPE).end(LONG_WHOLE_EVENT),
  flood,
};

/** The rest never comes. */
export const halfObject = (out: ServerResponse, status: number) =>
  out.writeHead(status, JSON_TYPE).write('{');

const FLOOD_BYTES = 64 * 1024 * 1024;

/** As fast as the other side reads: an app of ours makes no token that nobody takes. */
async function flood(out: ServerResponse, entry: Recorded): Promise<void> {
  const chunk = `data: ${'x'.repeat(64 * 1024)}\n\n`;
  out.writeHead(200, STREAM_TYPE);
  const closed = once(out, 'close');
  for (; entry.sent_bytes < FLOOD_BYTES && !out.destroyed; entry.sent_bytes += chunk.length) {
    if (!out.write(chunk)) await Promise.race([once(out, 'drain'), closed]);
  }
  out.end();
}

/** What a proxy or a tunnel says when nothing answers behind it, whatever was asked. */
export const gatewayPage = (out: ServerResponse, status: number) =>
  out
    .writeHead(status, {
      'content-type': 'text/html',
      ...(status < 400 ? { location: 'https://elsewhere.test/' } : {}),
    })
    .end(`<h1>Error ${status}</h1>`);

/** The app answers, and this becomes of it on the way. */
export const CUT: Readonly<
  Record<string, (answer: Promise<Response>, out: ServerResponse) => Promise<void>>
> = {
  hang: lose,
  busy: lose,
  'half-dead': async (answer, out) => {
    await (await answer).arrayBuffer();
    out.destroy();
  },
  'half-whole': halfWhole,
  'half-whole-vanishes': halfWhole,
  'stall-whole': async (answer, out) => {
    await begin(answer, out, { 'content-length': 1000 });
  },
  /** A proxy that does not keep lengths. */
  unsized: async (answer, out) => {
    const rest = await begin(answer, out);
    await sleep(STREAM_PAUSE_ms);
    out.end(rest);
  },
  'die-mid-stream': (answer, out) => cutStream(answer, out, 2),
  'vanish-mid-stream': (answer, out) => cutStream(answer, out, 2),
  'vanish-after-many': (answer, out) => cutStream(answer, out, 400),
  'stall-mid-stream': (answer, out) => cutStream(answer, out, 2, 'stall'),
};

/** Those whose backend was started again meanwhile, so that nobody knows what they cost. */
export const FORGOTTEN: ReadonlySet<string> = new Set([
  'half-whole-vanishes',
  'vanish-mid-stream',
  'vanish-after-many',
  'too-long-unmeasured',
]);

/** It computes, and nothing of it arrives. */
async function lose(answer: Promise<Response>): Promise<void> {
  await (await answer).arrayBuffer();
}

async function halfWhole(answer: Promise<Response>, out: ServerResponse): Promise<void> {
  await begin(answer, out, { 'content-length': 1000 });
  await sleep(STREAM_PAUSE_ms);
  out.destroy();
}

const BEGINNING_CHARS = 16;

/** @returns what was not sent. */
async function begin(answer: Promise<Response>, out: ServerResponse, headers: object = {}): Promise<string> {
  const text = await (await answer).text();
  out.writeHead(200, { ...JSON_TYPE, ...headers }).write(text.slice(0, BEGINNING_CHARS));
  return text.slice(BEGINNING_CHARS);
}

/** After so many tokens nothing comes any more, or the connection is gone. */
async function cutStream(
  answer: Promise<Response>,
  out: ServerResponse,
  tokens: number,
  end: 'die' | 'stall' = 'die',
): Promise<void> {
  const { body, headers } = await answer;
  out.writeHead(200, Object.fromEntries(headers));
  const reader = body!.pipeThrough(new TextDecoderStream()).getReader();
  out.on('close', () => reader.cancel().catch(() => {}));
  for (let seen = 0; seen < tokens; ) {
    const { value, done } = await reader.read();
    if (done) return;
    seen += value.match(/"(content|text|delta)":"t/g)?.length ?? 0;
    out.write(value);
  }
  if (end === 'stall') return;
  await sleep(STREAM_PAUSE_ms);
  out.destroy();
}

/** Vectors that no encoder of ours gives; undefined: the text asks for none. */
export function wrongVectors(texts: readonly string[]): unknown[] | undefined {
  const wrong = { '!short': texts.map(() => [1, 2]), '!missing': [], '!words': texts.map(() => ['a', 'b']) };
  return Object.entries(wrong).find(([fault]) => texts.some((text) => text.startsWith(fault)))?.[1];
}
