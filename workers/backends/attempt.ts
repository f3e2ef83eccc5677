/** One request to one backend: signed, its first byte in bounded time, and answers told from garbage. */
import { z } from 'zod';
import { BACKEND_HEADERS } from '../../shared/wire/backend-load.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { parseOrNull, readAnswer } from '../../shared/wire/parse-body.ts';
import { HEADERS } from '../../shared/wire/protocol.ts';
import { log, reasonOf } from '../base/telemetry.ts';
import { createWait } from '../base/waiting.ts';
import { BACKEND_ERROR_BYTES_MAX, RETRY_AFTER_s } from '../limits.ts';

/** How requests reach backends: as `fetch`, for absolute addresses. */
export type Send = (url: string, init: RequestInit) => Promise<Response>;

/** `network` is a binding of Workers VPC; without one backends have public names. */
export const sender = (network: Pick<Fetcher, 'fetch'> | undefined): Send =>
  network === undefined ? (url, init) => fetch(url, init) : (url, init) => network.fetch(url, init);

export type BackendRequest = {
  readonly path: string;
  readonly requestId: string;
  /** Tenant id: whose turn it is there, and whose cached prompts it may use; empty for the edge's own questions. */
  readonly tenant: string;
  /** JSON text; a GET without it. */
  readonly body?: string;
};

/** What came of it, as far as the next step depends on that. */
export type Outcome =
  /** The backend's word: a success, or an error that every backend would answer. */
  | { readonly kind: 'answer'; readonly response: Response; readonly rest: Rest | undefined }
  /** An error of its own that another backend may not have; the client gets it when there is no other. */
  | { readonly kind: 'refused'; readonly response: Response; readonly why: Refusal }
  /** No answer, or something that is no answer of the protocol. `again`: the same backend may do better in a moment. */
  | { readonly kind: 'failed'; readonly error: MaskrouteError; readonly again: boolean }
  /** Given up after all of the attempt's time: it may have worked on the request. */
  | { readonly kind: 'late'; readonly waited_ms: number }
  | { readonly kind: 'cancelled' };

/** Waits for `work`, which reads what is left of an answer. @throws Error when the backend stalls in its middle. */
export type Rest = <T>(work: Promise<T>) => Promise<T>;

/** `stopping`: it is about to be gone, and another one may already answer at its address. */
type Refusal = 'sick' | 'full' | 'stopping';

type Sending = {
  readonly send: Send;
  readonly url: string;
  readonly token: string;
  readonly request: BackendRequest;
  /** Aborts this attempt alone. */
  readonly signal: AbortSignal;
  readonly time: AttemptTime;
  /** Headers that make it a part of a trace. */
  readonly trace?: Record<string, string> | undefined;
};

type AttemptTime = {
  /** Of this attempt, until the first byte of its answer. */
  readonly timeout_ms: number;
  /** What is left of the caller's time, which the backend is told. */
  readonly left_ms: number;
  /**
   * For the rest of a small whole answer; undefined: as long as it takes. Whoever sets it reads by the answer's `rest`. The
   * rest of an error has as long, or `timeout_ms`.
   */
  readonly stall_ms?: number | undefined;
};

export async function attempt(sending: Sending): Promise<Outcome> {
  const { send, url, request, signal } = sending;
  const { timeout_ms, left_ms, stall_ms } = sending.time;
  const wait = createWait(Math.min(timeout_ms, stall_ms ?? timeout_ms));
  // A backend knows when the caller's time is over, and stops by itself. A controller that follows another signal is a
  // twelfth of what a request costs, so there is one only where this backend is given up before.
  const controller = timeout_ms === left_ms ? undefined : controlledBy(signal);
  const inTime = async <T>(work: Promise<T>, limit_ms: number): Promise<T> => {
    const found = await wait.within(work, limit_ms);
    if (found !== 'late') return found;
    controller?.abort();
    throw new LateError(`nothing came for ${limit_ms} ms`);
  };
  let isRestLeft = false;
  let sent: Promise<Response> | undefined;
  try {
    sent = send(url + request.path, initOf(sending, controller?.signal ?? signal));
    const response = await inTime(sent, timeout_ms);
    const rest: Rest | undefined =
      stall_ms !== undefined && response.ok && isSmallWhole(response.headers)
        ? (work) => inTime(work, stall_ms).finally(wait.end)
        : undefined;
    const errorRest: Rest = (work) => inTime(work, stall_ms ?? timeout_ms);
    const outcome = await judge(response, request, rest, errorRest);
    isRestLeft = rest !== undefined && outcome.kind === 'answer';
    return outcome;
  } catch (error) {
    if (signal.aborted) return { kind: 'cancelled' };
    const { requestId: request_id } = request;
    if (error instanceof LateError) {
      forget(sent!);
      log('warn', 'backend_late', { request_id, url, waited_ms: timeout_ms });
      return { kind: 'late', waited_ms: timeout_ms };
    }
    log('error', 'backend_unreachable', { request_id, url, reason: reasonOf(error) });
    return { kind: 'failed', error: unreachable(error), again: true };
  } finally {
    if (!isRestLeft) wait.end();
  }
}

const initOf = ({ request, token, time, trace }: Sending, signal: AbortSignal): RequestInit => ({
  method: request.body === undefined ? 'GET' : 'POST',
  headers: {
    authorization: `Bearer ${token}`,
    accept: 'application/json, text/event-stream',
    // A compressed stream would be held back to be unpacked.
    'accept-encoding': 'identity',
    [HEADERS.requestId]: request.requestId,
    [BACKEND_HEADERS.deadline]: String(Math.ceil(time.left_ms)),
    ...trace,
    ...(request.body === undefined ? {} : { 'content-type': 'application/json' }),
  },
  redirect: 'manual',
  // Aborting it is how a hang-up reaches the engine, before the first byte too.
  signal,
  ...(request.body === undefined ? {} : { body: request.body }),
});

/** Whether an answer is over when it begins: no stream, and known to be small. */
function isSmallWhole(headers: Headers): boolean {
  const length = headers.get('content-length');
  if (length === null || Number(length) > WHOLE_BYTES_MAX) return false;
  return headers.get('content-type')?.startsWith('text/event-stream') !== true;
}
/** A whole answer up to this size is read at once: that takes less work than passing it on in pieces. */
const WHOLE_BYTES_MAX = 1024 * 1024;

class LateError extends Error {}

/** Aborts with `signal`, too. `AbortSignal.any` of two takes the runtime a good deal longer to make. */
function controlledBy(signal: AbortSignal): AbortController {
  const controller = new AbortController();
  if (signal.aborted) controller.abort(signal.reason);
  else signal.addEventListener('abort', () => controller.abort(signal.reason), { once: true });
  return controller;
}

/** Drops an answer that comes too late. */
function forget(sent: Promise<Response>): void {
  sent.then((response) => response.body?.cancel()).catch(() => {});
}

export const unreachable = (cause?: unknown, retryAfter_s = RETRY_AFTER_s): MaskrouteError =>
  new MaskrouteError('backend_unreachable', 'The model backend cannot be reached right now.', {
    retryAfter_s,
    cause,
  });

const errorBodySchema = z.looseObject({
  error: z.looseObject({ message: z.string(), code: z.unknown(), param: z.unknown() }),
});

/**
 * An error as the protocol has it, with the text that it came in; null for anything else, and when `rest` gives up waiting.
 * Never throws.
 */
export async function readError(response: Response, rest: Rest = (work) => work) {
  const text = await rest(readAnswer(response, BACKEND_ERROR_BYTES_MAX)).catch(() => null);
  if (text === null) return null;
  const body = errorBodySchema.safeParse(parseOrNull(text));
  return body.success ? { text, ...body.data.error } : null;
}

/** Refusals that say nothing bad of the backend. */
const HARMLESS: ReadonlyMap<unknown, Refusal> = new Map([
  ['queue_full', 'full'],
  ['queue_timeout', 'full'],
  ['request_timeout', 'full'],
  ['not_ready', 'stopping'],
]);
/** Errors after the caller's own time, or about the request's mask: no other backend helps. */
const FINAL_CODES: readonly unknown[] = ['deadline_exceeded', 'configuration_unavailable'];

/** What proxies, balancers and tunnels say of a backend that they cannot reach; 520 to 530 are Cloudflare's. */
const isOfSomethingBetween = (status: number): boolean =>
  (status >= 502 && status <= 504) || (status >= 520 && status <= 530);

/** `errorRest`: how the body of an error is read. */
async function judge(
  response: Response,
  request: BackendRequest,
  rest: Rest | undefined,
  errorRest: Rest,
): Promise<Outcome> {
  const { status } = response;
  const type = response.headers.get('content-type') ?? '';
  if (status === 401 || status === 403) {
    return await foreign(response, request, await refusal(response, errorRest));
  }
  if (response.ok) {
    if (isEmpty(response)) return await foreign(response, request, 'no body');
    return /^(application\/json|text\/event-stream)\b/.test(type)
      ? { kind: 'answer', response, rest }
      : await foreign(response, request, `content type ${type}`);
  }
  if (status < 400 || !type.startsWith('application/json'))
    return await foreign(response, request, `content type ${type}`);
  const error = await readError(response, errorRest);
  if (error === null) return await foreign(response, request, 'an error that is not of the protocol');
  const { code, text } = error;
  if (isOfSomethingBetween(status) && typeof code !== 'string')
    return await foreign(response, request, 'an error without a code of the protocol');
  const said = new Response(text, { status, headers: response.headers });
  const harmless = HARMLESS.get(code);
  if (harmless !== undefined || (status >= 500 && !FINAL_CODES.includes(code))) {
    return { kind: 'refused', response: said, why: harmless ?? 'sick' };
  }
  return { kind: 'answer', response: said, rest: undefined };
}

/** What came does not keep to the protocol: a backend's fault, or something in between that did not reach it. */
async function foreign(response: Response, { requestId }: BackendRequest, reason: string): Promise<Outcome> {
  const { status } = response;
  await response.body?.cancel().catch(() => {});
  if (isOfSomethingBetween(status)) {
    log('error', 'backend_unreachable', { request_id: requestId, url: response.url, status, reason });
    return { kind: 'failed', error: unreachable(), again: true };
  }
  log('error', 'backend_error', { request_id: requestId, status, reason });
  const error = new MaskrouteError('backend_error', 'The model backend gave an answer that cannot be used.');
  return { kind: 'failed', error, again: false };
}

/** A body that is only named costs a stream, so it is not where the length is known. */
function isEmpty(response: Response): boolean {
  const length = response.headers.get('content-length');
  return length === null ? response.body === null : length === '0';
}

/** Why a backend does not let the edge in, in its own words: for the log, never for the client. */
async function refusal(response: Response, rest: Rest): Promise<string> {
  const error = await readError(response, rest);
  const why = error === null ? 'without a reason' : `${error.code}: ${error.message}`;
  return `it refused the credentials of the edge (${why}): compare BACKEND_KEY, MASKROUTE_BACKEND_URL, clocks`;
}

/* How long a request may wait for its answer's first byte: the edge's bound, or less when its client says so. */

export type Patience = {
  readonly time_ms: number;
  /** The client gives less time than the edge would: that it ran out is the client's doing, and nobody else's. */
  readonly isShort: boolean;
};

/** @throws MaskrouteError `invalid_request` when the header is no number of milliseconds. */
export function patienceOf(header: string | undefined, most_ms: number): Patience {
  if (header === undefined) return { time_ms: most_ms, isShort: false };
  if (!/^[1-9]\d{0,8}$/.test(header)) {
    const name = BACKEND_HEADERS.deadline;
    throw new MaskrouteError('invalid_request', `${name}: expected milliseconds.`, { param: name });
  }
  const time_ms = Math.min(Number(header), most_ms);
  return { time_ms, isShort: time_ms < most_ms };
}
