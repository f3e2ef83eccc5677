/**
 * Requests to a backend's jobs API on behalf of an operator of the edge. The token has the scope `jobs` and is for that
 * one backend. The backend key itself is never sent, since an entry of the registry may point to anybody's server.
 */
import type { z } from 'zod';
import { isErrorCode, MaskrouteError } from '../../shared/wire/errors.ts';
import { parseOrNull, readAnswer } from '../../shared/wire/parse-body.ts';
import { HEADERS } from '../../shared/wire/protocol.ts';
import { createSigner } from '../../shared/wire/service-token.ts';
import { log, reasonOf } from '../base/telemetry.ts';
import { notNow, withDeadline } from '../base/waiting.ts';
import { JOBS } from '../limits.ts';
import { type Rest, readError, type Send } from './attempt.ts';
import { hungUp } from './call-backend.ts';

export type JobQuestion = {
  /** The address of the backend. */
  readonly url: string;
  readonly method: 'GET' | 'POST' | 'DELETE';
  /** Path below `/v1/jobs`. */
  readonly path: string;
  readonly body?: string | ReadableStream<Uint8Array>;
  readonly requestId: string;
  /** The client's signal: when it hangs up, reading stops. */
  readonly signal: AbortSignal;
};

export interface BackendJobs {
  /**
   * The status, 200 to 299, and the parsed answer. @throws MaskrouteError the backend's own refusal, `backend_error`, `backend_unreachable`, and
   * `cancelled` when the client hangs up.
   */
  ask<T extends z.ZodType>(
    schema: T,
    question: JobQuestion,
  ): Promise<{ readonly status: number; readonly answer: z.output<T> }>;
  /** The stream of events, unchanged. @throws MaskrouteError as `ask`. */
  follow(question: JobQuestion): Promise<ReadableStream<Uint8Array>>;
}

export function createBackendJobs(backendKey: string, sendTo: Send): BackendJobs {
  const sign = createSigner(backendKey);

  /** Returns only successful answers. `isOpen`: the time limit is for the headers, not for the upload or the events. */
  const send = async (question: JobQuestion, isOpen: boolean): Promise<Response> => {
    const { url, method, path, body, requestId, signal } = question;
    const type = typeof body === 'string' ? 'application/json' : 'application/x-ndjson';
    let response: Response;
    try {
      response = await sendTo(`${url}/v1/jobs${path}`, {
        method,
        headers: {
          authorization: `Bearer ${await sign({ tenant: '', edge: '', audience: url, scope: 'jobs' })}`,
          'accept-encoding': 'identity',
          [HEADERS.requestId]: requestId,
          ...(body === undefined ? {} : { 'content-type': type }),
        },
        redirect: 'manual',
        signal: isOpen ? signal : AbortSignal.any([signal, AbortSignal.timeout(JOBS.timeout_ms)]),
        ...(body === undefined ? {} : { body }),
      });
    } catch (error) {
      if (signal.aborted) throw hungUp();
      log('error', 'jobs_unreachable', { request_id: requestId, url, reason: reasonOf(error) });
      throw notNow('backend_unreachable', 'The backend cannot be reached right now.', error);
    }
    if (response.ok) return response;
    throw await refusal(response, question);
  };

  return {
    async ask(schema, question) {
      const response = await send(question, question.body instanceof ReadableStream);
      const text = await inTime(readAnswer(response, JOBS.bytesMax)).catch((error) => {
        throw useless(question, reasonOf(error));
      });
      const parsed = schema.safeParse(parseOrNull(text));
      if (!parsed.success) throw useless(question, parsed.error.message);
      return { status: response.status, answer: parsed.data };
    },
    async follow(question) {
      const response = await send(question, true);
      const type = response.headers.get('content-type') ?? '';
      if (response.body !== null && type.startsWith('text/event-stream')) return response.body;
      await response.body?.cancel();
      throw useless(question, `content type ${type}`);
    },
  };
}

/** The signal of an upload or of events has no time limit, but an answer that has begun has one. */
const inTime: Rest = (work) => withDeadline(work, JOBS.timeout_ms, 'the rest of an answer');

/**
 * The error for a refusal: errors about the job go to the operator, errors about the edge's credentials only to the
 * log.
 */
async function refusal(response: Response, question: JobQuestion): Promise<MaskrouteError> {
  const said = await readError(response, inTime);
  if (said === null) return useless(question, `status ${response.status}`);
  const { code, message, param } = said;
  if (response.status === 401 || !isErrorCode(code)) return useless(question, `${code}: ${message}`);
  const retryAfter_s = Number(response.headers.get('retry-after') ?? 0);
  return new MaskrouteError(code, message, {
    param: typeof param === 'string' ? param : null,
    ...(retryAfter_s > 0 ? { retryAfter_s } : {}),
  });
}

/** The error for an answer that cannot be used. If the client hung up half-way, that is not the backend's fault. */
function useless({ requestId, signal }: JobQuestion, reason: string): MaskrouteError {
  if (signal.aborted) return hungUp();
  log('error', 'jobs_answer_useless', { request_id: requestId, reason });
  return new MaskrouteError('backend_error', 'The backend gave an answer that cannot be used.');
}
