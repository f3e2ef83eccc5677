/**
 * One request's account, from its reservation to its event: opened when it is let in, closed exactly once,
 * however it ends. Closing settles the budget and sends the event, both behind the answer.
 *
 * An open record holds its request. Nothing else does: the runtime drops a request whose client hangs up, where it
 * stands, with everything that waits in it, and not even its signal is heard then. Held, it hears the signal and closes.
 * The platform lets what is held go on for 30 s after the client left; closing is made to take less (see
 * `COST_QUESTION_DELAYS_ms`). Where a record is never closed (the isolate died), its reservation counts in full.
 */

import type { RequestEvent } from '../../shared/admin/request-event.ts';
import { ERROR_CODES, type ErrorCode, MaskrouteError, toMaskrouteError } from '../../shared/wire/errors.ts';
import {
  type AnswerUsage,
  answerPath,
  answerUsageSchema,
  HEADERS,
  splitModelName,
} from '../../shared/wire/protocol.ts';
import type { Patience, Rest } from '../backends/attempt.ts';
import type { Said } from '../backends/pool.ts';
import type { Events } from '../counting/events.ts';
import type { Hold } from '../http/waiting.ts';
import { COST_QUESTION_DELAYS_ms, COST_QUESTION_ms } from '../limits.ts';
import type { RoutableBody, Routed } from '../routing/decision.ts';
import type { Caller } from '../tenants/api-keys.ts';
import type { Budgets, Reservation } from '../tenants/budgets.ts';
import { choicesOf } from './admission.ts';
import { type Heard, hearWhole, type TappedBody, tapAnswer } from './answer-stream.ts';

/*
 * What an answer cost whose end the edge did not hear: asked of the backends, a few times, since the one that
 * worked on it notices a hang-up only a little later.
 */

/** Every backend's answer to one question, or that of `backend` alone. */
export type AskBackends = (path: string, timeout_ms: number, backend?: string) => Promise<readonly Said[]>;

/**
 * Who may have worked on it: the one whose answer began; all of them, of which one refused it, and they are done with
 * it; or any of them, where one may only be about to begin.
 */
type RanAt = 'answerer' | 'refuser' | 'anywhere';

type CostQuestion = {
  readonly completion: string;
  readonly ranAt: RanAt | 'nowhere';
  /** The one whose answer began. */
  readonly answerer: string | undefined;
};

/** `never_began`: no backend knows of it. `unknown`: the one that could say is gone, or has forgotten it. */
type AnswerCost = AnswerUsage | 'never_began' | 'unknown';

/**
 * A client that asked once is charged once, however many backends worked on it: for what the answerer spent on its
 * answer; where none began one, it is what the one spent that spent the most.
 */
async function answerCost(
  ask: AskBackends,
  { completion, ranAt, answerer }: CostQuestion,
): Promise<AnswerCost> {
  const only = ranAt === 'answerer' ? answerer : undefined;
  let cost: AnswerCost = 'unknown';
  for (const delay_ms of COST_QUESTION_DELAYS_ms) {
    await new Promise((resolve) => setTimeout(resolve, delay_ms));
    const said = await ask(answerPath(completion), COST_QUESTION_ms, only).catch(() => []);
    const parts = said.flatMap((one) => answerUsageSchema.safeParse(one.value).data ?? []);
    if (parts.length > 0 && parts.every(({ finished }) => finished)) {
      return parts.reduce((most, part) => (tokensOf(part) > tokensOf(most) ? part : most));
    }
    const isUnheardOf = said.length > 0 && said.every(({ status }) => status === 404);
    if (isUnheardOf && ranAt === 'answerer') return 'unknown';
    cost = isUnheardOf ? 'never_began' : 'unknown';
    if (isUnheardOf && ranAt === 'refuser') return cost;
  }
  return cost;
}

const tokensOf = ({ prompt_tokens, completion_tokens }: AnswerUsage): number =>
  prompt_tokens + completion_tokens;

export type RecordParts = {
  readonly events: Events;
  readonly budgets: Budgets;
  readonly askBackends: AskBackends;
  /** A backend that has begun its answer and sends nothing of it for so long has broken off. */
  readonly stall_ms: number;
};

type RecordOf = {
  readonly event: string;
  readonly completion: string;
  readonly caller: Caller;
  readonly routable: RoutableBody;
  readonly patience: Patience;
  readonly signal: AbortSignal;
  readonly hold: Hold;
  /** After an answer that came whole, once everything about it is told. */
  readonly answered: (event: string, routed: Routed) => Promise<void>;
};

export interface RequestRecord {
  /** What the backend calls the completion. */
  readonly completion: string;
  /** The longest answer that was granted, in tokens a choice; undefined: as the client said. */
  readonly answerTokensMax: number | undefined;
  reserved(reservation: Reservation | null, answerTokensMax: number | undefined): void;
  routed(routed: Routed): void;
  /**
   * A backend is asked now, under this decision: from here on one may have worked on it.
   * @throws MaskrouteError `cancelled` when the client is gone already.
   */
  asks(routed: Routed): void;
  /** `backend`: the id of the one that answers; `rest`: how its small whole answer is read, undefined for any other. */
  answeredBy(backend: string, rest: Rest | undefined): void;
  /** A backend was given up in silence: whatever comes of the request, it may have worked on it. */
  late(): void;
  /**
   * Follows an answer to its end; closes the record when there is none.
   * @throws what `answer` throws, MaskrouteError `backend_error` for a small whole answer that broke off.
   */
  watch(answer: Promise<Response>): Promise<WatchedAnswer>;
  /** Over before it began: nothing is told of it. What may have been reserved all the same is given back. */
  refused(error: unknown): void;
  /** For what goes wrong before a backend was asked. */
  failed(error: unknown): void;
}

/** A `Response` without the cost of making another one. */
export type WatchedAnswer = Pick<Response, 'ok' | 'status' | 'headers'> & { readonly body: WatchedBody };

export type WatchedBody =
  /** Read to its end as it is passed on. */
  | { readonly kind: 'tapped'; readonly body: TappedBody }
  /** There is nothing more to hear of it. */
  | { readonly kind: 'plain'; readonly body: ReadableStream<Uint8Array> | ArrayBuffer | null };

export function openRecord(parts: RecordParts, of: RecordOf): RequestRecord {
  const started_ms = Date.now();
  const { body, kind } = of.routable;
  let reservation: Reservation | null = null;
  let answerTokensMax: number | undefined;
  let routed: Routed | undefined;
  let answerer: string | undefined;
  let restOf: Rest | undefined;
  let wasAsked = false;
  let gaveUp = false;
  let closed = false;
  const over = Promise.withResolvers<void>();
  of.hold(over.promise);

  const close = (outcome: Outcome): void => {
    if (closed) return;
    closed = true;
    over.resolve(finish(outcome));
  };

  const finish = async (outcome: Outcome): Promise<void> => {
    const cost = await costOf(outcome);
    const seen_tokens = cost === null ? seenTokens(outcome.heard, of.routable) : 0;
    await Promise.all([
      settle(cost, seen_tokens, outcome),
      routed === undefined ? undefined : parts.events.send(event(routed, outcome, cost, seen_tokens)),
    ]);
    const isWhole = outcome.status === 200 && outcome.code === null;
    if (routed !== undefined && isWhole) await of.answered(of.event, routed);
  };

  /**
   * Where nobody can say the cost, what was seen to pass is due, and the prompt as it was reserved. Of a client that
   * left before it saw anything, all that was reserved stays due: else leaving would be a way to have work for nothing.
   */
  const settle = (cost: Cost | null, seen_tokens: number, { code }: Outcome): Promise<void> | undefined => {
    if (reservation === null) return undefined;
    const isOfLeaver = code === 'cancelled' || isClientsDoing(code);
    if (cost === null && seen_tokens === 0 && isOfLeaver) return undefined;
    const tokens =
      cost === null ? reservation.prompt_tokens + seen_tokens : cost.prompt_tokens + cost.completion_tokens;
    return parts.budgets.settle(of.caller.tenant, of.event, tokens);
  };

  /**
   * Null: nobody can say. What a backend computed that broke off or was given up is not charged when another one
   * answered: the client gets one answer.
   */
  const costOf = async ({ heard, ranAt }: Outcome): Promise<Cost | null> => {
    if (heard?.figures) return heard.figures;
    if (ranAt === 'nowhere' && !gaveUp) return NOTHING;
    const question = { completion: of.completion, ranAt, answerer };
    const said = await answerCost(parts.askBackends, question);
    if (said === 'unknown') return null;
    return said === 'never_began' ? NOTHING : said;
  };

  const event = (known: Routed, outcome: Outcome, cost: Cost | null, seen_tokens: number): RequestEvent => {
    const { decision, assignment } = known;
    const isRefused = outcome.status >= 400 && outcome.status < 500;
    const isClientsMask = body.mask != null && decision.fallback === null;
    return {
      kind: 'request',
      id: of.event,
      tenant: of.caller.tenant,
      key_id: of.caller.keyId,
      day: new Date(started_ms).toISOString().slice(0, 10),
      created_at_ms: started_ms,
      endpoint: kind,
      model: outcome.code === 'model_not_found' ? UNKNOWN_MODEL : splitModelName(body.model).model,
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
      backend: answerer ?? null,
      fallback: decision.fallback,
      stream: body.stream === true,
      status: isClientsDoing(outcome.code) ? CLIENT_LEFT : outcome.status,
      error_code: outcome.code,
      prompt_tokens: cost?.prompt_tokens ?? 0,
      completion_tokens: cost?.completion_tokens ?? seen_tokens,
      counted: cost !== null,
      ...latencies(outcome.heard, started_ms, body.stream === true, body.n ?? 1),
      total_ms: outcome.endedAt_ms - started_ms,
    };
  };

  /** A time that the client made shorter ran out: it says as little about the version as a client that left. */
  const isClientsDoing = (code: string | null): boolean => code === OUT_OF_TIME && of.patience.isShort;

  const failed = (thrown: unknown): void => {
    const error = toMaskrouteError(thrown);
    // A refused connection is no work done.
    const ranAt = wasAsked && error.code === 'cancelled' ? 'anywhere' : 'nowhere';
    close({ ...NO_ANSWER, status: error.status, code: error.code, ranAt, endedAt_ms: Date.now() });
  };

  const follow = async (response: Response): Promise<WatchedAnswer> => {
    const { headers, ok, status } = response;
    if (restOf !== undefined) {
      const bytes = await restOf(response.arrayBuffer()).catch((cause) => {
        throw brokeOff(cause);
      });
      end(headers, status, hearWhole(new Uint8Array(bytes)));
      return { ok, status, headers, body: { kind: 'plain', body: bytes } };
    }
    if (!ok || response.body === null) {
      const code = await codeOf(response);
      const ranAt = code !== null && AFTER_WORK.includes(code) ? 'refuser' : 'nowhere';
      close({ ...NO_ANSWER, status, code, ranAt, endedAt_ms: Date.now() });
      return { ok, status, headers, body: { kind: 'plain', body: response.body } };
    }
    const tapped = tapAnswer(response.body, {
      signal: of.signal,
      stall_ms: parts.stall_ms,
      onEnd: (heard) => end(headers, status, heard),
    });
    return { ok, status, headers, body: { kind: 'tapped', body: tapped } };
  };

  const end = (headers: Headers, status: number, heard: Heard): void => {
    const said = { mask: headers.get(HEADERS.mask), sparsity: numberOrNull(headers.get(HEADERS.sparsity)) };
    close({ ...said, ...endOf(heard, status), heard, ranAt: 'answerer', endedAt_ms: Date.now() });
  };

  /** Closes the record, and says what the client is told: no byte of the answer is with it yet. */
  const brokeOff = (cause: unknown): MaskrouteError => {
    const error = of.signal.aborted
      ? hungUp()
      : new MaskrouteError('backend_error', 'The model backend broke off in the middle of its answer.', {
          cause,
        });
    const { code, status } = error;
    close({ ...NO_ANSWER, status, code, ranAt: 'answerer', endedAt_ms: Date.now() });
    return error;
  };

  return {
    completion: of.completion,
    get answerTokensMax() {
      return answerTokensMax;
    },
    reserved(granted, tokensMax) {
      reservation = granted;
      answerTokensMax = tokensMax;
    },
    routed(decided) {
      routed = decided;
    },
    asks(decided) {
      if (of.signal.aborted) throw hungUp();
      routed = decided;
      wasAsked = true;
    },
    answeredBy(backend, rest) {
      answerer = backend;
      restOf = rest;
    },
    refused(error) {
      closed = true;
      // The books may have heard the question, and only the answer was lost.
      const isUnsure = error instanceof MaskrouteError && error.code === 'budget_unavailable';
      over.resolve(isUnsure ? parts.budgets.settle(of.caller.tenant, of.event, 0) : undefined);
    },
    failed,
    late() {
      gaveUp = true;
    },
    async watch(answer) {
      try {
        return await follow(await answer);
      } catch (error) {
        failed(error);
        throw error;
      }
    },
  };
}

/** At least so many tokens passed. Of what nobody looked into, two events a choice may open and end it. */
function seenTokens(heard: Heard | null, routable: RoutableBody): number {
  if (heard === null) return 0;
  const { texts, others } = heard.passed;
  return texts + Math.max(0, others - 2 * choicesOf(routable));
}

type Cost = { readonly prompt_tokens: number; readonly completion_tokens: number };
const NOTHING: Cost = { prompt_tokens: 0, completion_tokens: 0 };

type Outcome = {
  readonly status: number;
  readonly code: string | null;
  readonly heard: Heard | null;
  /** Who may have worked on it; `nowhere`: none unless one was given up in silence. */
  readonly ranAt: RanAt | 'nowhere';
  readonly mask: string | null;
  readonly sparsity: number | null;
  readonly endedAt_ms: number;
};
const CLIENT_LEFT = ERROR_CODES.cancelled[0];

/**
 * For every name that no backend serves, as `custom` is for the masks of requests that were refused: usage has a row a
 * model and mask for good, and a client could make up one a request at no cost.
 */
const UNKNOWN_MODEL = 'unknown';
const OUT_OF_TIME: ErrorCode = 'deadline_exceeded';
/** Refusals of a backend that had begun, or may have: it knows what that cost. */
const AFTER_WORK: readonly string[] = [
  OUT_OF_TIME,
  'engine_failed',
  // Finding out how long a prompt is takes work, the more the longer it is.
  'context_length_exceeded',
] satisfies ErrorCode[];
const hungUp = () => new MaskrouteError('cancelled', 'The client hung up.');
const NO_ANSWER = { heard: null, mask: null, sparsity: null } as const;

function endOf({ end, lateError }: Heard, status: number): Pick<Outcome, 'status' | 'code'> {
  if (lateError !== null) return { status, code: lateError };
  switch (end) {
    case 'complete':
      return { status, code: null };
    case 'broken':
      return { status, code: 'backend_error' };
    case 'cancelled':
      return { status: CLIENT_LEFT, code: 'cancelled' };
  }
}

/** The first token as the edge saw it in a stream, as the backend says in a whole answer. */
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

async function codeOf(response: Response): Promise<string | null> {
  const body = await response
    .clone()
    .json<{ error?: { code?: unknown } }>()
    .catch(() => null);
  return typeof body?.error?.code === 'string' ? body.error.code : 'backend_error';
}

const numberOrNull = (text: string | null): number | null =>
  text === null || !Number.isFinite(Number(text)) ? null : Number(text);
