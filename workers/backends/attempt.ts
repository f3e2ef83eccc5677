/** One attempt: a signed request to one backend, a time limit for its first byte, and validation of its answer. */
import { z } from 'zod';
import { BACKEND_HEADERS } from '../../shared/wire/backend-load.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { parseOrNull, readAnswer } from '../../shared/wire/parse-body.ts';
import { HEADERS } from '../../shared/wire/protocol.ts';
import { log, reasonOf } from '../base/telemetry.ts';
import { createWait, notNow } from '../base/waiting.ts';
import { BACKEND_ERROR_BYTES_MAX } from '../limits.ts';

/** Sends a request to a backend; like `fetch`, for absolute URLs. */
export type Send = (url: string, init: RequestInit) => Promise<Response>;

/** `network`: a Workers VPC binding; without it backends are reached by their public names. */
export const sender = (network: Pick<Fetcher, 'fetch'> | undefined): Send =>
  network === undefined ? (url, init) => fetch(url, init) : (url, init) => network.fetch(url, init);

export type BackendRequest = {
  readonly path: string;
  readonly requestId: string;
  /** Tenant id, for fair scheduling and prefix caches at the backend; empty for the edge's own requests. */
  readonly tenant: string;
  /** JSON text; without it the request is a GET. */
  readonly body?: string;
};

/** How an attempt ended, as far as the next step depends on it. */
export type Attempted =
  /** A success, or an error that every backend would answer. */
  | { readonly kind: 'answer'; readonly response: Response; readonly rest: Rest | undefined }
  /** An error that another backend might not answer; the client gets it if there is no other backend. */
  | { readonly kind: 'refused'; readonly response: Response; readonly why: Refusal }
  /**
   * No answer, or not a valid answer of the protocol. `again`: a retry at the same backend may succeed. `seemsGone`: the
   * connection was refused, as where the backend's process has ended, or it broke: the runtime does not tell the two apart.
   */
  | {
      readonly kind: 'failed';
      readonly error: MaskrouteError;
      readonly again: boolean;
      readonly seemsGone: boolean;
    }
  /** Timed out: the backend may have worked on the request. */
  | { readonly kind: 'late'; readonly waited_ms: number }
  | { readonly kind: 'cancelled' };

/** Waits for `work`, which reads the rest of an answer. @throws Error when the backend stalls. */
export type Rest = <T>(work: Promise<T>) => Promise<T>;

/** `stopping`: it is shutting down, and another process may soon have its address. */
type Refusal = 'sick' | 'full' | 'stopping';

type Sending = {
  readonly send: Send;
  readonly url: string;
  readonly token: string;
  readonly request: BackendRequest;
  /** Aborts this attempt alone. */
  readonly signal: AbortSignal;
  readonly time: AttemptTime;
  /** Trace propagation headers. */
  readonly trace?: Record<string, string> | undefined;
};

type AttemptTime = {
  /** Time for this attempt, until the first byte of its answer. */
  readonly timeout_ms: number;
  /** The caller's remaining time, sent to the backend. */
  readonly left_ms: number;
  /**
   * Time limit for the rest of a small non-streaming answer, which must then be read through `rest`; undefined: no
   * limit. The rest of an error has the same limit, or `timeout_ms`.
   */
  readonly stall_ms?: number | undefined;
};

export async function attempt(sending: Sending): Promise<Attempted> {
  const { send, url, request, signal } = sending;
  const { timeout_ms, left_ms, stall_ms } = sending.time;
  const wait = createWait(Math.min(timeout_ms, stall_ms ?? timeout_ms));
  // A backend knows the caller's deadline and stops by itself. A controller that follows another signal takes a twelfth
  // of a request's CPU time, so there is one only if this attempt may time out earlier.
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
    return { kind: 'failed', error: unreachable(error), again: true, seemsGone: true };
  } finally {
    if (!isRestLeft) wait.end();
  }
}

const initOf = ({ request, token, time, trace }: Sending, signal: AbortSignal): RequestInit => ({
  method: request.body === undefined ? 'GET' : 'POST',
  headers: {
    authorization: `Bearer ${token}`,
    accept: 'application/json, text/event-stream',
    // A compressed stream would be buffered for decompression.
    'accept-encoding': 'identity',
    [HEADERS.requestId]: request.requestId,
    [BACKEND_HEADERS.deadline]: String(Math.ceil(time.left_ms)),
    ...trace,
    ...(request.body === undefined ? {} : { 'content-type': 'application/json' }),
  },
  redirect: 'manual',
  // Aborting it propagates a client's hang-up to the engine, also before the first byte.
  signal,
  ...(request.body === undefined ? {} : { body: request.body }),
});

/** Whether an answer is small and not a stream, so that it can be read at once. */
function isSmallWhole(headers: Headers): boolean {
  const length = headers.get('content-length');
  if (length === null || Number(length) > WHOLE_BYTES_MAX) return false;
  return headers.get('content-type')?.startsWith('text/event-stream') !== true;
}
/** Non-streaming answers up to this size are read at once, which takes less work than passing on chunks. */
const WHOLE_BYTES_MAX = 1024 * 1024;

class LateError extends Error {}

/** A controller that also aborts with `signal`. `AbortSignal.any` is considerably slower. */
function controlledBy(signal: AbortSignal): AbortController {
  const controller = new AbortController();
  if (signal.aborted) controller.abort(signal.reason);
  else signal.addEventListener('abort', () => controller.abort(signal.reason), { once: true });
  return controller;
}

/** Cancels an answer that comes too late. */
function forget(sent: Promise<Response>): void {
  sent.then((response) => response.body?.cancel()).catch(() => {});
}

export const unreachable = (cause?: unknown, retryAfter_s?: number): MaskrouteError =>
  notNow('backend_unreachable', 'The model backend cannot be reached right now.', cause, retryAfter_s);

const errorBodySchema = z.looseObject({
  error: z.looseObject({ message: z.string(), code: z.unknown(), param: z.unknown() }),
});

/** An error of the protocol, with its text; null for anything else, and when `rest` times out. Never throws. */
export async function readError(response: Response, rest: Rest = (work) => work) {
  const text = await rest(readAnswer(response, BACKEND_ERROR_BYTES_MAX)).catch(() => null);
  if (text === null) return null;
  const body = errorBodySchema.safeParse(parseOrNull(text));
  return body.success ? { text, ...body.data.error } : null;
}

/** Refusals that do not count as failures of the backend. */
const HARMLESS: ReadonlyMap<unknown, Refusal> = new Map([
  ['queue_full', 'full'],
  ['queue_timeout', 'full'],
  ['request_timeout', 'full'],
  ['not_ready', 'stopping'],
]);
/** Errors for which no other backend helps: the caller's deadline has passed, or the mask is the problem. */
const FINAL_CODES: readonly unknown[] = ['deadline_exceeded', 'configuration_unavailable'];

/**
 * Whether a status comes from a proxy, load balancer or tunnel that cannot reach the backend; 520 to 530 are
 * Cloudflare's.
 */
const isOfSomethingBetween = (status: number): boolean =>
  (status >= 502 && status <= 504) || (status >= 520 && status <= 530);
/** What a proxy says of a connection that was refused, or broke; Cloudflare says 521. */
const NO_CONNECTION: readonly number[] = [502, 521];

/** `errorRest`: how the body of an error is read. */
async function judge(
  response: Response,
  request: BackendRequest,
  rest: Rest | undefined,
  errorRest: Rest,
): Promise<Attempted> {
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
  if (status < 400) {
    const target = response.headers.get('location') ?? 'nowhere';
    return await foreign(response, request, `a redirect to ${target}`);
  }
  if (!type.startsWith('application/json')) return await foreign(response, request, `content type ${type}`);
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

/**
 * The outcome of an answer that violates the protocol: it came from a faulty backend, or from a proxy that did not
 * reach it.
 */
async function foreign(
  response: Response,
  { requestId }: BackendRequest,
  reason: string,
): Promise<Attempted> {
  const { status } = response;
  await response.body?.cancel().catch(() => {});
  if (isOfSomethingBetween(status)) {
    log('error', 'backend_unreachable', { request_id: requestId, url: response.url, status, reason });
    return { kind: 'failed', error: unreachable(), again: true, seemsGone: NO_CONNECTION.includes(status) };
  }
  log('error', 'backend_error', { request_id: requestId, url: response.url, status, reason });
  const error = new MaskrouteError('backend_error', 'The model backend gave an answer that cannot be used.');
  return { kind: 'failed', error, again: false, seemsGone: false };
}

/** Whether the body is empty. Accessing `body` creates a stream, so the length is checked first. */
function isEmpty(response: Response): boolean {
  const length = response.headers.get('content-length');
  return length === null ? response.body === null : length === '0';
}

/** Why a backend refused the edge's credentials, in its own words; for the log, never for the client. */
async function refusal(response: Response, rest: Rest): Promise<string> {
  const error = await readError(response, rest);
  const why = error === null ? 'without a reason' : `${error.code}: ${error.message}`;
  return `it refused the credentials of the edge (${why}): compare BACKEND_KEY, MASKROUTE_BACKEND_URL, clocks`;
}

/* How long a request waits for its answer's first byte: the edge's limit, or less if the client asks for less. */

export type Patience = {
  readonly time_ms: number;
  /** Whether the client set a shorter limit than the edge: then a timeout is attributed to the client. */
  readonly isShort: boolean;
};

/** @throws MaskrouteError `invalid_request` when the header is not a number of milliseconds. */
export function patienceOf(header: string | undefined, most_ms: number): Patience {
  if (header === undefined) return { time_ms: most_ms, isShort: false };
  if (!/^[1-9]\d{0,8}$/.test(header)) {
    const name = BACKEND_HEADERS.deadline;
    throw new MaskrouteError('invalid_request', `${name}: expected milliseconds.`, { param: name });
  }
  const time_ms = Math.min(Number(header), most_ms);
  return { time_ms, isShort: time_ms < most_ms };
}
