/**
 * The backends of the edge's tests: the real app over a scripted engine, on a real socket. One server stands for all
 * of them and keeps what each was asked. A test says how a backend is (`POST /mood/NAME`), or what one request meets
 * (by its field `user`, which backends ignore). What no app would send comes from broken-backend.ts.
 */
import type { IncomingMessage, ServerResponse } from 'node:http';
import { getRequestListener } from '@hono/node-server';
import { RESPONSE_ALREADY_SENT } from '@hono/node-server/utils/response';
import { LRUCache } from 'lru-cache';
import { createApp } from '../../../gpu-backend/api/api-app.ts';
import { type Authenticate, createAuthenticator } from '../../../gpu-backend/api/auth.ts';
import {
  type ApiLimits,
  type ApiParts,
  DEFAULT_LIMITS,
  Lifecycle,
  openParts,
  type ServedModel,
  type TokenText,
} from '../../../gpu-backend/api/parts.ts';
import type { EncoderService } from '../../../gpu-backend/encoder/encoder-service.ts';
import { PLAIN_FORMAT } from '../../../gpu-backend/model/tokenizer/tool-format.ts';
import { type ModelHash, maskBits, maskId, type SurrogatesId, sparsity } from '../../../shared/mask/mask.ts';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { messageText } from '../../../shared/wire/openai.ts';
import { internalMaskPath, type MaskRecord } from '../../../shared/wire/protocol.ts';
import { createVerifier } from '../../../shared/wire/service-token.ts';
import { apiOptions } from '../../gpu-backend/api/harness.ts';
import {
  byteGrammars,
  END_TOKEN,
  type Script,
  scriptedEngine,
} from '../../gpu-backend/api/scripted-engine.ts';
import { CUT, FORGOTTEN, gatewayPage, halfObject, UNASKED, wrongVectors } from './broken-backend.ts';
import {
  BACKEND_KEY,
  BACKEND_KEY_2,
  ENCODER,
  MODEL,
  type Recorded,
  STREAM_PAUSE_ms,
  TEST_MASKS,
  UNKNOWN_MASK_ms,
} from './constants.ts';
import { vectorOf } from './encoder-server.ts';
import { listen, type RunningServer } from './http-server.ts';

const error = (code: ConstructorParameters<typeof MaskrouteError>[0]) =>
  new MaskrouteError(code, `the backend says ${code}`);

/** Three tokens; where log-probabilities are asked for, four, the third of which is another one under a mask. */
const USUAL: Script = {
  answer: ({ logprobs, plan }) =>
    logprobs === undefined ? [0, 1, 2, END_TOKEN] : [0, 1, sparsity(plan.mask) === 0 ? 2 : 12, 3, END_TOKEN],
  timings: (tokens) => ({ queue_ms: 1, prefill_ms: 2, decode_ms: 10 * tokens, stepGap_ms: 4 }),
  slots: 1_000,
  queueCapacity: 64,
  contextTokens: 2048,
};

const failing = (afterTokens: number, code: Parameters<typeof error>[0]): Partial<Script> => ({
  failure: { afterTokens, error: error(code) },
});

/** The first token of a stream comes at once. */
const PACED: Partial<Script> = { step_ms: (token) => (token === 0 ? 0 : STREAM_PAUSE_ms) };

/** What the engine does with one request, by name. */
const SCRIPTS: Readonly<Record<string, Partial<Script>>> = {
  sick: failing(0, 'engine_failed'),
  'sick-late': failing(3, 'engine_failed'),
  'slow-schema': failing(3, 'invalid_schema'),
  'spent-stopping': failing(3, 'not_ready'),
  deadline: failing(3, 'deadline_exceeded'),
  'deadline-mid-stream': failing(3, 'deadline_exceeded'),
  'slow-refusal': { prefill_ms: 400, ...failing(0, 'model_not_found') },
  'waits-too-long': { prefill_ms: 400, ...failing(0, 'queue_timeout') },
  'slow-first': { prefill_ms: 400 },
  'slow-whole': { prefill_ms: 400 },
  'slow-tokens': { prefill_ms: 8 * STREAM_PAUSE_ms },
  'stream-forever': { answer: () => [0] },
  hang: { stallsAfter: 0 },
  busy: { step_ms: 0, stallsAfter: 3 },
  'die-mid-stream': { stallsAfter: 2 },
  'vanish-mid-stream': { stallsAfter: 2 },
  'stall-mid-stream': { stallsAfter: 2 },
  'vanish-after-many': { answer: () => [0], step_ms: 2, stallsAfter: 400 },
};

/** A backend that is set up in another way, for requests of this name. */
type Setup = {
  readonly script?: Partial<Script>;
  readonly limits?: Partial<ApiLimits>;
  readonly door?: 'strict' | 'locked';
  /** Another process than the one that answered: it knows no answer. */
  readonly isNew?: boolean;
  readonly knowsMasks?: boolean;
  /** Of the weights that it serves under the model's name. */
  readonly modelHash?: string;
  readonly surrogates?: SurrogatesId;
  readonly encoderRevision?: string;
};
const SMALL: Setup = { script: { contextTokens: 1 } };
const SETUPS: Readonly<Record<string, Setup>> = {
  usual: {},
  loaded: { script: { stats: { requestsRunning: 8, requestsWaiting: 3 } } },
  strict: { door: 'strict' },
  unauthorized: { door: 'locked' },
  restarted: { isNew: true },
  'queue-full': { script: { slots: 0, queueCapacity: 0, retryAfter_s: 7 } },
  'masks-unknown': { knowsMasks: false },
  'other-weights': { modelHash: 'b'.repeat(64) },
  'with-surrogates': { surrogates: `s_${'0'.repeat(24)}` as SurrogatesId },
  'other-encoder': { encoderRevision: 'r2' },
  'too-long': SMALL,
  'too-long-unmeasured': SMALL,
  'slow-tokens': { limits: { commit_ms: 1, keepalive_ms: STREAM_PAUSE_ms } },
  'waits-too-long': { limits: { commit_ms: 1 } },
};
/** What backends of these moods list, whatever they serve. */
const MODELS_BY_MOOD: Readonly<Record<string, readonly object[]>> = {
  'no-models': [],
  'odd-models': [{ name: 'a list of another version' }],
};
/** Those that are so whatever is asked. */
const MOODS_OF_ALL = new Set([
  'loaded',
  'strict',
  'restarted',
  'other-weights',
  'with-surrogates',
  'other-encoder',
]);

const COMPLETIONS = new Set(['/v1/chat/completions', '/v1/completions', '/v1/responses']);

type App = ReturnType<typeof createApp>;

/** One backend, until it is told to stop; then another process takes its place. */
type Backend = {
  mood: string;
  lifecycle: Lifecycle;
  recentAnswers: ApiParts['recentAnswers'];
  /** By setup. */
  apps: Map<string, Promise<App>>;
  /** What each request meets, by its id. */
  readonly met: Map<string, Partial<Script>>;
};
const newAnswers = (): ApiParts['recentAnswers'] => new LRUCache({ max: 5_000 });
const freshProcess = () => ({
  lifecycle: new Lifecycle(),
  recentAnswers: newAnswers(),
  apps: new Map<string, Promise<App>>(),
});

export async function startBackend(): Promise<RunningServer> {
  // Another edge, which has none of our masks, and takes a while to say so.
  const strangeEdge = await listen((_request, response) => {
    setTimeout(() => response.writeHead(404).end(), UNKNOWN_MASK_ms);
  });
  const backends = new Backends(strangeEdge.url);
  const handle = (request: Request, sockets: Sockets) => backends.handle(request, sockets);
  const server = await listen(getRequestListener(handle as never, { overrideGlobalObjects: false }));
  await backends.open(server.url);
  return {
    url: server.url,
    async close() {
      await Promise.all([server.close(), strangeEdge.close()]);
      await backends.close();
    },
  };
}

type Sockets = { readonly incoming: IncomingMessage; readonly outgoing: ServerResponse };

/** One request for a backend, as it came. */
type Asked = Sockets & {
  readonly request: Request;
  readonly text: string;
  readonly place: string;
  readonly path: string;
  readonly entry: Recorded;
};

class Backends {
  /** By place. */
  readonly #backends = new Map<string, Backend>();
  readonly #recorded = new Map<string, Recorded>();
  /** The backends that saw a request, in turn. */
  readonly #places = new Map<string, string[]>();
  readonly #forgotten = new Set<string>();
  readonly #closing: (() => Promise<void>)[] = [];
  readonly #strangeEdgeUrl: string;
  #url = '';

  constructor(strangeEdgeUrl: string) {
    this.#strangeEdgeUrl = strangeEdgeUrl;
  }

  /** `url`: where the server listens. It is the edge as well, for masks. */
  async open(url: string): Promise<void> {
    this.#url = url;
    await this.#appOf('', 'usual');
  }

  async close(): Promise<void> {
    for (const close of this.#closing) await close();
  }

  async handle(request: Request, { incoming, outgoing }: Sockets): Promise<Response> {
    const [, place = '', path = incoming.url!] = /^\/at\/([^/]+)(.*)$/.exec(incoming.url!) ?? [];
    if (path.startsWith('/mood/'))
      return await this.#setMood(path.slice('/mood/'.length), await request.text());
    const { mood } = this.#at(place);
    if (mood === 'down') outgoing.destroy();
    if (mood === 'down' || mood === 'mute') return RESPONSE_ALREADY_SENT;
    if (path.startsWith('/recorded/'))
      return Response.json(this.#record(decodeURIComponent(path.slice('/recorded/'.length))));
    const mask = MASKS.get(path);
    if (mask !== undefined) return Response.json(mask);
    const text = await request.text();
    const entry: Recorded = {
      path,
      place,
      headers: incoming.headers as Record<string, string>,
      body: text === '' ? null : JSON.parse(text),
      hungUp: false,
      sent_bytes: 0,
    };
    const id = String(incoming.headers['x-request-id']);
    this.#places.set(id, [...(this.#places.get(id) ?? []), place]);
    this.#recorded.set(id, entry);
    outgoing.on('close', () => {
      entry.hungUp = !outgoing.writableFinished;
    });
    return (
      (await this.#answer({ request, text, place, path, entry, incoming, outgoing })) ?? RESPONSE_ALREADY_SENT
    );
  }

  #record(id: string) {
    const entry = this.#recorded.get(id);
    return entry === undefined ? null : { ...entry, places: this.#places.get(id) };
  }

  #at(place: string): Backend {
    const found = this.#backends.get(place) ?? { mood: 'good', met: new Map(), ...freshProcess() };
    this.#backends.set(place, found);
    return found;
  }

  async #setMood(place: string, mood: string): Promise<Response> {
    const backend = this.#at(place);
    backend.mood = mood;
    if (mood === 'stopping') void backend.lifecycle.drain(DEFAULT_LIMITS);
    else if (backend.lifecycle.draining) Object.assign(backend, freshProcess());
    // It is there before its first request, whose time may be short.
    await this.#appOf(place, SETUPS[mood] === undefined ? 'usual' : mood);
    return Response.json({});
  }

  #appOf(place: string, setup: string): Promise<App> {
    const backend = this.#at(place);
    const app = backend.apps.get(setup) ?? this.#createApp(place, backend, SETUPS[setup]!);
    backend.apps.set(setup, app);
    return app;
  }

  async #createApp(
    place: string,
    { lifecycle, recentAnswers, met }: Backend,
    { script, limits, door, isNew, knowsMasks = true, modelHash, surrogates, encoderRevision }: Setup,
  ): Promise<App> {
    const of: Script['of'] = ({ requestId }) => met.get(requestId.replace(/#\d+$/, ''));
    const model = servedModel({ ...USUAL, ...script, of }, modelHash, surrogates);
    const { options, close } = await apiOptions(model, limits, {
      edgeUrl: knowsMasks ? this.#url : this.#strangeEdgeUrl,
    });
    this.#closing.push(close);
    const audience = place === '' ? this.#url : `${this.#url}/at/${place}`;
    return createApp({
      ...openParts(options),
      encoders: encodersOf(encoderRevision),
      lifecycle,
      recentAnswers: isNew ? newAnswers() : recentAnswers,
      authenticate:
        door === 'strict'
          ? createAuthenticator(BACKEND_KEY, { audience, otherBackendKey: BACKEND_KEY_2 })
          : door === 'locked'
            ? createAuthenticator('the-key-of-another-edge')
            : anyClock,
    });
  }

  /** Undefined where the socket has the answer already. */
  async #answer(asked: Asked): Promise<Response | undefined> {
    const { path, place, entry, outgoing } = asked;
    const { mood } = this.#at(place);
    if (mood.startsWith('gateway-')) return void gatewayPage(outgoing, Number(mood.slice('gateway-'.length)));
    const models = path === '/v1/models' ? MODELS_BY_MOOD[mood] : undefined;
    if (models !== undefined) return Response.json({ object: 'list', data: models });
    if (mood === 'half-load' && path === '/v1/load') return void halfObject(outgoing, 200);
    if (COMPLETIONS.has(path)) return await this.#complete(asked);
    const wrong = path === '/v1/embeddings' && wrongVectors(entry.body?.input as string[]);
    if (wrong) return Response.json({ object: 'list', model: 'test-encoder', data: embeddingsOf(wrong) });
    const isForgotten = this.#forgotten.has(path.replace('/v1/answers/', ''));
    const setup = isForgotten ? 'restarted' : MOODS_OF_ALL.has(mood) ? mood : 'usual';
    return await this.#ask(asked, setup, { signal: hangUp(asked) });
  }

  async #complete(asked: Asked): Promise<Response | undefined> {
    const { place, entry, outgoing } = asked;
    const { mood, met } = this.#at(place);
    const user = String(entry.body?.user ?? mood);
    // `__proto__` and what else every object has is nobody's setup.
    const isNamed = (mood === 'good' || MOODS_OF_ALL.has(mood)) && !(user in {});
    const name = isNamed ? user : mood;
    const setup = [name, mood].find((one) => SETUPS[one] !== undefined) ?? 'usual';
    const stall = Promise.withResolvers<void>();
    const pace = entry.body?.stream === true ? PACED : {};
    met.set(entry.headers['x-request-id']!, { ...pace, ...SCRIPTS[name], onStall: stall.resolve });
    // What a backend that is `busy` has made does not depend on how long the edge waits for it.
    const signal = hangUp(asked, name === 'busy' ? stall.promise : undefined);
    const { completion } = (entry.body?.maskroute ?? {}) as { completion?: string };
    if (FORGOTTEN.has(name)) this.#forgotten.add(completion!);
    const unasked = UNASKED[name];
    if (unasked !== undefined) return void (await unasked(outgoing, entry));
    // Somebody's backend that knows no streams.
    const whole = name === 'slow-whole' ? JSON.stringify({ ...entry.body, stream: false }) : undefined;
    const answer = this.#ask(asked, setup, { signal, body: whole });
    const cut = CUT[name];
    return cut === undefined ? await answer : void (await cut(answer, outgoing));
  }

  /** `body`: instead of what was sent. */
  async #ask(
    { request, text, place, path, incoming, outgoing }: Asked,
    setup: string,
    { signal, body = text }: { readonly signal: AbortSignal; readonly body?: string | undefined },
  ): Promise<Response> {
    const app = await this.#appOf(place, setup);
    const headers = new Headers(request.headers);
    if (body !== text) headers.delete('content-length');
    const init = { method: request.method, headers, signal, ...(body === '' ? {} : { body }) };
    return await app.fetch(new Request(new URL(path, this.#url), init), { incoming, outgoing });
  }
}

/** Aborts when the edge has hung up and `heardOf` has come. */
function hangUp({ entry, outgoing }: Asked, heardOf: Promise<void> = Promise.resolve()): AbortSignal {
  const left = new AbortController();
  outgoing.on('close', () => {
    if (entry.hungUp) heardOf.then(() => left.abort());
  });
  return left.signal;
}

/** What the edge answers when a backend asks it for a mask. */
const MASKS: ReadonlyMap<string, MaskRecord> = new Map(
  TEST_MASKS.map((mask) => {
    const modelHash = MODEL.hash as ModelHash;
    const id = maskId(modelHash, mask);
    const record = { id, modelHash, blockCount: MODEL.blockCount, bits: maskBits(mask) };
    return [internalMaskPath(id), record];
  }),
);

const verify = createVerifier([BACKEND_KEY, BACKEND_KEY_2], 'backend');

/** Tests move the edge's clock, so this door goes by the clock of whoever signed; `strict` by its own. */
const anyClock: Authenticate = async (authorization) => {
  const token = authorization?.replace(/^Bearer /, '') ?? '';
  if (token === BACKEND_KEY) return { tenant: undefined, edge: undefined, mayRunJobs: true };
  const payload = Buffer.from(token.split('.')[1] ?? '', 'base64url').toString() || '{}';
  const { tenant, edge, scope } = await verify(token, JSON.parse(payload).issuedAt_s);
  return { tenant, edge: edge === '' ? undefined : edge, mayRunJobs: scope === 'jobs' };
};

const servedModel = (script: Script, hash = MODEL.hash, surrogates?: SurrogatesId): ServedModel => ({
  name: MODEL.id,
  created_s: 0,
  engine: scriptedEngine(script, {
    hash: hash as ModelHash,
    blockCount: MODEL.blockCount,
    ...(surrogates === undefined ? {} : { surrogates }),
  }),
  text: wordText,
  grammars: byteGrammars,
  endTokenIds: [END_TOKEN],
});

/** A token a word, `t` and a number. */
const wordText: TokenText = {
  toolFormat: PLAIN_FORMAT,
  tokenBytesMax: 64,
  async encode(job, { spent }) {
    const texts = job.type === 'chat' ? [job.messages.map(messageText).join(' ')] : job.texts;
    const prompts = texts.map((text) => Int32Array.from(text.split(' '), (word) => word.length % 256));
    spent.tokens = prompts.reduce((sum, { length }) => sum + length, 0);
    if (prompts.some(({ length }) => length > job.tokensMax)) return { type: 'too_long' };
    return { type: 'encoded', prompts };
  },
  tokenBytes: (id) => new TextEncoder().encode(`t${id}`),
  createDecoder: () => ({ push: (id) => `t${id}`, flush: () => '' }),
};

/** The faults are those of the encoder server. */
function encodersOf(revision: string = ENCODER.revision): EncoderService {
  const spec = { ...ENCODER, revision };
  return {
    installed: async () => ({ id: 'test-encoder', spec }),
    async embed(_name, texts, signal) {
      const is = (fault: string) => texts.some((text) => text.startsWith(fault));
      if (is('!hang')) await new Promise((resolve) => signal.addEventListener('abort', resolve));
      if (is('!fail')) throw error('engine_failed');
      return { vectors: texts.map((text) => Float32Array.from(vectorOf(text))), tokens: texts.length, spec };
    },
    close: async () => {},
  };
}

const embeddingsOf = (vectors: readonly unknown[]) =>
  vectors.map((embedding, index) => ({ object: 'embedding', index, embedding }));
