/**
 * The backend behind the edge: signed calls, the first byte in bounded time, and answers told from garbage.
 * Nothing is retried here: a completion that may have begun must not run twice.
 */
import { z } from 'zod';
import { MaskrouteError } from '../../shared/errors.ts';
import { HEADERS } from '../../shared/protocol.ts';
import { importTokenKey, signToken, TOKEN_LIFETIME_s, type TokenKey } from '../../shared/service-token.ts';
import { BACKEND_ERROR_BYTES_MAX, RETRY_AFTER_s } from '../limits.ts';
import { readBounded } from './bounded.ts';
import { log, reasonOf } from './log.ts';
import { randomHex } from './secrets.ts';

export type BackendRequest = {
  readonly path: string;
  readonly requestId: string;
  /** For the backend's logs and cache salt; empty for the edge's own questions. */
  readonly tenant: string;
  /** Where the backend may fetch masks that it does not know. */
  readonly edge: string;
  readonly signal: AbortSignal;
  readonly timeout_ms: number;
  /** JSON text; a GET without it. */
  readonly body?: string;
};

export interface Backend {
  /**
   * The answer, its body unread when it is a success.
   * @throws MaskrouteError `backend_unreachable` when there is no answer in time, `backend_error` when the
   * answer is none of the protocol's, `cancelled` when `signal` aborts.
   */
  call(request: BackendRequest): Promise<Response>;
}

export function createBackend(baseUrl: string, backendKey: string): Backend {
  let tokenKey: Promise<TokenKey> | undefined;
  const token = async (tenant: string, edge: string): Promise<string> => {
    tokenKey ??= importTokenKey(backendKey);
    const issuedAt_s = Math.floor(Date.now() / 1000);
    const claims = {
      tenant,
      issuedAt_s,
      expiresAt_s: issuedAt_s + TOKEN_LIFETIME_s,
      nonce: randomHex(16),
      edge,
    };
    return await signToken(await tokenKey, claims);
  };
  return {
    async call(request) {
      const response = await send(baseUrl, request, await token(request.tenant, request.edge));
      return await checked(response, request);
    },
  };
}

async function send(baseUrl: string, request: BackendRequest, token: string): Promise<Response> {
  const timeout = new AbortController();
  const timer = setTimeout(() => timeout.abort(), request.timeout_ms);
  try {
    return await fetch(baseUrl + request.path, {
      method: request.body === undefined ? 'GET' : 'POST',
      headers: {
        authorization: `Bearer ${token}`,
        accept: 'application/json, text/event-stream',
        // A compressed stream would be held back to be unpacked.
        'accept-encoding': 'identity',
        [HEADERS.requestId]: request.requestId,
        ...(request.body === undefined ? {} : { 'content-type': 'application/json' }),
      },
      redirect: 'manual',
      // Aborting it is how a hang-up reaches the engine, before the first byte too.
      signal: AbortSignal.any([request.signal, timeout.signal]),
      ...(request.body === undefined ? {} : { body: request.body }),
    });
  } catch (error) {
    if (request.signal.aborted) throw new MaskrouteError('cancelled', 'The client hung up.');
    const reason = timeout.signal.aborted ? `no answer within ${request.timeout_ms} ms` : reasonOf(error);
    log('error', 'backend_unreachable', { request_id: request.requestId, reason });
    throw new MaskrouteError('backend_unreachable', 'The model backend cannot be reached right now.', {
      retryAfter_s: RETRY_AFTER_s,
      cause: error,
    });
  } finally {
    clearTimeout(timer);
  }
}

const errorBodySchema = z.looseObject({ error: z.looseObject({ message: z.string() }) });

async function checked(response: Response, request: BackendRequest): Promise<Response> {
  const garbage = async (reason: string): Promise<never> => {
    await response.body?.cancel().catch(() => {});
    log('error', 'backend_error', { request_id: request.requestId, status: response.status, reason });
    throw new MaskrouteError('backend_error', 'The model backend gave an answer that cannot be used.');
  };
  const type = response.headers.get('content-type') ?? '';
  if (response.status === 401 || response.status === 403) {
    return await garbage('it refused the credentials of the edge: compare BACKEND_KEY and the clocks');
  }
  if (response.ok) {
    return /^(application\/json|text\/event-stream)\b/.test(type)
      ? response
      : await garbage(`content type ${type}`);
  }
  if (response.status < 400 || !type.startsWith('application/json'))
    return await garbage(`content type ${type}`);
  const text = await readBounded(response.body, BACKEND_ERROR_BYTES_MAX).catch(() => null);
  if (text === null || !errorBodySchema.safeParse(parseOrNull(text)).success) {
    return await garbage('an error that is none of the protocol');
  }
  return new Response(text, { status: response.status, headers: response.headers });
}

function parseOrNull(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}
