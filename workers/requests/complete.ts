/** The two completion endpoints: route, forward, and let the answer through as it comes. */

import { Hono } from 'hono';
import { BACKEND_HEADERS } from '../../shared/wire/backend-load.ts';
import { readFields } from '../../shared/wire/fields.ts';
import { chatRequest, completionRequest } from '../../shared/wire/openai.ts';
import { HEADERS, splitModelName } from '../../shared/wire/protocol.ts';
import { type Patience, patienceOf } from '../backends/attempt.ts';
import { placeOf, regionOf } from '../base/place.ts';
import { createWait } from '../base/waiting.ts';
import { tenantOnly } from '../http/authentication.ts';
import { type AppContext, type AppEnv, holdOf } from '../http/context.ts';
import { methodNotAllowed } from '../http/error-answers.ts';
import { readBody } from '../http/request-body.ts';
import {
  denseDecision,
  type RoutableBody,
  type Routed,
  type RouteTimings,
  routeEcho,
  routeRequest,
} from '../routing/decision.ts';
import { admit } from './admission.ts';
import { type RelayOptions, relayStream, streamOf } from './answer-stream.ts';
import type { AskBackends, RequestRecord, WatchedAnswer, WatchedBody } from './request-record.ts';

/*
 * The body that a backend gets: the client's own, and what was decided about it. The client's text stays as it is, and
 * the rest is put at its end: to write a prompt as JSON again would cost more than it costs to parse it. Only where the
 * client says something itself of what is put there is all of it written anew.
 */

/** A JSON object, and the text that it was parsed from. */
type ClientBody = { readonly value: object; readonly text: string };

/** @param value not empty, nor is `added`, whose fields win. */
export function forwardedBody({ value, text }: ClientBody, added: Record<string, unknown>): string {
  if (Object.keys(added).some((name) => Object.hasOwn(value, name))) {
    return JSON.stringify({ ...value, ...added });
  }
  return `${text.slice(0, text.lastIndexOf('}'))},${JSON.stringify(added).slice(1)}`;
}

/* The routing decision as response headers: every one is there on every completion, except the two that say why not. */

/** Stands where nothing was picked: no live mask set, no cluster. */
const NONE = 'none';

export function decisionHeaders(routed: Routed): Record<string, string> {
  const { decision, assignment, timings } = routed;
  return {
    [HEADERS.maskSet]: decision.set?.name ?? NONE,
    [HEADERS.version]: decision.set?.version ?? NONE,
    [HEADERS.cluster]: decision.cluster === null ? NONE : String(decision.cluster),
    [HEADERS.mask]: decision.maskId ?? 'custom',
    ...(decision.sparsity === null ? {} : { [HEADERS.sparsity]: String(decision.sparsity) }),
    [HEADERS.experiment]: assignment.experiment,
    [HEADERS.variant]: assignment.variant,
    [HEADERS.region]: assignment.region,
    ...(decision.fallback === null ? {} : { [HEADERS.fallback]: decision.fallback }),
    [HEADERS.serverTiming]: serverTiming(timings, undefined),
  };
}

/**
 * The platform's clock moves in whole milliseconds, and once deployed only while the worker waits for I/O:
 * work that is done in less reads as 0. `backend_ms` is the time until the backend's first byte; undefined when no
 * backend was asked.
 */
function serverTiming(timings: RouteTimings, backend_ms: number | undefined): string {
  const durations = [
    `assign;dur=${Math.round(timings.assign_ms)}`,
    `embed;dur=${Math.round(timings.embed_ms)}`,
    `route;dur=${Math.round(timings.route_ms)}`,
  ];
  if (backend_ms !== undefined) durations.push(`backend;dur=${Math.round(backend_ms)}`);
  return durations.join(', ');
}

/** What can be routed, and the header that names what of the body is ignored. */
type ReadBody = { readonly routable: RoutableBody; readonly ignored: Record<string, string> };

/** @throws MaskrouteError `invalid_request`. */
export function parseChat(raw: unknown): ReadBody {
  const { body, ignored } = readFields(chatRequest, raw);
  return { routable: { kind: 'chat', body }, ignored };
}
/** @throws MaskrouteError `invalid_request`. */
export function parseCompletion(raw: unknown): ReadBody {
  const { body, ignored } = readFields(completionRequest, raw);
  return { routable: { kind: 'completion', body }, ignored };
}

export const completions = new Hono<AppEnv>()
  .post('/chat/completions', tenantOnly, async (c) => {
    const { value, text } = await readBody(c.req.raw);
    return await complete(c, { value: value as object, text }, parseChat(value));
  })
  .post('/completions', tenantOnly, async (c) => {
    const { value, text } = await readBody(c.req.raw);
    return await complete(c, { value: value as object, text }, parseCompletion(value));
  })
  .all('/chat/completions', methodNotAllowed('POST'))
  .all('/completions', methodNotAllowed('POST'));

/**
 * What the client is told in headers. They are collected in a plain object, and become headers once, with the answer:
 * each that is set on its own crosses into the runtime, and is copied there again when the answer is made.
 */
type ReplyHeaders = Record<string, string>;

async function complete(
  c: AppContext,
  client: ClientBody,
  { routable, ignored }: ReadBody,
): Promise<Response> {
  const headers: ReplyHeaders = { [HEADERS.requestId]: c.get('requestId'), ...ignored };
  try {
    return await admitted(c, client, routable, headers);
  } catch (error) {
    // An error says as much of the decision as was known by then.
    setHeaders(c, headers);
    throw error;
  }
}

async function admitted(
  c: AppContext,
  client: ClientBody,
  routable: RoutableBody,
  headers: ReplyHeaders,
): Promise<Response> {
  const services = c.get('services');
  const caller = c.get('caller');
  const patience = patienceOf(c.req.header(BACKEND_HEADERS.deadline), services.config.BACKEND_TIMEOUT_MS);
  const { record, routed } = await admit(
    { ...services, askBackends: askBackends(c), stall_ms: services.config.BACKEND_STALL_MS },
    {
      ...{ caller, routable, patience, signal: c.req.raw.signal, hold: holdOf(c) },
      onLimits: (limits) => Object.assign(headers, limits),
      answered: (event, seen) =>
        services.comparison.maybeCompare({
          ...{ event, tenant: caller.tenant },
          ...{ routable, routed: seen, hold: holdOf(c) },
        }),
    },
    () => route(c, routable),
  );
  services.traffic.seen(caller.tenant, routed, holdOf(c));
  const sent = { aByte: false };
  const answering = record.watch(ask(c, client, { routable, patience, record, sent, headers }, routed));
  const { STREAM_KEEPALIVE_MS: keepalive_ms } = services.config;
  const wait = createWait(keepalive_ms);
  const early = routable.body.stream === true ? await wait.within(answering, keepalive_ms) : await answering;
  const relay = { wait, keepalive_ms, requestId: c.get('requestId') };
  if (early !== 'late') return answer(early, headers, relay);
  // No backend has answered yet. A comment keeps the client; the status is sent with it, so nothing is tried again.
  sent.aByte = true;
  Object.assign(headers, {
    'content-type': 'text/event-stream; charset=utf-8',
    'cache-control': 'no-cache, no-transform',
  });
  return new Response(relayStream(answering, relay), { headers });
}

/** What the client sees of the retries: nothing, and none once a byte of the answer is with it. */
type Sent = { readonly aByte: boolean };

/** A request on its way, but for what was decided about it. */
type Underway = {
  readonly routable: RoutableBody;
  readonly patience: Patience;
  readonly record: RequestRecord;
  readonly sent: Sent;
  readonly headers: ReplyHeaders;
};

async function ask(c: AppContext, client: ClientBody, underway: Underway, routed: Routed): Promise<Response> {
  const response = await forward(c, client, underway, routed);
  // The client did not ask for the mask, so a mask that the backend cannot use is no error of the client's.
  if (underway.routable.body.mask == null && (await isAboutMask(response))) {
    const decision = denseDecision(routed.decision.set, 'unknown_mask');
    return await forward(c, client, underway, { ...routed, decision });
  }
  return response;
}

/** Whether the backend refused the request, before it generated anything, for its mask. */
async function isAboutMask(response: Response): Promise<boolean> {
  if (response.ok) return false;
  const body = (await response.clone().json()) as { error: { param?: unknown } };
  return body.error.param === 'mask';
}

function answer(response: WatchedAnswer, headers: ReplyHeaders, relay: RelayOptions): Response {
  passHeaders(response.headers, headers);
  const { kind } = response.body;
  const isStream = kind === 'tapped' && headers['content-type']?.startsWith('text/event-stream') === true;
  if (!isStream) relay.wait.end();
  const body = isStream ? relayStream(Promise.resolve(response), relay) : bodyOf(response.body);
  return new Response(body, { status: response.status, headers });
}

const bodyOf = ({ kind, body }: WatchedBody): ReadableStream | ArrayBuffer | null =>
  kind === 'tapped' ? streamOf(body) : body;

async function forward(
  c: AppContext,
  client: ClientBody,
  { routable, patience, record, sent, headers }: Underway,
  routed: Routed,
): Promise<Response> {
  record.asks(routed);
  // Set before the backend is asked, so that its errors carry the decision too.
  Object.assign(headers, decisionHeaders(routed));
  const body = forwardedBody(client, {
    ...(record.answerTokensMax === undefined ? {} : { max_tokens: record.answerTokensMax }),
    mask: routed.decision.mask,
    maskroute: { ...routeEcho(routed), completion: record.completion },
  });
  const { backend, config, namedMasks } = c.get('services');
  const started_ms = performance.now();
  const {
    response,
    backend: id,
    rest,
  } = await backend.call({
    path: routable.kind === 'chat' ? '/v1/chat/completions' : '/v1/completions',
    requestId: c.get('requestId'),
    tenant: c.get('caller').tenant,
    signal: c.req.raw.signal,
    timeout_ms: patience.time_ms,
    stall_ms: config.BACKEND_STALL_MS,
    isFullTime: !patience.isShort,
    onLate: record.late,
    ...(routable.body.stream === true ? { silence_ms: config.BACKEND_SILENCE_MS } : {}),
    wish: {
      region: routed.assignment.region,
      mask: routed.decision.maskId ?? JSON.stringify(routed.decision.mask),
      model: splitModelName(routable.body.model).model,
    },
    mayRetry: () => !sent.aByte,
    hold: holdOf(c),
    body,
  });
  if (response.ok && typeof routable.body.mask === 'string') namedMasks.met(routable.body.mask);
  headers[HEADERS.serverTiming] = serverTiming(routed.timings, performance.now() - started_ms);
  headers[BACKEND_HEADERS.backend] = id;
  record.answeredBy(id, rest);
  return response;
}

export const route = (c: AppContext, routable: RoutableBody): Promise<Routed> => {
  const services = c.get('services');
  const caller = c.get('caller');
  const place = placeOf(c.req.raw, services.config.TRUSTED_FRONT);
  return routeRequest(
    {
      ...services,
      similarityMin: services.config.SIMILARITY_MIN,
    },
    {
      ...{ ...routable, caller, signal: c.req.raw.signal, hold: holdOf(c) },
      ...{ region: regionOf(place), place },
    },
  );
};

const askBackends =
  (c: AppContext): AskBackends =>
  (path, timeout_ms, backend) =>
    c.get('services').backend.askEach(path, timeout_ms, holdOf(c), backend);

/** What the backend says of the answer, and what it knows better than the edge: a custom mask's id and sparsity. */
const PASSED = ['content-type', 'cache-control', 'retry-after', HEADERS.mask, HEADERS.sparsity];

function passHeaders(from: Headers, to: ReplyHeaders): void {
  for (const name of PASSED) {
    const value = from.get(name);
    if (value !== null) to[name] = value;
  }
}

export function setHeaders(c: AppContext, headers: Record<string, string>): void {
  for (const [name, value] of Object.entries(headers)) c.header(name, value);
}
