/**
 * A small backend that speaks the real protocol over a real socket, records what it is asked, and behaves as
 * the test wishes: the `user` field names the behaviour. Only its answers' text is made up.
 */
import { once } from 'node:events';
import type { ServerResponse } from 'node:http';
import { MODEL, type Recorded, STREAM_PAUSE_ms } from './constants.ts';
import { listen, type RunningServer, readText } from './http-server.ts';

export function startBackend(): Promise<RunningServer> {
  const recorded = new Map<string, Recorded>();
  return listen(async (request, response) => {
    const path = request.url ?? '';
    if (path.startsWith('/recorded/')) {
      return json(response, 200, recorded.get(decodeURIComponent(path.slice('/recorded/'.length))) ?? null);
    }
    const text = await readText(request);
    const entry: Recorded = {
      path,
      headers: request.headers as Record<string, string>,
      body: text === '' ? null : JSON.parse(text),
      hungUp: false,
      sent_bytes: 0,
    };
    recorded.set(String(request.headers['x-request-id']), entry);
    response.on('close', () => {
      entry.hungUp = !response.writableFinished;
    });
    if (path === '/readyz') return json(response, 200, { status: 'ready' });
    if (path === '/v1/models') return json(response, 200, modelList());
    await answer(String(entry.body?.user ?? ''), entry, response);
  });
}

async function answer(behaviour: string, entry: Recorded, response: ServerResponse): Promise<void> {
  switch (behaviour) {
    case 'hang':
      return;
    case 'die':
      response.destroy();
      return;
    case 'html':
      response.writeHead(200, { 'content-type': 'text/html' }).end('<h1>It works!</h1>');
      return;
    case 'bad-error':
      response.writeHead(500, { 'content-type': 'application/json' }).end('{"oops":true}');
      return;
    case 'unauthorized':
      return json(response, 401, wireError('expired_token'));
    case 'redirect':
      response.writeHead(302, { location: 'http://127.0.0.1:1/' }).end();
      return;
    case 'queue-full':
      response.setHeader('retry-after', '7');
      return json(response, 429, wireError('queue_full'));
    case 'masks-unknown':
      if (entry.body?.mask === 'dense') return json(response, 200, { maskroute: entry.body?.maskroute });
      return json(response, 400, wireError('unknown_mask', 'mask'));
    case 'unknown-model':
      return json(response, 404, wireError('model_not_found'));
    case 'flood':
      return await flood(entry, response);
    case 'stream-forever':
      return await stream(response, Number.POSITIVE_INFINITY);
    case 'die-mid-stream':
      return await stream(response, 2, true);
    default:
      if (entry.body?.stream === true) return await stream(response, 3);
      return json(response, 200, {
        id: 'chatcmpl-1',
        object: 'chat.completion',
        maskroute: entry.body?.maskroute,
      });
  }
}

async function stream(response: ServerResponse, chunks: number, die = false): Promise<void> {
  response.writeHead(200, { 'content-type': 'text/event-stream', 'cache-control': 'no-cache' });
  for (let i = 0; i < chunks && !response.destroyed; i++) {
    response.write(`data: ${JSON.stringify({ choices: [{ index: 0, delta: { content: `t${i}` } }] })}\n\n`);
    await new Promise((resolve) => setTimeout(resolve, STREAM_PAUSE_ms));
  }
  if (die) response.destroy();
  else response.end('data: [DONE]\n\n');
}

const FLOOD_BYTES = 64 * 1024 * 1024;

/** As fast as the other side reads. */
async function flood(entry: Recorded, response: ServerResponse): Promise<void> {
  const chunk = `data: ${'x'.repeat(64 * 1024)}\n\n`;
  response.writeHead(200, { 'content-type': 'text/event-stream' });
  const closed = once(response, 'close');
  for (; entry.sent_bytes < FLOOD_BYTES && !response.destroyed; entry.sent_bytes += chunk.length) {
    if (!response.write(chunk)) await Promise.race([once(response, 'drain'), closed]);
  }
  response.end();
}

const wireError = (code: string, param: string | null = null) => ({
  error: { message: `the backend says ${code}`, type: 'invalid_request_error', param, code },
});

const modelList = () => ({
  object: 'list',
  data: [
    {
      id: MODEL.id,
      object: 'model',
      created: 0,
      owned_by: 'maskroute',
      maskroute: { hash: MODEL.hash, block_count: MODEL.blockCount, context_tokens: 2048, dense: false },
    },
  ],
});

function json(response: ServerResponse, status: number, value: unknown): void {
  response.writeHead(status, { 'content-type': 'application/json' }).end(JSON.stringify(value));
}
