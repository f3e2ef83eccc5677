/**
 * Clients for the APIs of an edge and of a backend: they parse answers, and throw errors with the server's code and
 * message.
 */
import { z } from 'zod';
import { listSchema } from '../../shared/admin/admin-wire.ts';
import { type ErrorCode, isErrorCode, MaskrouteError } from '../../shared/wire/errors.ts';
import { parseOrNull } from '../../shared/wire/parse-body.ts';

const ANSWER_TIMEOUT_ms = 30_000;

const wireErrorSchema = z.object({
  error: z.object({
    message: z.string(),
    code: z.custom<ErrorCode>(isErrorCode),
    param: z.string().nullish(),
  }),
});

type AdminRequest = {
  readonly method: 'GET' | 'POST' | 'PUT' | 'DELETE';
  /** Path and query below `/admin/v1` or `/v1`. */
  readonly path: string;
  readonly body?: unknown;
  /** Changes nothing, whatever its method. */
  readonly isDryRun?: boolean;
  /** Ends it early, as if no answer came. */
  readonly signal?: AbortSignal | undefined;
};

export type Requests = {
  /**
   * The answer, parsed by `schema`.
   * @throws MaskrouteError the server's own error; `edge_unreachable` or `backend_unreachable` when no answer comes in
   * time; `backend_error` when the server is not Maskroute.
   */
  request<T>(request: AdminRequest, schema: z.ZodType<T>): Promise<T>;
};

export type AdminClient = Requests & { readonly edge: string };
/** Client for a backend's API (`/v1`), with the backend key. */
export type BackendClient = Requests & { readonly backend: string };

export function createAdminClient(edge: string, adminKey: string, timeout_ms?: number): AdminClient {
  const origin = withoutSlash(edge);
  return {
    edge: origin,
    ...requestsTo({ kind: 'edge', origin, base: '/admin/v1', key: adminKey, timeout_ms }),
  };
}

export function createBackendClient(backend: string, backendKey: string): BackendClient {
  const origin = withoutSlash(backend);
  return { backend: origin, ...requestsTo({ kind: 'backend', origin, base: '/v1', key: backendKey }) };
}

/** Client for what an edge offers to a tenant (`/v1`), with the tenant's key. */
export const createTenantClient = (edge: string, apiKey: string): Requests =>
  requestsTo({ kind: 'edge', origin: withoutSlash(edge), base: '/v1', key: apiKey });

const withoutSlash = (address: string): string => address.replace(/\/+$/, '');

type Server = {
  readonly kind: 'edge' | 'backend';
  readonly origin: string;
  readonly base: string;
  readonly key: string;
  readonly timeout_ms?: number | undefined;
};

function requestsTo(server: Server): Requests {
  const stranger = (more: string, cause?: unknown) =>
    new MaskrouteError('backend_error', `${server.origin} ${more} like a Maskroute ${server.kind}.`, {
      cause,
    });
  return {
    async request(request, schema) {
      const { ok, status, text } = await send(server, request);
      const answer = parseOrNull(text);
      if (ok) {
        const parsed = schema.safeParse(answer);
        if (parsed.success) return parsed.data;
        throw stranger('does not answer', parsed.error);
      }
      const refused = wireErrorSchema.safeParse(answer);
      if (!refused.success) throw stranger(`answered ${status}, and not`);
      const { code, message, param } = refused.data.error;
      throw new MaskrouteError(code, message, { param: param ?? null });
    },
  };
}

/** The items of a list; a page is read when its first item is wanted. `path` may have a query. @throws what `request` throws. */
export async function* itemsOf<T extends z.ZodType>(
  client: AdminClient,
  path: string,
  item: T,
): AsyncGenerator<z.output<T>, void> {
  for (let from = path; ; ) {
    const { data, next } = await client.request({ method: 'GET', path: from }, listSchema(item));
    yield* data;
    if (next == null) return;
    from = `${path}${path.includes('?') ? '&' : '?'}before=${encodeURIComponent(next)}`;
  }
}

/** The first `countMax` items of a list, or all, as {@link itemsOf} reads them. */
export async function listAll<T extends z.ZodType>(
  client: AdminClient,
  path: string,
  item: T,
  countMax = Number.POSITIVE_INFINITY,
): Promise<z.output<T>[]> {
  const items: z.output<T>[] = [];
  for await (const one of itemsOf(client, path, item)) {
    items.push(one);
    if (items.length >= countMax) break;
  }
  return items;
}

type Answer = Pick<Response, 'ok' | 'status'> & { readonly text: string };

async function send(
  server: Server,
  { method, path, body, isDryRun = method === 'GET', signal }: AdminRequest,
): Promise<Answer> {
  const { kind, origin, base, key, timeout_ms = ANSWER_TIMEOUT_ms } = server;
  const headers: Record<string, string> = { authorization: `Bearer ${key}` };
  if (body !== undefined) headers['content-type'] = 'application/json';
  const at = new URL(origin).origin;
  // Whoever repeats a rollback that was only slow rolls back twice.
  const mayBeDone = isDryRun ? '' : ' It may have done what it was asked: look before you ask again.';
  const unreachable = (message: string, cause: unknown) =>
    new MaskrouteError(`${kind}_unreachable`, message, { cause });
  let response: Response;
  try {
    response = await fetch(`${origin}${base}${path}`, {
      method,
      headers,
      body: body === undefined ? null : JSON.stringify(body),
      signal: AbortSignal.any([AbortSignal.timeout(timeout_ms), ...(signal === undefined ? [] : [signal])]),
    });
  } catch (error) {
    if ((error as Error).name === 'TimeoutError')
      throw unreachable(
        `The ${kind} at ${at} did not answer within ${timeout_ms / 1000} s.${mayBeDone}`,
        error,
      );
    const cause = (error as Error).cause as NodeJS.ErrnoException | undefined;
    const reason = cause?.message || cause?.code || (error as Error).message;
    const wasSent = CUT_OFF.has(cause?.code ?? '');
    throw unreachable(`No ${kind} answers at ${at}: ${reason}.${wasSent ? mayBeDone : ''}`, error);
  }
  try {
    return { ok: response.ok, status: response.status, text: await response.text() };
  } catch (error) {
    throw unreachable(`The ${kind} at ${at} did not end its answer.${mayBeDone}`, error);
  }
}

/** A connection that ends after the request was sent. */
const CUT_OFF: ReadonlySet<string> = new Set(['ECONNRESET', 'EPIPE', 'UND_ERR_SOCKET']);
