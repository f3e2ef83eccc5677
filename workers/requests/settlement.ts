/**
 * Closes a request's account, once, however the request ended: settles its budget and sends its event, both after the
 * answer. This takes less than the 30 s that the platform allows a request whose client is gone (see
 * `COST_QUESTION_DELAYS_ms`). If an account is never closed (the isolate died), its reservation counts in full.
 */

import type { RequestEvent } from '../../shared/admin/requests-wire.ts';
import {
  answerAttributes,
  decisionAttributes,
  operationOf,
  requestAttributes,
  spanName,
} from '../../shared/tracing/traces.ts';
import { answerPath, answerUsageSchema, splitModelName } from '../../shared/wire/protocol.ts';
import type { Ended } from '../base/telemetry.ts';
import { sleep, UnderWay } from '../base/waiting.ts';
import {
  COST_QUESTION_DELAYS_ms,
  COST_QUESTION_LOOK_ms,
  COST_QUESTION_ms,
  COST_QUESTION_WAIT_ms,
  COST_QUESTIONS_MAX,
  COST_QUESTIONS_WHILE_GONE,
} from '../limits.ts';
import type { RoutableBody } from '../routing/decision.ts';
import type { Services } from '../services.ts';
import { type Account, choicesOf } from './admission.ts';
import { CLIENT_LEFT, type Outcome } from './answer-stream.ts';
import type { Progress } from './forward.ts';
import type { Heard } from './read-answer.ts';

type SettleParts = Pick<Services, 'backend' | 'budgets' | 'comparison' | 'events'>;

/**
 * `progress`: undefined when the request was not routed; then no event is sent. Stops keeping the request alive when
 * all is done.
 */
export function settle(
  parts: SettleParts,
  account: Account,
  outcome: Outcome,
  progress: Progress | undefined,
): void {
  account.letGo(close(parts, account, outcome, progress));
}

async function close(
  parts: SettleParts,
  account: Account,
  outcome: Outcome,
  progress: Progress | undefined,
): Promise<void> {
  const cost = await costOf(parts, account, outcome, progress);
  const isKnown = typeof cost === 'object';
  const charged = isKnown ? cost : chargeOfUnknown(account, outcome, cost);
  const { event, caller, reservation, routable, source, hold, trace } = account;
  const told = progress && eventOf(parts, account, outcome, progress, { ...charged, counted: isKnown });
  if (trace.isRecorded) hold(trace.end(traceEnd(account, outcome, told)));
  await Promise.all([
    reservation === null ? undefined : parts.budgets.settle(caller.tenant, event, tokensOf(charged)),
    told && parts.events.send(told),
  ]);
  const isWhole = outcome.status === 200 && outcome.code === null;
  // Comparisons say whether customers' traffic has drifted.
  if (progress === undefined || !isWhole || source !== 'client') return;
  const { routed } = progress;
  await parts.comparison.maybeCompare({ event, tenant: caller.tenant, routable, routed, hold });
}

/* What it cost. */

type Cost = { readonly prompt_tokens: number; readonly completion_tokens: number };
const NOTHING: Cost = { prompt_tokens: 0, completion_tokens: 0 };

/** Why a cost is unknown: the backend that had begun its answer has ended since, or a backend is there and does not say. */
type Unknown = 'ended' | 'silent';

/**
 * The cost, or why it is unknown. Work of a backend that broke off or was abandoned is not charged if another one
 * answered: the client gets one answer.
 */
async function costOf(
  { backend }: SettleParts,
  { caller, completion }: Account,
  { heard, ranAt }: Outcome,
  progress: Progress | undefined,
): Promise<Cost | Unknown> {
  if (heard?.figures) return heard.figures;
  if (progress === undefined || (ranAt === 'nowhere' && !progress.gaveUp)) return NOTHING;
  const asked = [...progress.asked.values()];
  const mayKnow = ranAt === 'answerer' ? asked.filter(({ id }) => id === progress.backend) : asked;
  const path = answerPath(completion);
  const ask = () => inTurn(caller.tenant, () => backend.askEach(mayKnow, path, COST_QUESTION_ms));
  return await answerCost(ask, ranAt);
}

/**
 * Asks the backends that may have worked on an answer for its cost, when the edge did not see its end; a few times, since a
 * backend notices a hang-up only a little later. A backend that drains has left the registry, and still knows the cost. One
 * request is charged once, however many backends worked on it: the cost at the backend that answered or, if none did, the
 * largest cost at any backend. Nothing if every backend that may have worked on it is gone, or knows nothing of it, as after a
 * restart: then nobody got anything, and it is no client's doing. If such a backend had begun its answer, the cost is unknown.
 */
async function answerCost(
  ask: () => ReturnType<Services['backend']['askEach']>,
  ranAt: Outcome['ranAt'],
): Promise<Cost | Unknown> {
  let cost: Cost | Unknown = 'silent';
  /** How often in a row no backend was silent, and one or more seemed gone. */
  let whileGone = 0;
  for (const delay_ms of COST_QUESTION_DELAYS_ms) {
    await sleep(delay_ms);
    const said = await ask();
    const parts = said.flatMap((one) => answerUsageSchema.safeParse(one.value).data ?? []);
    if (parts.length > 0 && parts.every(({ finished }) => finished)) {
      return parts.reduce((most, part) => (tokensOf(part) > tokensOf(most) ? part : most));
    }
    const isUnheardOf = said.length > 0 && said.every(({ status }) => status === 404);
    if (isUnheardOf && ranAt === 'answerer') return 'ended';
    if (isUnheardOf && ranAt === 'refuser') return NOTHING;
    const isLost = said.length > 0 && said.every(({ status, seemsGone }) => seemsGone || status === 404);
    whileGone = isLost && !isUnheardOf ? whileGone + 1 : 0;
    const isGone = whileGone >= COST_QUESTIONS_WHILE_GONE;
    // A backend that knows nothing of the request may read it later, and begin.
    const mayBegin = ranAt !== 'refuser' && said.some(({ status }) => status === 404);
    if (isGone && !mayBegin) return ranAt === 'answerer' ? 'ended' : NOTHING;
    cost = isUnheardOf || isGone ? NOTHING : 'silent';
  }
  return cost;
}

/** Running cost queries of this isolate. */
const questions = new UnderWay();

/**
 * Limits concurrent cost queries. Each may need its own connection, and a flood of hang-ups would fill a backend's
 * accept queue and block all requests. So a query waits a little for its turn.
 */
async function inTurn<Answer>(
  tenant: string,
  ask: () => Promise<readonly Answer[]>,
): Promise<readonly Answer[]> {
  for (let waited_ms = 0; !hasRoomFor(tenant); waited_ms += COST_QUESTION_LOOK_ms) {
    if (waited_ms >= COST_QUESTION_WAIT_ms) return [];
    await sleep(COST_QUESTION_LOOK_ms);
  }
  const ended = questions.begin(2 * COST_QUESTION_ms, tenant);
  return await ask().finally(ended);
}

function hasRoomFor(tenant: string): boolean {
  const { all, whileOwn } = COST_QUESTIONS_MAX;
  return questions.count() < (questions.has(tenant) ? whileOwn : all);
}

const tokensOf = ({ prompt_tokens, completion_tokens }: Cost): number => prompt_tokens + completion_tokens;

/**
 * The charge, in budget and usage, when the cost is unknown: the tokens that passed, and the prompt as reserved. If the
 * client hung up before any token and the backend is silent, the whole reservation is charged; otherwise a flood of hang-ups,
 * whose costs cannot all be asked for, would be a way to get work for free.
 */
function chargeOfUnknown(account: Account, { code, heard }: Outcome, unknown: Unknown): Cost {
  const { reservation, routable } = account;
  const seen_tokens = seenTokens(heard, routable);
  if (reservation === null) return { prompt_tokens: 0, completion_tokens: seen_tokens };
  const { prompt_tokens } = reservation;
  const isOfLeaver = code === 'cancelled' || isClientsDoing(account, code);
  const isAllDue = unknown === 'silent' && seen_tokens === 0 && isOfLeaver;
  return { prompt_tokens, completion_tokens: isAllDue ? reservation.tokens - prompt_tokens : seen_tokens };
}

/**
 * Whether a deadline that the client itself shortened has passed: like a hang-up, it says nothing about the version.
 */
const isClientsDoing = ({ patience }: Account, code: string | null): boolean =>
  code === 'deadline_exceeded' && patience.isShort;

/**
 * Least number of tokens that passed. Of the events that were not inspected, two for each choice may have no token (its
 * first and its last).
 */
function seenTokens(heard: Heard | null, routable: RoutableBody): number {
  if (heard === null) return 0;
  const { texts, others } = heard.passed;
  return texts + Math.max(0, others - 2 * choicesOf(routable));
}

/* The request's event, trace and log. */

/**
 * Stands for every model name that no backend is known to have listed, as `custom` does for masks of refused requests:
 * usage keeps a row for each model and mask forever, and a client could make up names at no cost.
 */
const UNKNOWN_MODEL = 'unknown';

function eventOf(
  { backend: backends }: Pick<SettleParts, 'backend'>,
  account: Account,
  outcome: Outcome,
  { routed, backend }: Progress,
  charged: Cost & { readonly counted: boolean },
): RequestEvent {
  const { decision, assignment } = routed;
  const { caller, started_ms } = account;
  const { body, kind } = account.routable;
  const isStream = body.stream === true;
  const isRefused = outcome.status >= 400 && outcome.status < 500;
  const { model } = splitModelName(body.model);
  const isServed = outcome.ranAt === 'answerer' || backends.lists(model);
  const isClientsMask = body.mask != null && decision.fallback === null;
  return {
    kind: 'request',
    id: account.event,
    tenant: caller.tenant,
    key_id: caller.keyId,
    day: new Date(started_ms).toISOString().slice(0, 10),
    created_at_ms: started_ms,
    endpoint: kind,
    model: isServed ? model : UNKNOWN_MODEL,
    mask: (isRefused && isClientsMask ? null : decision.maskId) ?? outcome.mask ?? 'custom',
    sparsity: decision.sparsity ?? outcome.sparsity,
    mask_set: decision.set?.name ?? null,
    version: decision.set?.version ?? null,
    cluster: decision.cluster,
    similarity: decision.similarity,
    experiment: assignment.experiment,
    experiment_owner: assignment.experimentOwner,
    variant: assignment.variant,
    region: assignment.region,
    backend: backend ?? null,
    fallback: decision.fallback,
    stream: isStream,
    status: isClientsDoing(account, outcome.code) ? CLIENT_LEFT : outcome.status,
    error_code: outcome.code,
    prompt_tokens: charged.prompt_tokens,
    completion_tokens: charged.completion_tokens,
    counted: charged.counted,
    ...latencies(outcome.heard, started_ms, isStream, choicesOf(account.routable)),
    // A clock that was set back meanwhile must not make the event unreadable: its tokens would not be counted.
    total_ms: Math.max(0, outcome.endedAt_ms - started_ms),
    request_id: account.requestId,
    source: account.source,
  };
}

/** `told`: undefined when the request was not routed. */
function traceEnd(
  { caller, routable, completion }: Account,
  { status, code, heard, endedAt_ms }: Outcome,
  told: RequestEvent | undefined,
): Ended {
  const operation = operationOf(routable.kind);
  return {
    name: told === undefined ? operation : spanName(operation, told.model),
    status: told?.status ?? status,
    code,
    attributes: {
      'maskroute.completion': completion,
      'maskroute.tenant': caller.tenant,
      ...requestAttributes(operation, routable.body),
      ...(told && decisionAttributes(told, told.mask, told.sparsity)),
      ...(told?.backend ? { 'maskroute.backend': told.backend } : {}),
      ...answerAttributes({
        input_tokens: told?.counted ? told.prompt_tokens : undefined,
        output_tokens: told?.counted ? told.completion_tokens : undefined,
        finishReasons: heard?.finishReasons,
        first_ms: told?.stream ? told.ttft_ms : undefined,
      }),
    },
    at_ms: endedAt_ms,
  };
}

/**
 * Latencies: the first token as the edge saw it in a stream, or as the backend reports it in a non-streaming answer.
 */
function latencies(
  heard: Heard | null,
  started_ms: number,
  stream: boolean,
  choices: number,
): Pick<RequestEvent, 'ttft_ms' | 'tpot_ms'> {
  const figures = heard?.figures ?? null;
  const seen_ms = stream && heard?.firstAt_ms != null ? Math.max(0, heard.firstAt_ms - started_ms) : null;
  const said_ms =
    figures?.queue_ms == null || figures.prefill_ms == null ? null : figures.queue_ms + figures.prefill_ms;
  const later = (figures?.completion_tokens ?? 0) - choices;
  return {
    ttft_ms: stream ? seen_ms : said_ms,
    tpot_ms: figures?.decode_ms != null && later > 0 ? figures.decode_ms / later : null,
  };
}
