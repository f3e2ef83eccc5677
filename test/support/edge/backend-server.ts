/**
 * A small backend that speaks the real protocol over a real socket, records what it is asked, and behaves as
 * the test wishes: the `user` field names the behaviour. Only its answers' text is made up.
 */
import { once } from 'node:events';
import type { IncomingMessage, ServerResponse } from 'node:http';
import { type Authenticate, createAuthenticator } from '../../../gpu-backend/api/auth.ts';
import { BACKEND_HEADERS } from '../../../shared/wire/backend-load.ts';
import { toMaskrouteError } from '../../../shared/wire/errors.ts';
import { BACKEND_KEY, ENCODER, MODEL, type Recorded, STREAM_PAUSE_ms } from './constants.ts';
import { vectorOf } from './encoder-server.ts';
import { listen, type RunningServer, readText } from './http-server.ts';

export function startBackend(): Promise<RunningServer> {
  const recorded = new Map<string, Recorded>();
  /** The backends that saw a request, in turn. */
  const places = new Map<string, string[]>();
  const moods = new Map<string, string>();
  /** By place and completion. */
  const answers = new Map<string, MadeAnswer>();
  return listen(async (request, response) => {
    // One server stands for many backends: `/at/NAME` is the address of one, `/mood/NAME` says how it is today.
    const [, place = '', path = request.url ?? ''] = /^\/at\/([^/]+)(.*)$/.exec(request.url ?? '') ?? [];
    if (path.startsWith('/mood/')) {
      moods.set(path.slice('/mood/'.length), await readText(request));
      return json(response, 200, {});
    }
    const mood = moods.get(place) ?? 'good';
    if (mood === 'down') {
      response.destroy();
      return;
    }
    if (mood === 'mute') return;
    if (path.startsWith('/recorded/')) {
      const id = decodeURIComponent(path.slice('/recorded/'.length));
      const entry = recorded.get(id);
      return json(response, 200, entry === undefined ? null : { ...entry, places: places.get(id) });
    }
    const text = await readText(request);
    const entry: Recorded = {
      path,
      place,
      headers: request.headers as Record<string, string>,
      body: text === '' ? null : JSON.parse(text),
      hungUp: false,
      sent_bytes: 0,
    };
    if (mood === 'strict') {
      const refused = await strict(place, request);
      if (refused !== undefined) return json(response, 401, refused);
    }
    const id = String(request.headers['x-request-id']);
    places.set(id, [...(places.get(id) ?? []), place]);
    recorded.set(id, entry);
    response.on('close', () => {
      entry.hungUp = !response.writableFinished;
    });
    if (mood.startsWith('gateway-')) return page(response, Number(mood.slice('gateway-'.length)));
    if (path === '/readyz') return json(response, 200, { status: 'ready' });
    if (path === '/v1/models') return json(response, 200, modelList());
    if (path.startsWith('/v1/answers/'))
      return cost(answers.get(`${place}/${path.slice('/v1/answers/'.length)}`), response);
    if (path === '/v1/load') return json(response, 200, { ...LOAD, ...loads[mood] });
    if (path === '/v1/encoders') return json(response, 200, { object: 'list', data: [ENCODER_ENTRY] });
    if (path === '/v1/embeddings') return embeddings(entry.body?.input as string[], response);
    response.setHeader('x-maskroute-load', loadHeader(mood));
    const made = beginAnswer(entry);
    answers.set(`${place}/${made.completion}`, made);
    const finish = () => {
      made.finished = true;
    };
    response.on('close', finish);
    if (response.destroyed) finish();
    // Nobody waits for longer; the real backend stops then, too.
    setTimeout(finish, Number(request.headers[BACKEND_HEADERS.deadline])).unref();
    await answer(
      ['good', 'loaded', 'strict'].includes(mood) ? String(entry.body?.user ?? '') : mood,
      entry,
      response,
      made,
    );
  });
}

const doors = new Map<string, Promise<Authenticate>>();

/** Whom the real backend would not let in, by its own code and clock; undefined for everyone else. */
async function strict(place: string, { headers, socket }: IncomingMessage): Promise<object | undefined> {
  const audience = `http://127.0.0.1:${socket.localPort}/at/${place}`;
  const door = doors.get(place) ?? createAuthenticator(BACKEND_KEY, { audience });
  doors.set(place, door);
  try {
    await (await door)(headers.authorization);
    return undefined;
  } catch (error) {
    return toMaskrouteError(error).toWire();
  }
}

/** What the real backend counts: here a token a word of the prompt, and a token a chunk. */
type MadeAnswer = {
  readonly completion: string;
  readonly prompt_tokens: number;
  completion_tokens: number;
  finished: boolean;
  /** As of a backend that was started again. */
  forgotten: boolean;
};

const WORDS = 3;

function beginAnswer({ body }: Recorded): MadeAnswer {
  const { completion = 'none' } = (body?.maskroute ?? {}) as { completion?: string };
  const text = JSON.stringify(body?.messages ?? body?.prompt ?? '');
  const prompt_tokens = text.split(' ').length;
  return { completion, prompt_tokens, completion_tokens: 0, finished: false, forgotten: false };
}

const infoOf = ({ body }: Recorded, { prompt_tokens, completion_tokens }: MadeAnswer) => ({
  maskroute: {
    ...(body?.maskroute as object | undefined),
    ...{ queue_ms: 1, prefill_ms: 2, decode_ms: 10 * completion_tokens, prompt_tokens, completion_tokens },
  },
});

function cost(made: MadeAnswer | undefined, response: ServerResponse): void {
  if (made === undefined || made.forgotten) json(response, 404, wireError('not_found'));
  else {
    const { finished, prompt_tokens, completion_tokens } = made;
    json(response, 200, { object: 'maskroute.answer', finished, prompt_tokens, completion_tokens });
  }
}

async function answer(
  behaviour: string,
  entry: Recorded,
  response: ServerResponse,
  made: MadeAnswer,
): Promise<void> {
  switch (behaviour) {
    case 'hang':
      return;
    case 'busy':
      made.completion_tokens = WORDS;
      return;
    case 'die':
      response.destroy();
      return;
    case 'html':
      response.writeHead(200, { 'content-type': 'text/html' }).end('<h1>It works!</h1>');
      return;
    case 'empty':
      response.writeHead(200, { 'content-type': 'application/json', 'content-length': 0 }).end();
      return;
    case 'bad-error':
      response.writeHead(500, { 'content-type': 'application/json' }).end('{"oops":true}');
      return;
    case 'foreign-error':
      // As some balancers word it.
      return json(response, 502, { error: { code: 502, message: 'no healthy upstream' } });
    case 'unauthorized':
      return json(response, 401, wireError('expired_token'));
    case 'redirect':
      response.writeHead(302, { location: 'http://127.0.0.1:1/' }).end();
      return;
    case 'sick':
      return json(response, 500, wireError('engine_failed'));
    case 'stopping':
      response.setHeader('retry-after', '5');
      return json(response, 503, wireError('not_ready'));
    case 'sick-late':
      made.completion_tokens = WORDS;
      return json(response, 500, wireError('engine_failed'));
    case 'too-long':
      return json(response, 400, wireError('context_length_exceeded'));
    case 'spent-stopping':
      made.completion_tokens = WORDS;
      return json(response, 503, wireError('not_ready'));
    case 'half-dead':
      made.completion_tokens = WORDS;
      response.destroy();
      return;
    case 'deadline':
      made.completion_tokens = WORDS;
      return json(response, 504, wireError('deadline_exceeded'));
    case 'deadline-mid-stream':
      made.completion_tokens = WORDS;
      response.writeHead(200, { 'content-type': 'text/event-stream' });
      response.end(`event: error\ndata: ${JSON.stringify(wireError('deadline_exceeded'))}\n\n`);
      return;
    case 'slow-first': {
      await new Promise((resolve) => setTimeout(resolve, 400));
      return await stream(entry, response, made, 1);
    }
    case 'slow-refusal': {
      await new Promise((resolve) => setTimeout(resolve, 400));
      return json(response, 404, wireError('model_not_found'));
    }
    case 'slow-whole': {
      await new Promise((resolve) => setTimeout(resolve, 400));
      if (response.destroyed) return;
      made.completion_tokens = WORDS;
      return json(response, 200, infoOf(entry, made));
    }
    case 'half-event':
      response.writeHead(200, { 'content-type': 'text/event-stream' });
      response.write('data: {"choices":[]}\n\ndata: {"choi');
      await new Promise((resolve) => setTimeout(resolve, STREAM_PAUSE_ms));
      response.destroy();
      return;
    case 'half-whole':
    case 'half-whole-vanishes':
      made.forgotten = behaviour === 'half-whole-vanishes';
      made.completion_tokens = WORDS;
      response.writeHead(200, { 'content-type': 'application/json', 'content-length': 1000 });
      response.write('{"id":"chatcmpl-');
      await new Promise((resolve) => setTimeout(resolve, STREAM_PAUSE_ms));
      response.destroy();
      return;
    case 'stall-whole':
      // A whole answer is over when it begins to be sent.
      Object.assign(made, { completion_tokens: WORDS, finished: true });
      response.writeHead(200, { 'content-type': 'application/json', 'content-length': 1000 });
      response.write('{"id":"chatcmpl-');
      return;
    case 'unsized':
      made.completion_tokens = WORDS;
      response.writeHead(200, { 'content-type': 'application/json' });
      response.write('{"object":"chat.completion",');
      await new Promise((resolve) => setTimeout(resolve, STREAM_PAUSE_ms));
      response.end(JSON.stringify(infoOf(entry, made)).slice(1));
      return;
    case 'queue-full':
      response.setHeader('retry-after', '7');
      return json(response, 429, wireError('queue_full'));
    case 'masks-unknown':
      if (entry.body?.mask === 'dense') return json(response, 200, infoOf(entry, made));
      return json(response, 400, wireError('unknown_mask', 'mask'));
    case 'too-long-unmeasured':
      made.forgotten = true;
      return json(response, 400, wireError('context_length_exceeded'));
    case 'unknown-model':
      return json(response, 404, wireError('model_not_found'));
    case 'flood':
      return await flood(entry, response);
    case 'stream-forever':
      return await stream(entry, response, made, Number.POSITIVE_INFINITY);
    case 'die-mid-stream':
      return await stream(entry, response, made, 2, 'die');
    case 'vanish-mid-stream':
      made.forgotten = true;
      return await stream(entry, response, made, 2, 'die');
    case 'vanish-after-many':
      made.forgotten = true;
      return await stream(entry, response, made, 400, 'die', 2);
    case 'stall-mid-stream':
      return await stream(entry, response, made, 2, 'stall');
    case 'slow-tokens':
      return await slowTokens(response);
    default:
      if (entry.body?.stream === true) return await stream(entry, response, made, WORDS);
      made.completion_tokens = Math.min(WORDS, Number(entry.body?.max_tokens ?? WORDS));
      return json(response, 200, {
        id: `chatcmpl-${made.completion}`,
        object: 'chat.completion',
        ...(entry.body?.logprobs ? { choices: [{ index: 0, logprobs: logprobsOf(entry) }] } : {}),
        ...infoOf(entry, made),
      });
  }
}

/** The third of four tokens is another one under a mask. */
function logprobsOf({ body }: Recorded): object {
  const tokens = ['one', 'two', body?.mask === 'dense' ? 'three' : 'drei', 'four'];
  return body?.messages === undefined ? { tokens } : { content: tokens.map((token) => ({ token })) };
}

async function stream(
  entry: Recorded,
  response: ServerResponse,
  made: MadeAnswer,
  chunks: number,
  end: 'well' | 'die' | 'stall' = 'well',
  pause_ms = STREAM_PAUSE_ms,
): Promise<void> {
  response.writeHead(200, { 'content-type': 'text/event-stream', 'cache-control': 'no-cache' });
  for (let i = 0; i < chunks && !response.destroyed; i++) {
    made.completion_tokens++;
    const last = i === chunks - 1 && end === 'well' ? infoOf(entry, made) : {};
    const choices = [{ index: 0, delta: { content: `t${i}` } }];
    response.write(`data: ${JSON.stringify({ id: `chatcmpl-${made.completion}`, choices, ...last })}\n\n`);
    await new Promise((resolve) => setTimeout(resolve, pause_ms));
  }
  if (end === 'die') response.destroy();
  else if (end === 'well') response.end('data: [DONE]\n\n');
}

/** A token only after many comments, as a backend sends them whose engine takes its time. */
async function slowTokens(response: ServerResponse): Promise<void> {
  response.writeHead(200, { 'content-type': 'text/event-stream' });
  for (let i = 0; i < 8; i++) {
    response.write(': keepalive\n\n');
    await new Promise((resolve) => setTimeout(resolve, STREAM_PAUSE_ms));
  }
  response.end('data: {"choices":[]}\n\ndata: [DONE]\n\n');
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

const LOAD = {
  object: 'maskroute.load',
  model: MODEL.id,
  running: 0,
  waiting: 0,
  capacity: 64,
  draining: false,
  hot_masks: [],
};

const loads: Record<string, object> = {
  loaded: { running: 8, waiting: 3 },
  stopping: { draining: true },
};
const loadHeader = (mood: string) =>
  mood === 'loaded' ? 'running=8;waiting=3;capacity=64' : 'running=0;waiting=0;capacity=64';

const ENCODER_ENTRY = { id: 'test-encoder', object: 'maskroute.encoder', encoder: ENCODER };

/** The faults are those of the encoder server. */
function embeddings(texts: string[], response: ServerResponse): void {
  const is = (fault: string) => texts.some((text) => text.startsWith(fault));
  if (is('!hang')) return;
  if (is('!fail')) {
    json(response, 500, wireError('engine_failed'));
    return;
  }
  const right = () => texts.map(vectorOf);
  const wrong = { '!short': texts.map(() => [1, 2]), '!missing': [], '!words': texts.map(() => ['a', 'b']) };
  const vectors = Object.entries(wrong).find(([fault]) => is(fault))?.[1] ?? right();
  const data = vectors.map((embedding, index) => ({ object: 'embedding', index, embedding }));
  json(response, 200, { object: 'list', model: 'test-encoder', data });
}

/** What a proxy or a tunnel says when nothing answers behind it, whatever was asked. */
function page(response: ServerResponse, status: number): void {
  response.writeHead(status, { 'content-type': 'text/html' }).end(`<h1>Error ${status}</h1>`);
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
  const text = JSON.stringify(value);
  response
    .writeHead(status, { 'content-type': 'application/json', 'content-length': Buffer.byteLength(text) })
    .end(text);
}
