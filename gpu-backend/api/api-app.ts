/**
 * Composes the HTTP API: health for everybody, metrics for scrapers, and everything under `/v1` for authenticated callers.
 * This file has the small endpoints (models, load, encoders, embeddings) and turns errors into responses; `completions.ts`
 * and `jobs-api.ts` have the others.
 */
import { randomBytes } from 'node:crypto';
import { Hono } from 'hono';
import {
  BACKEND_HEADERS,
  type EncoderEntry,
  formatLoad,
  type Load,
  type LoadReport,
} from '../../shared/wire/backend-load.ts';
import { MaskrouteError, toMaskrouteError, USELESS_TO_RETRY, unrouted } from '../../shared/wire/errors.ts';
import { readFields } from '../../shared/wire/fields.ts';
import { embeddingsRequest } from '../../shared/wire/openai.ts';
import { DENSE_SUFFIX, HEADERS, type ModelEntry, REQUEST_ID_PATTERN } from '../../shared/wire/protocol.ts';
import type { Engine } from '../engine/engine.ts';
import { completionRoutes } from './completions.ts';
import { jobRoutes } from './jobs-api.ts';
import {
  type ApiContext,
  type ApiEnv,
  type ApiParts,
  type ServedModel,
  setHeaders,
  tenantOf,
} from './parts.ts';

export function createApp(parts: ApiParts): Hono<ApiEnv> {
  const app = new Hono<ApiEnv>();
  app.use(async (c, next) => {
    const given = c.req.header(HEADERS.requestId) ?? '';
    const requestId = REQUEST_ID_PATTERN.test(given) ? given : `req_${randomBytes(12).toString('hex')}`;
    c.set('requestId', requestId);
    c.header(HEADERS.requestId, requestId);
    await next();
    // The client's next request then comes on a new connection, which a load balancer can route to another backend.
    if (parts.lifecycle.draining) c.header('connection', 'close');
  });
  app.route('/', healthRoutes(parts));
  app.use('/v1/*', async (c, next) => {
    c.set('caller', await parts.authenticate(c.req.header('authorization')));
    // Other threads compare signatures, and may have compared those of many requests since the last turn.
    await parts.turn();
    await next();
    c.header(...loadHeader(parts.model.engine));
  });
  app.route('/', modelRoutes(parts.model));
  app.route('/', loadRoutes(parts));
  app.route('/', completionRoutes(parts));
  app.route('/', embeddingRoutes(parts));
  app.route('/', jobRoutes(parts));
  app.notFound((c) => {
    const { error, allowed } = unrouted(app, c.req);
    if (allowed.length > 0) c.header('allow', allowed.join(', '));
    return errorResponse(parts, c, error);
  });
  app.onError((error, c) => errorResponse(parts, c, toMaskrouteError(error)));
  return app;
}

/**
 * `/healthz` is the liveness probe: a failing process has to be restarted. `/readyz` is the readiness probe: a draining
 * process is live but not ready. Both are public, so they answer only up or down; the reason goes to the log. `/metrics`
 * reveals much about the model and its use, so it needs a key.
 */
function healthRoutes({ lifecycle, metrics, model, limits, expectScraper, log }: ApiParts): Hono<ApiEnv> {
  const trouble = (): string | undefined => {
    if (model.engine.failure !== undefined) return 'The engine has stopped.';
    return model.engine.silence_ms() > limits.engineSilence_ms ? 'The engine does not answer.' : undefined;
  };
  /** Probes come every few seconds, so each reason is logged once. */
  let logged: string | undefined;
  const isUnhealthy = (): boolean => {
    const why = trouble();
    if (why !== logged && why !== undefined) log.error({ why }, 'unhealthy');
    logged = why;
    return why !== undefined;
  };
  return new Hono<ApiEnv>()
    .get('/healthz', (c) =>
      isUnhealthy() ? unhealthy(c, 'internal_error', 'Down.') : c.json({ status: 'ok' }),
    )
    .get('/readyz', (c) =>
      isUnhealthy() || lifecycle.draining
        ? unhealthy(c, 'not_ready', 'Not ready.')
        : c.json({ status: 'ready' }),
    )
    .get('/metrics', async (c) => {
      expectScraper(c.req.header('authorization'));
      return c.body(await metrics.registry.metrics(), 200, { 'content-type': metrics.registry.contentType });
    });
}

const unhealthy = (c: ApiContext, code: 'internal_error' | 'not_ready', message: string): Response => {
  const error = new MaskrouteError(code, message);
  return c.json(error.toWire(), error.status as 503);
};

/** Default `retry-after` for errors that do not set it. */
const RETRY_AFTER_s: Partial<Record<MaskrouteError['code'], number>> = { queue_full: 1, queue_timeout: 2 };

function errorResponse(parts: ApiParts, c: ApiContext, error: MaskrouteError): Response {
  const { status, code } = error;
  const endpoint = c.req.path.startsWith('/v1/') ? (ENDPOINTS[c.req.path] ?? 'other') : 'other';
  noteError(parts, error, { request_id: c.get('requestId'), method: c.req.method, endpoint });
  const retryAfter_s = error.retryAfter_s ?? RETRY_AFTER_s[code];
  if (retryAfter_s !== undefined) c.header('retry-after', String(Math.ceil(retryAfter_s)));
  if (USELESS_TO_RETRY.includes(code)) c.header('x-should-retry', 'false');
  // The client is still sending this body, so the connection cannot be reused.
  if (code === 'request_timeout') c.header('connection', 'close');
  return c.body(JSON.stringify(error.toWire()), status as 400, { 'content-type': 'application/json' });
}

/** Counts an error and logs it. `request`: what is known of the request. */
export function noteError(
  { log, metrics }: ApiParts,
  error: MaskrouteError,
  request: { readonly endpoint: string; readonly [name: string]: string },
): void {
  const { status, code } = error;
  metrics.request(request.endpoint, status, code);
  const detail = { ...request, status, code };
  if (status >= 500) log.error({ ...detail, err: error.cause ?? error }, 'request failed');
  else log.info(detail, 'request refused');
}

const ENDPOINTS: Record<string, string> = {
  '/v1/chat/completions': 'chat',
  '/v1/completions': 'completions',
  '/v1/responses': 'responses',
  '/v1/embeddings': 'embeddings',
  '/v1/models': 'models',
};

/* The served model and the load, for whoever chooses between backends. */

/** The served model, and `<model>:dense` for the unpruned one. */
function modelRoutes(model: ServedModel): Hono<ApiEnv> {
  const entries = [modelEntry(model, false), modelEntry(model, true)];
  return new Hono<ApiEnv>()
    .get('/v1/models', (c) => c.json({ object: 'list', data: entries }))
    .get('/v1/models/:id{.+}', (c) => {
      const entry = entries.find(({ id }) => id === c.req.param('id'));
      if (entry !== undefined) return c.json(entry);
      throw new MaskrouteError('model_not_found', 'This model is not served here.', { param: 'model' });
    });
}

function modelEntry(model: ServedModel, dense: boolean): ModelEntry {
  const { hash, blockCount, contextTokens, surrogates = null } = model.engine.model;
  return {
    id: dense ? model.name + DENSE_SUFFIX : model.name,
    object: 'model',
    created: model.created_s,
    owned_by: 'maskroute',
    maskroute: { hash, block_count: blockCount, context_tokens: contextTokens, dense, surrogates },
  };
}

const loadOf = (engine: Engine): Load => {
  const { requestsRunning, requestsWaiting, queueCapacity } = engine.stats();
  return { running: requestsRunning, waiting: requestsWaiting, capacity: queueCapacity };
};

/** The load as a header of every answer, so that callers need not ask for it. */
const loadHeader = (engine: Engine): [name: string, value: string] => [
  BACKEND_HEADERS.load,
  formatLoad(loadOf(engine)),
];

const loadRoutes = ({ model, lifecycle }: ApiParts): Hono<ApiEnv> =>
  new Hono<ApiEnv>().get('/v1/load', (c) =>
    c.json({
      object: 'maskroute.load',
      model: model.name,
      ...loadOf(model.engine),
      draining: lifecycle.draining || model.engine.failure !== undefined,
    } satisfies LoadReport),
  );

/* `POST /v1/embeddings` in OpenAI's format, and `GET /v1/encoders`, which names the encoder for mask sets. */

const embeddingRoutes = ({ bodies, encoders, lifecycle, metrics }: ApiParts): Hono<ApiEnv> =>
  new Hono<ApiEnv>()
    .get('/v1/encoders', async (c) => {
      const found = await encoders.installed();
      const data: EncoderEntry[] =
        found === undefined ? [] : [{ id: found.id, object: 'maskroute.encoder', encoder: found.spec }];
      return c.json({ object: 'list', data });
    })
    .post('/v1/embeddings', async (c) => {
      lifecycle.stopping.throwIfAborted();
      const raw = await bodies.readJson(c.req.raw, tenantOf(c));
      const { body: request, ignored } = readFields(embeddingsRequest, raw);
      setHeaders(c, ignored);
      const texts = typeof request.input === 'string' ? [request.input] : request.input;
      const abort = new AbortController();
      const signal = AbortSignal.any([c.req.raw.signal, abort.signal]);
      const leave = lifecycle.beginEmbeddings(abort);
      const { vectors, tokens, spec } = await encoders.embed(request.model, texts, signal).finally(leave);
      const width = vectors[0]!.length;
      if (request.dimensions != null && request.dimensions !== width) {
        const message = `dimensions: this encoder has ${width}, and its vectors cannot be shortened.`;
        throw new MaskrouteError('invalid_request', message, { param: 'dimensions' });
      }
      metrics.request('embeddings', 200, 'ok');
      const encode = request.encoding_format === 'base64' ? toBase64 : toNumbers;
      return c.json({
        object: 'list',
        model: request.model,
        data: vectors.map((vector, index) => ({ object: 'embedding', index, embedding: encode(vector) })),
        usage: { prompt_tokens: tokens, total_tokens: tokens },
        // The edge compares it with the encoder of its mask sets.
        maskroute: { encoder: spec },
      });
    });

const toNumbers = (vector: Float32Array): number[] => [...vector];
/** 32-bit floats, little-endian; every machine that ONNX Runtime supports is little-endian. */
const toBase64 = ({ buffer, byteOffset, byteLength }: Float32Array): string =>
  Buffer.from(buffer, byteOffset, byteLength).toString('base64');
