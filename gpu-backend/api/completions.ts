/**
 * The three completion endpoints: read a request, plan it, run it, and answer whole or as a stream. Every request is
 * accounted for exactly once, however it ends. `GET /v1/answers/{id}` returns an answer's token counts to an edge that did
 * not see its end.
 */
import { Hono } from 'hono';
import type { z } from 'zod';
import { BACKEND_HEADERS } from '../../shared/wire/backend-load.ts';
import { cancellation, MaskrouteError, toMaskrouteError } from '../../shared/wire/errors.ts';
import { type CheckedObject, readFields } from '../../shared/wire/fields.ts';
import {
  type ChatRequest,
  type CompletionRequest,
  chatRequest,
  completionRequest,
} from '../../shared/wire/openai.ts';
import { EVENT_STREAM_HEADERS, HEADERS } from '../../shared/wire/protocol.ts';
import { chatOfResponse, type ResponsesRequest, responsesRequest } from '../../shared/wire/responses.ts';
import { TENANT_SHARE_MAX } from '../engine/queue.ts';
import { type RunningAnswer, runAnswer } from './answer.ts';
import { AnswerTrace } from './answer-trace.ts';
import { type ApiContext, type ApiEnv, type ApiParts, Places, setHeaders, tenantOf } from './parts.ts';
import { type AnswerPlan, type Call, type Endpoint, planChat, planCompletion, planResponse } from './plan.ts';
import { eventFrame, ResponseWriter, wholeResponse } from './responses-wire.ts';
import { SSE_DONE, sseBody, within } from './sse.ts';
import { answerChunks, chunkHead, failureFrames, infoOf, usageOf, wholeAnswer } from './wire.ts';

export function completionRoutes(parts: ApiParts): Hono<ApiEnv> {
  return new Hono<ApiEnv>()
    .post('/v1/chat/completions', (c) => respond(parts, c, CHAT))
    .post('/v1/completions', (c) => respond(parts, c, COMPLETIONS))
    .post('/v1/responses', (c) => respond(parts, c, RESPONSES))
    .get('/v1/answers/:id', (c) => {
      const cost = parts.recentAnswers.peek(c.req.param('id'));
      if (cost === undefined) throw new MaskrouteError('not_found', 'There is no such answer.');
      return c.json({ object: 'maskroute.answer', ...cost });
    });
}

type AnyRequest = ChatRequest | CompletionRequest | ResponsesRequest;

/** The fields that an endpoint takes, and how a request becomes a plan. */
type Offer<Schema extends z.ZodType<AnyRequest>> = {
  readonly endpoint: Endpoint;
  readonly checked: CheckedObject<Schema>;
  readonly planOf: (parts: ApiParts, call: Call, request: z.infer<Schema>) => Promise<AnswerPlan>;
};

const CHAT = { endpoint: 'chat', checked: chatRequest, planOf: planChat } as const;
const COMPLETIONS = { endpoint: 'completions', checked: completionRequest, planOf: planCompletion } as const;
const RESPONSES = { endpoint: 'responses', checked: responsesRequest, planOf: planResponse } as const;

/** A request's endpoint, arrival (`performance.now()`) and trace. */
type Arrival = {
  readonly endpoint: Endpoint;
  readonly arrivedAt_ms: number;
  readonly trace: AnswerTrace | undefined;
};

async function respond<Schema extends z.ZodType<AnyRequest>>(
  parts: ApiParts,
  c: ApiContext,
  offer: Offer<Schema>,
): Promise<Response> {
  const { endpoint } = offer;
  const arrivedAt_ms = performance.now();
  const trace =
    parts.tracer && new AnswerTrace(parts.tracer, endpoint, (name) => c.req.header(name), arrivedAt_ms);
  try {
    return await answer(parts, c, offer, { endpoint, arrivedAt_ms, trace });
  } catch (thrown) {
    trace?.end(undefined, toMaskrouteError(thrown));
    throw thrown;
  }
}

async function answer<Schema extends z.ZodType<AnyRequest>>(
  parts: ApiParts,
  c: ApiContext,
  { endpoint, checked, planOf }: Offer<Schema>,
  arrival: Arrival,
): Promise<Response> {
  const tenant = tenantOf(c);
  requirePlace(parts, tenant);
  const raw = await parts.bodies.readJson(c.req.raw, tenant);
  // Check again: others may have taken the place while the body was received.
  requirePlace(parts, tenant);
  const { body, ignored } = readFields(checked, raw);
  setHeaders(c, ignored);
  const request = { endpoint, tenant, ...body };
  parts.failedRequests.expectHarmless(request);
  const limit_ms = deadline_ms(c.req.header(BACKEND_HEADERS.deadline));
  arrival.trace?.asked(c.get('requestId'), tracedAs(body));
  const completion = begin(parts, c, arrival, request, limit_ms);
  let running: RunningAnswer | undefined;
  try {
    const plan = await planOf(parts, completion, body);
    // The engine would compute a prompt for nobody, and its token ids would be charged.
    if (completion.signal.aborted) throw cancellation(completion.signal);
    running = runAnswer(parts.model, plan, parts.limits, completion);
    if (plan.stream) return await streamed(parts, c, completion, running);
    const whole =
      plan.response === undefined
        ? await wholeAnswer(parts.model, running)
        : await wholeResponse(running, plan.response);
    const headers = { ...answerHeaders(plan), [HEADERS.serverTiming]: wholeTiming(running) };
    parts.metrics.request(endpoint, 200, 'ok');
    end(parts, completion, running, undefined);
    return c.json(whole, 200, headers);
  } catch (thrown) {
    const error = toMaskrouteError(thrown);
    end(parts, completion, running, error);
    throw error;
  }
}

/** A span describes a request of the Responses API as the chat completion that it is converted to. */
const tracedAs = (body: AnyRequest): ChatRequest | CompletionRequest =>
  'input' in body ? chatOfResponse(body) : body;

/** @throws MaskrouteError `not_ready`, `queue_full`. */
function requirePlace({ lifecycle, limits, model }: ApiParts, tenant: string): void {
  lifecycle.stopping.throwIfAborted();
  model.engine.expectRoom(tenant);
  const { inFlightMax } = limits;
  if (lifecycle.completions >= inFlightMax) {
    throw new MaskrouteError('queue_full', `${inFlightMax} requests are already running or waiting.`);
  }
  const shareMax = Math.ceil(TENANT_SHARE_MAX * inFlightMax);
  if (lifecycle.completionsOf(tenant) >= shareMax) {
    throw new MaskrouteError(
      'queue_full',
      `${shareMax} requests of this tenant are already running or waiting.`,
    );
  }
}

/** The longest time that a Node timer supports. */
const DEADLINE_MAX_ms = 2 ** 31 - 1;

/**
 * How long the caller waits for the first token of a stream, or for a whole answer; after that it would be computed for
 * nobody. Undefined without the header.
 * @throws MaskrouteError `invalid_request` when the header is not a number of milliseconds.
 */
function deadline_ms(header: string | undefined): number | undefined {
  if (header === undefined) return undefined;
  const name = BACKEND_HEADERS.deadline;
  if (!/^[1-9]\d{0,15}$/.test(header)) {
    throw new MaskrouteError('invalid_request', `${name}: expected milliseconds.`, { param: name });
  }
  return Math.min(Number(header), DEADLINE_MAX_ms);
}

/** A checked request body with its endpoint and tenant. */
type Asked = AnyRequest & {
  readonly endpoint: Endpoint;
  readonly tenant: string;
};

/** A completion that has begun; `end` gives its places back and is called once. */
type Completion = Call &
  Arrival & {
    readonly request: Asked;
    /** Aborts `signal`. */
    readonly abort: AbortController;
    /** The timer that aborts `signal` when the caller's time is over. */
    readonly deadline: NodeJS.Timeout | undefined;
    readonly leave: (isWhole: boolean) => void;
  };

function begin(
  { lifecycle, limits, model, recentAnswers }: ApiParts,
  c: ApiContext,
  arrival: Arrival,
  request: Asked,
  limit_ms: number | undefined,
): Completion {
  const requestId = c.get('requestId');
  const { tenant } = request;
  const id = request.maskroute?.completion ?? requestId;
  const abort = new AbortController();
  const clientLeft = c.req.raw.signal;
  if (clientLeft.aborted) abort.abort();
  clientLeft.addEventListener('abort', () => abort.abort(), { once: true });
  const deadline =
    limit_ms === undefined
      ? undefined
      : setTimeout(
          () => abort.abort(deadlineExceeded(limit_ms)),
          Math.max(0, limit_ms - (performance.now() - arrival.arrivedAt_ms)),
        );
  recentAnswers.set(id, { finished: false, prompt_tokens: 0, completion_tokens: 0 });
  return {
    id,
    requestId,
    tenant,
    edge: c.get('caller').edge,
    signal: abort.signal,
    places: new Places(model.engine, tenant, limits),
    spent: { tokens: 0 },
    ...arrival,
    request,
    abort,
    deadline,
    leave: lifecycle.beginCompletion(abort, tenant),
  };
}

const deadlineExceeded = (after_ms: number): MaskrouteError =>
  new MaskrouteError(
    'deadline_exceeded',
    `No answer came within the ${after_ms} ms that the caller allowed.`,
  );

/** Rejects when the answer fails before status 200 is sent, so that the failure gets its own status. */
async function streamed(
  parts: ApiParts,
  c: ApiContext,
  completion: Completion,
  running: RunningAnswer,
): Promise<Response> {
  const { commit_ms, keepalive_ms, stall_ms } = parts.limits;
  const { abort, arrivedAt_ms, deadline, requestId } = completion;
  running.begun.then(
    () => clearTimeout(deadline),
    () => {},
  );
  await within(running.begun, commit_ms);
  const body = sseBody(answerFrames(parts, completion, running), {
    keepalive_ms,
    stall_ms,
    onCancel: () => abort.abort(),
    onStall: () => {
      parts.log.warn({ request_id: requestId }, 'a client stopped reading; its request ends');
      abort.abort();
      c.env?.outgoing?.destroy();
    },
  });
  return c.body(body, 200, {
    ...answerHeaders(running.plan),
    ...EVENT_STREAM_HEADERS,
    [HEADERS.serverTiming]: `first;dur=${(performance.now() - arrivedAt_ms).toFixed(1)}`,
  });
}

/**
 * Never rejects. A late failure goes to the log, and to the client as an `error` event after what was sent, without
 * `[DONE]`.
 */
async function* answerFrames(
  parts: ApiParts,
  completion: Completion,
  running: RunningAnswer,
): AsyncGenerator<string, void> {
  const head = chunkHead(parts.model, running.plan);
  const { response } = running.plan;
  const writer = response && new ResponseWriter(running, response);
  // The outcome if the client leaves: then the generator is ended at a `yield`.
  let outcome: MaskrouteError | undefined = new MaskrouteError('cancelled', 'The client left.');
  try {
    if (writer === undefined) yield* answerChunks(parts.model, head, running);
    else for await (const event of writer.events()) yield eventFrame(event);
    outcome = undefined;
    // The Responses API marks the end by its last event instead.
    if (writer === undefined) yield SSE_DONE;
  } catch (thrown) {
    outcome = toMaskrouteError(thrown);
    const { status, code, cause = outcome } = outcome;
    if (status >= 500)
      parts.log.error({ request_id: completion.requestId, code, err: cause }, 'a stream failed');
    if (writer === undefined) yield* failureFrames(head, running, outcome);
    else yield eventFrame(writer.failure(outcome));
  } finally {
    parts.metrics.request(completion.endpoint, 200, outcome?.code ?? 'ok');
    end(parts, completion, running, outcome);
  }
}

const answerHeaders = ({ mask }: AnswerPlan): Record<string, string> => ({
  [HEADERS.mask]: mask.id,
  [HEADERS.sparsity]: String(mask.sparsity),
});

function wholeTiming(running: RunningAnswer): string {
  const { queue_ms, prefill_ms, decode_ms } = infoOf(running);
  return `queue;dur=${queue_ms}, prefill;dur=${prefill_ms}, decode;dur=${decode_ms}`;
}

/**
 * Gives the places back, ends choices that still run, and records the cost: for later queries, in the metrics and in the
 * log. `running` is undefined for a request that ended before it ran; it is charged for tokenizing its prompts.
 */
function end(
  parts: ApiParts,
  completion: Completion,
  running: RunningAnswer | undefined,
  error: MaskrouteError | undefined,
): void {
  const { id, requestId, tenant, endpoint, request, arrivedAt_ms } = completion;
  clearTimeout(completion.deadline);
  completion.leave(error === undefined);
  completion.places.giveAllBack();
  running?.abandon();
  completion.trace?.end(running, error);
  if (running === undefined) {
    const prompt_tokens = completion.spent.tokens;
    parts.recentAnswers.set(id, { finished: true, prompt_tokens, completion_tokens: 0 });
    return;
  }
  if (error === undefined) parts.failedRequests.succeeded(request);
  else if (error.code === 'engine_failed') parts.failedRequests.failed(request);
  const { plan, progress, firstEventAt_ms } = running;
  const { prompt_tokens, completion_tokens, prompt_tokens_details } = usageOf(running);
  parts.recentAnswers.set(id, { finished: true, prompt_tokens, completion_tokens });
  const { cached_tokens } = prompt_tokens_details;
  const first_ms = firstEventAt_ms === undefined ? undefined : firstEventAt_ms - arrivedAt_ms;
  const total_ms = performance.now() - arrivedAt_ms;
  parts.metrics.answer({
    endpoint,
    mask: plan.mask.id,
    promptTokens: prompt_tokens,
    completionTokens: completion_tokens,
    cachedTokens: cached_tokens,
    first_ms,
    total_ms,
    choices: progress,
  });
  parts.log.info(
    {
      request_id: requestId,
      tenant: tenant === '' ? undefined : tenant,
      endpoint,
      stream: plan.stream,
      choices: plan.jobs.length,
      mask: plan.mask.id,
      sparsity: plan.mask.sparsity,
      prompt_tokens,
      completion_tokens,
      cached_tokens,
      first_ms: first_ms === undefined ? undefined : Math.round(first_ms),
      total_ms: Math.round(total_ms),
      outcome: error?.code ?? 'ok',
    },
    'answer',
  );
}
