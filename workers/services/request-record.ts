/**
 * One request's account, from its reservation to its event: opened when it is let in, closed exactly once,
 * however it ends. Closing settles the budget and sends the event, both behind the answer.
 */
import { ERROR_CODES, type ErrorCode, MaskrouteError, toMaskrouteError } from '../../shared/errors.ts';
import type { RequestEvent } from '../../shared/events.ts';
import { HEADERS, splitModelName } from '../../shared/protocol.ts';
import { type AskBackends, answerCost } from './answer-cost.ts';
import { type Heard, hearWhole, type TappedBody, tapAnswer } from './answer-tap.ts';
import type { Caller } from './api-keys.ts';
import type { Rest } from './backends/attempt.ts';
import type { Patience } from './backends/patience.ts';
import type { Budgets, Reservation } from './budgets.ts';
import type { Hold } from './deadline.ts';
import type { Events } from './events.ts';
import type { RoutableBody, Routed } from './routing.ts';
import { choicesOf } from './token-bounds.ts';

export type RecordParts = {
  readonly events: Events;
  readonly budgets: Budgets;
  readonly askBackends: AskBackends;
  /** A backend that has begun its answer and sends nothing of it for so long has broken off. */
  readonly stall_ms: number;
};

export type RecordOf = {
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
  /** `backend`: the id of the one that answers; `rest`: how its small whole answer is read, undefined for any other. */
  answeredBy(backend: string, rest: Rest | undefined): void;
  /** A backend was given up in silence: whatever comes of the request, it may have worked on it. */
  late(): void;
  /**
   * Follows an answer to its end; closes the record when there is none.
   * @throws what `answer` throws, MaskrouteError `backend_error` for a small whole answer that broke off.
   */
  watch(answer: Promise<Response>): Promise<WatchedAnswer>;
  /** Over before it began: nothing was reserved and nothing is told. */
  refused(): void;
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
  let gaveUp = false;
  let closed = false;

  const close = (outcome: Outcome): void => {
    if (closed) return;
    closed = true;
    of.hold(finish(outcome));
  };

  const finish = async (outcome: Outcome): Promise<void> => {
    const cost = await costOf(outcome);
    const seen_tokens = cost === null ? seenTokens(outcome.heard, of.routable) : 0;
    const settled = settle(cost, seen_tokens);
    await Promise.all([
      settled,
      routed === undefined
        ? undefined
        : parts.events.send(event(routed, outcome, cost, seen_tokens), answerer),
    ]);
    const isWhole = outcome.status === 200 && outcome.code === null;
    if (routed !== undefined && isWhole) await of.answered(of.event, routed);
  };

  /** Where nobody can say the cost, what was seen to pass is due, and the prompt as it was reserved. */
  const settle = (cost: Cost | null, seen_tokens: number): Promise<void> | undefined => {
    if (reservation === null || (cost === null && seen_tokens === 0)) return undefined;
    const tokens =
      cost === null ? reservation.prompt_tokens + seen_tokens : cost.prompt_tokens + cost.completion_tokens;
    return parts.budgets.settle(of.caller.tenant, of.event, tokens);
  };

  /**
   * Null: nobody can say. Then the reservation runs out by itself, unless something was seen. What a backend computed
   * that broke off or was given up is not charged when another one answered: the client gets one answer.
   */
  const costOf = async ({ heard, ranAt }: Outcome): Promise<Cost | null> => {
    if (heard?.figures) return heard.figures;
    if (ranAt === 'nowhere' && !gaveUp) return NOTHING;
    return await answerCost(parts.askBackends, of.completion, ranAt === 'answerer' ? answerer : undefined);
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
      variant: assignment.variant,
      region: assignment.region,
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
    const ranAt = routed !== undefined && error.code === 'cancelled' ? 'anywhere' : 'nowhere';
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
      const ranAt = code !== null && AFTER_WORK.includes(code) ? 'anywhere' : 'nowhere';
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
      ? new MaskrouteError('cancelled', 'The client hung up.')
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
    answeredBy(backend, rest) {
      answerer = backend;
      restOf = rest;
    },
    refused() {
      closed = true;
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
  /** Who may have worked on it: the one whose answer began, some, or none unless one was given up in silence. */
  readonly ranAt: 'answerer' | 'anywhere' | 'nowhere';
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
/** Refusals of a backend that had begun, or may have: it knows what that cost. A prompt was read to be found too long. */
const AFTER_WORK: readonly string[] = [
  OUT_OF_TIME,
  'engine_failed',
  'context_length_exceeded',
] satisfies ErrorCode[];
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
