/**
 * Client for the admin API of an edge or of a backend: parses answers, and throws errors with the server's code and
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
  /** Path and query below `/admin/v1`, or below a backend's `/v1`. */
  readonly path: string;
  readonly body?: unknown;
};

type Requests = {
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

export function createAdminClient(edge: string, adminKey: string): AdminClient {
  const origin = edge.replace(/\/+$/, '');
  return { edge: origin, ...requestsTo({ kind: 'edge', origin, base: '/admin/v1', key: adminKey }) };
}

export function createBackendClient(backend: string, backendKey: string): BackendClient {
  const origin = backend.replace(/\/+$/, '');
  return { backend: origin, ...requestsTo({ kind: 'backend', origin, base: '/v1', key: backendKey }) };
}

type Server = {
  readonly kind: 'edge' | 'backend';
  readonly origin: string;
  readonly base: string;
  readonly key: string;
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

/** Everything in a list, page by page; `path` may have a query. @throws what `request` throws. */
export async function listAll<T extends z.ZodType>(
  client: AdminClient,
  path: string,
  item: T,
): Promise<z.output<T>[]> {
  const items: z.output<T>[] = [];
  for (let from = path; ; ) {
    const { data, next } = await client.request({ method: 'GET', path: from }, listSchema(item));
    items.push(...data);
    if (next == null) return items;
    from = `${path}${path.includes('?') ? '&' : '?'}before=${encodeURIComponent(next)}`;
  }
}

type Answer = Pick<Response, 'ok' | 'status'> & { readonly text: string };

async function send({ kind, origin, base, key }: Server, request: AdminRequest): Promise<Answer> {
  const headers: Record<string, string> = { authorization: `Bearer ${key}` };
  if (request.body !== undefined) headers['content-type'] = 'application/json';
  const at = new URL(origin).origin;
  const unreachable = (message: string, cause: unknown) =>
    new MaskrouteError(`${kind}_unreachable`, message, { cause });
  let response: Response;
  try {
    response = await fetch(`${origin}${base}${request.path}`, {
      method: request.method,
      headers,
      body: request.body === undefined ? null : JSON.stringify(request.body),
      signal: AbortSignal.timeout(ANSWER_TIMEOUT_ms),
    });
  } catch (error) {
    throw unreachable(`No ${kind} answers at ${at}.`, error);
  }
  try {
    return { ok: response.ok, status: response.status, text: await response.text() };
  } catch (error) {
    throw unreachable(`The ${kind} at ${at} did not end its answer.`, error);
  }
}
