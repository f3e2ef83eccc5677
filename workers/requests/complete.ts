/**
 * The three completion endpoints, and their dry run. The steps of a request: its key (`tenantOnly`), its body, then in
 * parallel admission (`admit`) and routing (`route`), then the backends (`ask`), and the answer (`Answer`). At the end
 * its account is settled.
 */
import { Hono } from 'hono';
import { DENSE_MASK_ID, maskFromBits, type SkippedLayers, skippedLayers } from '../../shared/mask/mask.ts';
import { BACKEND_HEADERS } from '../../shared/wire/backend-load.ts';
import { toMaskrouteError } from '../../shared/wire/errors.ts';
import { readFields } from '../../shared/wire/fields.ts';
import { chatRequest, completionRequest, type DryRun } from '../../shared/wire/openai.ts';
import { isJsonObject } from '../../shared/wire/parse-body.ts';
import { EVENT_STREAM_HEADERS, HEADERS, TRIAL_HEADERS } from '../../shared/wire/protocol.ts';
import { chatOfResponse, responsesRequest } from '../../shared/wire/responses.ts';
import { patienceOf } from '../backends/attempt.ts';
import { placeOf, regionOf } from '../base/place.ts';
import type { RequestTrace } from '../base/telemetry.ts';
import { tenantOnly } from '../http/authentication.ts';
import { type AppContext, type AppEnv, holdOf, traced } from '../http/context.ts';
import { readBody, readJson } from '../http/request-body.ts';
import {
  type Decision,
  type RoutableBody,
  type Routed,
  type RouteTimings,
  routeEcho,
  routeRequest,
  type Trial,
} from '../routing/decision.ts';
import type { RoutingTable } from '../routing/live-sets.ts';
import { createKeyWatch } from '../tenants/api-keys.ts';
import { type Account, type Asking, admit, requireModel } from './admission.ts';
import { Answer, type Begun, noAnswer } from './answer-stream.ts';
import { ask, type ClientBody, notAsked, type Progress, purposeOf } from './forward.ts';
import { AnswerText, keepTexts } from './read-answer.ts';
import { settle } from './settlement.ts';

export const completions = new Hono<AppEnv>()
  .post('/chat/completions', traced, tenantOnly, (c) => complete(c, 'chat'))
  .post('/completions', traced, tenantOnly, (c) => complete(c, 'completions'))
  .post('/responses', traced, tenantOnly, (c) => complete(c, 'responses'));

type Wire = ClientBody['wire'];

/** The request's body. A deployment in the path, as Azure's clients write it, is the model, whatever the body says. */
async function readNamed(c: AppContext): Promise<{ value: unknown; text: string }> {
  const { value, text } = await readBody(c.req.raw);
  const model = c.req.param('deployment');
  if (model === undefined || !isJsonObject(value)) return { value, text };
  const named = { ...value, model };
  return { value: named, text: JSON.stringify(named) };
}

/**
 * The body for routing, and the header that names ignored fields. A Responses API request is routed as its chat
 * completion. @throws MaskrouteError `invalid_request`.
 */
function parseBody(wire: Wire, raw: unknown): { routable: RoutableBody; ignored: Record<string, string> } {
  switch (wire) {
    case 'chat': {
      const { body, ignored } = readFields(chatRequest, raw);
      return { routable: { kind: 'chat', body }, ignored };
    }
    case 'completions': {
      const { body, ignored } = readFields(completionRequest, raw);
      return { routable: { kind: 'completion', body }, ignored };
    }
    case 'responses': {
      const { body, ignored } = readFields(responsesRequest, raw);
      return { routable: { kind: 'chat', body: chatOfResponse(body) }, ignored };
    }
  }
}

/**
 * Response headers, collected in a plain object and set once, with the answer: setting each one separately would cross
 * into the runtime, and copy it again when the answer is made.
 */
type ReplyHeaders = Record<string, string>;

async function complete(c: AppContext, wire: Wire): Promise<Response> {
  const { value, text } = await readNamed(c);
  const { routable, ignored } = parseBody(wire, value);
  const client: ClientBody = { value: value as object, text, wire };
  const headers: ReplyHeaders = { [HEADERS.requestId]: c.get('requestId'), ...ignored };
  try {
    const { account, routed } = await enter(c, routable, headers);
    return await forward(c, client, account, routed, headers);
  } catch (error) {
    setHeaders(c, headers);
    throw error;
  }
}

/** Admits and routes the request in parallel, so that reserving tokens takes no extra time. */
async function enter(
  c: AppContext,
  routable: RoutableBody,
  headers: ReplyHeaders,
): Promise<{ account: Account; routed: Routed }> {
  const services = c.get('services');
  const caller = c.get('caller');
  const hold = holdOf(c);
  const patience = patienceOf(c.req.header(BACKEND_HEADERS.deadline), services.config.BACKEND_TIMEOUT_MS);
  requireModel(caller.policy, routable.body.model);
  const trace = c.get('trace')!;
  const source = trialOf(c) === undefined ? 'client' : 'playground';
  const asking: Asking = {
    caller,
    routable,
    patience,
    source,
    hold,
    trace,
    requestId: c.get('requestId'),
    signal: c.req.raw.signal,
  };
  const begun_ms = Date.now();
  const [admission, routing] = await Promise.all([
    admit(services, asking),
    route(c, routable).then(
      (routed) => ({ routed }),
      (error: unknown) => ({ error }),
    ),
  ]);
  Object.assign(headers, admission.headers);
  if (admission.kind === 'refused') throw admission.error;
  const { account } = admission;
  c.set('trace', undefined);
  if ('error' in routing) {
    const { status, code } = toMaskrouteError(routing.error);
    settle(services, account, noAnswer(status, code, 'nowhere'), undefined);
    throw routing.error;
  }
  if (trace.isRecorded) traceRouting(trace, begun_ms, routing.routed);
  // A trial is no sign that customers ask for something else.
  if (source === 'client') services.traffic.seen(caller.tenant, routing.routed, hold);
  return { account, routed: routing.routed };
}

/** Adds the steps of routing as spans. Durations are measured; start times assume that all look-ups came first. */
function traceRouting(trace: RequestTrace, begun_ms: number, { timings, encoder }: Routed): void {
  const routed_ms = begun_ms + timings.assign_ms + timings.route_ms;
  trace.part('route', begun_ms, routed_ms);
  if (timings.embed_ms === 0 && encoder === null) return;
  trace.part(
    'embed',
    routed_ms,
    routed_ms + timings.embed_ms,
    encoder ? { 'maskroute.encoder': encoder.id } : {},
  );
}

async function forward(
  c: AppContext,
  client: ClientBody,
  account: Account,
  routed: Routed,
  headers: ReplyHeaders,
): Promise<Response> {
  const services = c.get('services');
  const progress = notAsked(routed);
  const requestId = c.get('requestId');
  const { STREAM_KEEPALIVE_MS: keepalive_ms, BACKEND_STALL_MS: stall_ms } = services.config;
  const asked = ask(services, { account, requestId, client }, progress);
  const { caller, hold, signal } = account;
  const kept = caller.policy.textsKept_days === null ? undefined : new AnswerText();
  const watch = createKeyWatch(services.apiKeys, caller, hold);
  const answer = new Answer(asked, progress, {
    wire: client.wire,
    signal,
    stall_ms,
    keepalive_ms,
    watch,
    kept,
  });
  answer.ended.then((outcome) => {
    settle(services, account, outcome, progress);
    if (kept !== undefined) hold(keepTexts(services.db, account, kept));
  });
  let begun: Begun | 'late';
  try {
    begun = await (account.routable.body.stream === true ? answer.begunInTime() : answer.begun);
  } finally {
    // An error has the headers of the decision as far as it was known.
    Object.assign(headers, progressHeaders(progress));
  }
  if (begun === 'late') {
    // No backend has answered yet. A keepalive comment is sent, and the status with it, so nothing can be retried.
    progress.retries.left = 0;
    Object.assign(headers, EVENT_STREAM_HEADERS);
    return new Response(answer.events(requestId), { headers });
  }
  passHeaders(begun.headers, headers);
  const isEvents = headers['content-type']?.startsWith('text/event-stream') === true;
  const passing = () => (isEvents ? answer.events(requestId) : answer.bytes());
  return new Response(begun.body === 'passing' ? passing() : begun.body, { status: begun.status, headers });
}

/** The routing decision, the same for a completion and its dry run. */
function route(c: AppContext, routable: RoutableBody): Promise<Routed> {
  const services = c.get('services');
  const place = placeOf(c.req.raw, services.config.TRUSTED_FRONT);
  return routeRequest(services, {
    ...routable,
    caller: c.get('caller'),
    signal: c.req.raw.signal,
    hold: holdOf(c),
    region: regionOf(place),
    place,
    trial: trialOf(c),
  });
}

/** A trial (such as the playground's): marked, outside experiments, and routed by any stored set that it names. */
function trialOf(c: AppContext): Trial | undefined {
  if (c.req.header(TRIAL_HEADERS.source) !== 'playground') return undefined;
  return { version: c.req.header(TRIAL_HEADERS.version) };
}

/**
 * Headers of the backend's answer that are passed on, including those that it knows better: a custom mask's id and
 * sparsity.
 */
const PASSED = [
  ...Object.keys(EVENT_STREAM_HEADERS),
  'retry-after',
  'x-should-retry',
  HEADERS.mask,
  HEADERS.sparsity,
];

function passHeaders(from: Headers, to: ReplyHeaders): void {
  for (const name of PASSED) {
    const value = from.get(name);
    if (value !== null) to[name] = value;
  }
}

const progressHeaders = ({ routed, backend, affinity, backend_ms }: Progress): ReplyHeaders => ({
  ...decisionHeaders(routed),
  ...(backend_ms === undefined ? {} : { [HEADERS.serverTiming]: serverTiming(routed.timings, backend_ms) }),
  ...(backend === undefined ? {} : { [BACKEND_HEADERS.backend]: backend }),
  ...(affinity === undefined ? {} : { [BACKEND_HEADERS.affinity]: affinity }),
});

/* The routing decision as response headers: all are on every completion, except the two that explain a fallback. */

/** The value where nothing was chosen: no live mask set, no cluster. */
const NONE = 'none';

function decisionHeaders(routed: Routed): Record<string, string> {
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
 * The platform's clock has whole milliseconds and, once deployed, advances only during I/O: shorter work shows as 0.
 * `backend_ms` is the time until the backend's first byte; undefined when no backend was asked.
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

function setHeaders(c: AppContext, headers: Record<string, string>): void {
  for (const [name, value] of Object.entries(headers)) c.header(name, value);
}

/* The dry run: the same body, the same decision, no backend. */

export const dryRun = new Hono<AppEnv>().post('/route', tenantOnly, async (c) => {
  const raw = await readJson(c.req.raw);
  const { routable, ignored } = parseBody(wireOf(raw), raw);
  requireModel(c.var.caller.policy, routable.body.model);
  const routed = await route(c, routable);
  const { decision, encoder, timings } = routed;
  setHeaders(c, { ...decisionHeaders(routed), ...ignored });
  const { caller, services } = c.var;
  const home = await services.backend.home(purposeOf(routed, routable), caller.tenant, holdOf(c));
  const skip = skippedBy(decision, services.table);
  return c.json({
    object: 'maskroute.route',
    request_id: c.get('requestId'),
    model: routable.body.model,
    mask: decision.mask,
    sparsity: decision.sparsity,
    skip: skip && { attention: [...skip.skipAttention], ffn: [...skip.skipFfn] },
    label: decision.cluster === null ? null : (decision.set?.clusters[decision.cluster]?.label ?? null),
    distance: decision.distance,
    maskroute: routeEcho(routed),
    backend: home ?? null,
    encoder,
    timings_ms: { assign: timings.assign_ms, embed: timings.embed_ms, route: timings.route_ms },
  } satisfies DryRun);
});

/** A body with `messages` is a chat, with `input` a Responses API request, and any other a completion. */
function wireOf(raw: unknown): Wire {
  const has = (name: string) => isJsonObject(raw) && name in raw;
  if (has('messages')) return 'chat';
  return has('input') ? 'responses' : 'completions';
}

function skippedBy({ mask }: Decision, table: RoutingTable): SkippedLayers | null {
  if (typeof mask !== 'string') return mask;
  if (mask === DENSE_MASK_ID) return { skipAttention: [], skipFfn: [] };
  const held = table.findMask(mask);
  return held === undefined
    ? null
    : skippedLayers(maskFromBits(held.set.model.blockCount, held.cluster.bits));
}
