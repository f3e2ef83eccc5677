/** One request to one backend: signed, its first byte in bounded time, and answers told from garbage. */
import { z } from 'zod';
import { BACKEND_HEADERS } from '../../../shared/backends.ts';
import { MaskrouteError } from '../../../shared/errors.ts';
import { HEADERS } from '../../../shared/protocol.ts';
import { BACKEND_ERROR_BYTES_MAX, RETRY_AFTER_s } from '../../limits.ts';
import { parseOrNull, readBounded } from '../bounded.ts';
import { log, reasonOf } from '../log.ts';
import type { Send } from './network.ts';

export type BackendRequest = {
  readonly path: string;
  readonly requestId: string;
  /** Tenant id: whose turn it is there, and whose cached prompts it may use; empty for the edge's own questions. */
  readonly tenant: string;
  /** Where the backend may fetch masks that it does not know. */
  readonly edge: string;
  readonly signal: AbortSignal;
  /** Until the first byte of the answer, all attempts together. */
  readonly timeout_ms: number;
  /** JSON text; a GET without it. */
  readonly body?: string;
};

/** What came of it, as far as the next step depends on that. */
export type Outcome =
  /** The backend's word: a success, or an error that every backend would answer. `callOff` ends it in its middle. */
  | { readonly kind: 'answer'; readonly response: Response; readonly callOff: () => void }
  /** An error of its own that another backend may not have; the client gets it when there is no other. */
  | { readonly kind: 'refused'; readonly response: Response; readonly why: Refusal }
  /** No answer, or none of the protocol. `again`: the same backend may do better in a moment. */
  | { readonly kind: 'failed'; readonly error: MaskrouteError; readonly again: boolean }
  /** Given up after all of the attempt's time: it may have worked on the request. */
  | { readonly kind: 'late'; readonly waited_ms: number }
  | { readonly kind: 'cancelled' };

/** `stopping`: it is about to be gone, and another one may already answer at its address. */
export type Refusal = 'sick' | 'full' | 'stopping';

export type Sending = {
  readonly send: Send;
  readonly url: string;
  readonly token: string;
  readonly request: BackendRequest;
  /** Aborts this attempt alone. */
  readonly signal: AbortSignal;
  /** Of this attempt. */
  readonly timeout_ms: number;
  /** What is left of the caller's time, which the backend is told. */
  readonly left_ms: number;
};

export async function attempt({
  send,
  url,
  token,
  request,
  signal,
  timeout_ms,
  left_ms,
}: Sending): Promise<Outcome> {
  const { off, abort, isLate, timer } = abortable(signal, timeout_ms);
  try {
    const response = await send(url + request.path, {
      method: request.body === undefined ? 'GET' : 'POST',
      headers: {
        authorization: `Bearer ${token}`,
        accept: 'application/json, text/event-stream',
        // A compressed stream would be held back to be unpacked.
        'accept-encoding': 'identity',
        [HEADERS.requestId]: request.requestId,
        [BACKEND_HEADERS.deadline]: String(Math.ceil(left_ms)),
        ...(request.body === undefined ? {} : { 'content-type': 'application/json' }),
      },
      redirect: 'manual',
      // Aborting it is how a hang-up reaches the engine, before the first byte too.
      signal: off,
      ...(request.body === undefined ? {} : { body: request.body }),
    });
    return await judge(response, request, abort);
  } catch (error) {
    if (signal.aborted) return { kind: 'cancelled' };
    const { requestId: request_id } = request;
    if (isLate()) {
      log('warn', 'backend_late', { request_id, url, waited_ms: timeout_ms });
      return { kind: 'late', waited_ms: timeout_ms };
    }
    log('error', 'backend_unreachable', { request_id, url, reason: reasonOf(error) });
    return { kind: 'failed', error: unreachable(error), again: true };
  } finally {
    clearTimeout(timer);
  }
}

/**
 * `off` aborts with `signal`, by `abort`, or after `timeout_ms` unless `timer` is cleared. It is one signal and not
 * `AbortSignal.any` of two, which takes the runtime a good deal longer to make.
 */
function abortable(signal: AbortSignal, timeout_ms: number) {
  const controller = new AbortController();
  let late = false;
  if (signal.aborted) controller.abort(signal.reason);
  else signal.addEventListener('abort', () => controller.abort(signal.reason), { once: true });
  const timer = setTimeout(() => {
    late = true;
    controller.abort();
  }, timeout_ms);
  return { off: controller.signal, abort: () => controller.abort(), isLate: () => late, timer };
}

export const unreachable = (cause?: unknown, retryAfter_s = RETRY_AFTER_s): MaskrouteError =>
  new MaskrouteError('backend_unreachable', 'The model backend cannot be reached right now.', {
    retryAfter_s,
    cause,
  });

const errorBodySchema = z.looseObject({ error: z.looseObject({ message: z.string(), code: z.unknown() }) });

/** Refusals that say nothing bad of the backend. */
const HARMLESS: ReadonlyMap<unknown, Refusal> = new Map([
  ['queue_full', 'full'],
  ['queue_timeout', 'full'],
  ['not_ready', 'stopping'],
]);
/** Errors after the caller's own time, or about the request's mask: no other backend helps. */
const FINAL_CODES: readonly unknown[] = ['deadline_exceeded', 'configuration_unavailable'];

async function judge(response: Response, request: BackendRequest, callOff: () => void): Promise<Outcome> {
  const garbage = async (reason: string): Promise<Outcome> => {
    await response.body?.cancel().catch(() => {});
    log('error', 'backend_error', { request_id: request.requestId, status: response.status, reason });
    const error = new MaskrouteError(
      'backend_error',
      'The model backend gave an answer that cannot be used.',
    );
    return { kind: 'failed', error, again: false };
  };
  const type = response.headers.get('content-type') ?? '';
  if (response.status === 401 || response.status === 403) {
    return await garbage(await refusal(response));
  }
  if (response.ok) {
    if (isEmpty(response)) return await garbage('no body');
    return /^(application\/json|text\/event-stream)\b/.test(type)
      ? { kind: 'answer', response, callOff }
      : await garbage(`content type ${type}`);
  }
  if (response.status < 400 || !type.startsWith('application/json'))
    return await garbage(`content type ${type}`);
  const text = await readBounded(response.body, BACKEND_ERROR_BYTES_MAX).catch(() => null);
  const body = errorBodySchema.safeParse(text === null ? null : parseOrNull(text));
  if (text === null || !body.success) return await garbage('an error that is none of the protocol');
  const said = new Response(text, { status: response.status, headers: response.headers });
  const { code } = body.data.error;
  const harmless = HARMLESS.get(code);
  if (harmless !== undefined || (response.status >= 500 && !FINAL_CODES.includes(code))) {
    return { kind: 'refused', response: said, why: harmless ?? 'sick' };
  }
  return { kind: 'answer', response: said, callOff };
}

/** A body that is only named costs a stream, so it is not where the length is known. */
function isEmpty(response: Response): boolean {
  const length = response.headers.get('content-length');
  return length === null ? response.body === null : length === '0';
}

/** Why a backend does not let the edge in, in its own words: for the log, never for the client. */
async function refusal(response: Response): Promise<string> {
  const text = await readBounded(response.body, BACKEND_ERROR_BYTES_MAX).catch(() => null);
  const said = errorBodySchema.safeParse(text === null ? null : parseOrNull(text));
  const why = said.success ? `${said.data.error.code}: ${said.data.error.message}` : 'without a reason';
  return `it refused the credentials of the edge (${why}): compare BACKEND_KEY, MASKROUTE_BACKEND_URL, clocks`;
}
