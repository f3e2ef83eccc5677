/** The two completion endpoints: read, plan, run, and answer whole or as a stream. */

import { Hono } from 'hono';
import type { z } from 'zod';
import { BACKEND_HEADERS } from '../../shared/wire/backend-load.ts';
import { MaskrouteError, toMaskrouteError } from '../../shared/wire/errors.ts';
import { type CheckedObject, readFields } from '../../shared/wire/fields.ts';
import {
  type ChatRequest,
  type CompletionRequest,
  chatRequest,
  completionRequest,
} from '../../shared/wire/openai.ts';
import { HEADERS } from '../../shared/wire/protocol.ts';
import { answerFrames, infoOf, wholeAnswer } from './answer.ts';
import { type AnswerRecord, openRecord } from './answer-record.ts';
import { type ApiContext, type ApiEnv, type ApiParts, setHeaders } from './parts.ts';
import { type AnswerPlan, type PlanContext, planChat, planCompletion, type RunningAnswer } from './plan.ts';
import { sseBody, within } from './sse.ts';

/* How long a caller waits for the first byte: what comes later would be computed for nobody. */

/** Timers take no more; nobody waits for weeks. */
const MOST_ms = 2 ** 31 - 1;

/** Undefined without the header. @throws MaskrouteError `invalid_request` when it is no number of milliseconds. */
function deadline_ms(header: string | undefined): number | undefined {
  if (header === undefined) return undefined;
  const name = BACKEND_HEADERS.deadline;
  if (!/^[1-9]\d{0,15}$/.test(header)) {
    throw new MaskrouteError('invalid_request', `${name}: expected milliseconds.`, { param: name });
  }
  return Math.min(Number(header), MOST_ms);
}

export const deadlineExceeded = (after_ms: number): MaskrouteError =>
  new MaskrouteError(
    'deadline_exceeded',
    `There was no answer within the ${after_ms} ms that the caller has.`,
  );

export function completionRoutes(parts: ApiParts): Hono<ApiEnv> {
  return new Hono<ApiEnv>()
    .post('/v1/chat/completions', (c) => respond(parts, c, 'chat', chatRequest, planChat))
    .post('/v1/completions', (c) => respond(parts, c, 'completions', completionRequest, planCompletion));
}

async function respond<Schema extends z.ZodType<ChatRequest | CompletionRequest>>(
  parts: ApiParts,
  c: ApiContext,
  endpoint: string,
  checked: CheckedObject<Schema>,
  planOf: (context: PlanContext, request: z.infer<Schema>) => Promise<AnswerPlan>,
): Promise<Response> {
  const { model, masks, limits } = parts;
  const arrived_ms = performance.now();
  requirePlace(parts);
  const raw = await parts.bodies.readJson(c.req.raw, c.get('caller').tenant);
  // Others may have taken it meanwhile: only a request that is whole takes a place.
  requirePlace(parts);
  const record = openRecord(parts, c, endpoint, arrived_ms);
  try {
    const { body, ignored } = readFields(checked, raw);
    setHeaders(c, ignored);
    const [requestId, caller] = [c.get('requestId'), c.get('caller')];
    const spent = record.plans(body.maskroute?.completion ?? requestId);
    const context = { model, masks, limits, requestId, caller, signal: record.signal, spent };
    record.expectWithin(deadline_ms(c.req.header(BACKEND_HEADERS.deadline)));
    const plan = await planOf(context, body);
    parts.recentMasks.used(plan.mask.id);
    const running = record.run(plan);
    // Asked for here, so that a refusal (a full line, say) still has its own HTTP status.
    const first = running.events.next();
    first.then(
      () => record.firstEvent(plan.stream),
      () => {},
    );
    if (plan.stream) return await streamed(parts, c, running, first, record);
    const whole = await wholeAnswer(model, running, first);
    record.end(undefined);
    return c.json(whole, 200, { ...answerHeaders(plan), [HEADERS.serverTiming]: wholeTiming(running) });
  } catch (thrown) {
    const error = toMaskrouteError(thrown);
    record.end(error);
    throw error;
  }
}

function requirePlace({ lifecycle, limits }: ApiParts): void {
  if (lifecycle.draining) {
    throw new MaskrouteError('not_ready', 'The server is shutting down.', { retryAfter_s: 5 });
  }
  if (lifecycle.running >= limits.inFlightMax) {
    throw new MaskrouteError('queue_full', `${limits.inFlightMax} requests are under way already.`);
  }
}

async function streamed(
  parts: ApiParts,
  c: ApiContext,
  running: RunningAnswer,
  first: ReturnType<RunningAnswer['events']['next']>,
  record: AnswerRecord,
): Promise<Response> {
  const { limits } = parts;
  await within(first, limits.commit_ms);
  const frames = answerFrames(parts.model, running, first, record.endLate);
  const body = sseBody(frames, {
    keepalive_ms: limits.keepalive_ms,
    stall_ms: limits.stall_ms,
    onCancel: record.abort,
    onStall: () => {
      parts.log.warn({ request_id: running.plan.requestId }, 'a client stopped reading; its request ends');
      record.abort();
      c.env?.outgoing?.destroy();
    },
  });
  return c.body(body, 200, {
    ...answerHeaders(running.plan),
    'content-type': 'text/event-stream; charset=utf-8',
    'cache-control': 'no-cache, no-transform',
    // Some proxies buffer streams unless told not to.
    'x-accel-buffering': 'no',
    [HEADERS.serverTiming]: `first;dur=${record.elapsed_ms().toFixed(1)}`,
  });
}

const answerHeaders = ({ mask }: AnswerPlan): Record<string, string> => ({
  [HEADERS.mask]: mask.id,
  [HEADERS.sparsity]: String(mask.sparsity),
});

function wholeTiming(running: RunningAnswer): string {
  const { queue_ms, prefill_ms, decode_ms } = infoOf(running);
  return `queue;dur=${queue_ms}, prefill;dur=${prefill_ms}, decode;dur=${decode_ms}`;
}
