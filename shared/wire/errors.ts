/**
 * Errors in the wire format: the OpenAI error object with a stable `code`. Inside the code, `MaskrouteError` has the
 * same fields; edge and backend turn it into a response, and any other error into `internal_error` without details.
 */
import type { Hono } from 'hono';

/** Every error code, with its HTTP status and OpenAI `type`. */
export const ERROR_CODES = {
  invalid_json: [400, 'invalid_request_error'],
  invalid_request: [400, 'invalid_request_error'],
  context_length_exceeded: [400, 'invalid_request_error'],
  unknown_mask: [400, 'invalid_request_error'],
  mask_model_mismatch: [400, 'invalid_request_error'],
  surrogates_mismatch: [400, 'invalid_request_error'],
  invalid_mask_set: [400, 'invalid_request_error'],
  invalid_schema: [400, 'invalid_request_error'],
  invalid_encoder: [400, 'invalid_request_error'],
  invalid_data: [400, 'invalid_request_error'],
  encoder_mismatch: [400, 'invalid_request_error'],
  quality_unknown: [400, 'invalid_request_error'],
  quality_below_floor: [400, 'invalid_request_error'],
  unsupported_model: [400, 'invalid_request_error'],
  corrupt_model: [400, 'invalid_request_error'],
  invalid_api_key: [401, 'authentication_error'],
  expired_token: [401, 'authentication_error'],
  invalid_session: [401, 'authentication_error'],
  forbidden: [403, 'permission_error'],
  tenant_disabled: [403, 'permission_error'],
  model_not_allowed: [403, 'permission_error'],
  sparsity_over_ceiling: [403, 'permission_error'],
  model_not_found: [404, 'invalid_request_error'],
  not_found: [404, 'invalid_request_error'],
  method_not_allowed: [405, 'invalid_request_error'],
  request_timeout: [408, 'invalid_request_error'],
  conflict: [409, 'invalid_request_error'],
  body_too_large: [413, 'invalid_request_error'],
  unsupported_media_type: [415, 'invalid_request_error'],
  request_fails_engine: [422, 'invalid_request_error'],
  rate_limit_exceeded: [429, 'rate_limit_error'],
  budget_exceeded: [429, 'rate_limit_error'],
  queue_full: [429, 'rate_limit_error'],
  headers_too_large: [431, 'invalid_request_error'],
  cancelled: [499, 'invalid_request_error'],
  internal_error: [500, 'server_error'],
  engine_failed: [500, 'server_error'],
  backend_error: [502, 'server_error'],
  download_failed: [502, 'server_error'],
  backend_unreachable: [503, 'server_error'],
  edge_unreachable: [503, 'server_error'],
  not_ready: [503, 'server_error'],
  budget_unavailable: [503, 'server_error'],
  configuration_unavailable: [503, 'server_error'],
  queue_timeout: [503, 'server_error'],
  deadline_exceeded: [504, 'server_error'],
  // Only on the command line.
  invalid_argument: [400, 'invalid_request_error'],
  already_running: [409, 'invalid_request_error'],
  port_in_use: [409, 'invalid_request_error'],
  no_device: [500, 'server_error'],
  start_failed: [500, 'server_error'],
  storage_failed: [500, 'server_error'],
} as const satisfies Record<string, readonly [number, string]>;
export type ErrorCode = keyof typeof ERROR_CODES;

/**
 * Codes after which a retry is useless. OpenAI's clients retry after 409, 429 and 5xx, unless `x-should-retry` is false. What
 * took too long would be computed, and paid, two more times.
 */
export const USELESS_TO_RETRY: readonly ErrorCode[] = ['conflict', 'deadline_exceeded'];

/** Whether a code is ours: other servers may send any code. */
export const isErrorCode = (code: unknown): code is ErrorCode =>
  typeof code === 'string' && Object.hasOwn(ERROR_CODES, code);

export type WireError = {
  error: { message: string; type: string; param: string | null; code: ErrorCode };
};

export class MaskrouteError extends Error {
  readonly code: ErrorCode;
  readonly param: string | null;
  readonly retryAfter_s: number | undefined;

  constructor(
    code: ErrorCode,
    message: string,
    options: { param?: string | null; retryAfter_s?: number; cause?: unknown } = {},
  ) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause });
    this.name = 'MaskrouteError';
    this.code = code;
    this.param = options.param ?? null;
    this.retryAfter_s = options.retryAfter_s;
  }

  get status(): number {
    return ERROR_CODES[this.code][0];
  }

  toWire(): WireError {
    return {
      error: { message: this.message, type: ERROR_CODES[this.code][1], param: this.param, code: this.code },
    };
  }
}

/** The error for an aborted `signal`: its reason if that is a MaskrouteError, else `cancelled`. */
export const cancellation = ({ reason }: AbortSignal): MaskrouteError =>
  reason instanceof MaskrouteError ? reason : new MaskrouteError('cancelled', 'The request was cancelled.');

/** The error that a client sees for any thrown value: a MaskrouteError itself, or a generic one. */
export function toMaskrouteError(error: unknown): MaskrouteError {
  return error instanceof MaskrouteError
    ? error
    : new MaskrouteError('internal_error', 'The server met an unexpected condition.', { cause: error });
}

const METHODS = ['GET', 'POST', 'PUT', 'PATCH', 'DELETE'];

/**
 * The error for a request without a route: `method_not_allowed` if its path has other methods, else `not_found`.
 * `allowed`: the path's methods, for the header `allow`.
 */
export function unrouted<Env extends object>(
  { router }: Pick<Hono<Env>, 'router'>,
  { method, path }: { readonly method: string; readonly path: string },
): { readonly error: MaskrouteError; readonly allowed: readonly string[] } {
  const methodsOf = (at: string) =>
    METHODS.filter((one) => router.match(one, at)[0].some(([[, route]]) => route.method === one));
  const allowed = methodsOf(path);
  if (allowed.length > 0) {
    const message = `${path} takes ${allowed.join(', ')}.`;
    return { error: new MaskrouteError('method_not_allowed', message), allowed };
  }
  // Clients' base addresses often lack `/v1`.
  const guess = `/v1${path}`;
  const end = methodsOf(guess).length === 0 ? '.' : `; did you mean \`${guess}\`?`;
  return { error: new MaskrouteError('not_found', `There is no ${method} ${path}${end}`), allowed };
}
