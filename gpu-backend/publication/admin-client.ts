/** The edge's admin API over HTTP, its answers parsed and its errors raised as they were worded there. */
import { z } from 'zod';
import { listSchema } from '../../shared/admin/admin-wire.ts';
import { ERROR_CODES, type ErrorCode, MaskrouteError } from '../../shared/wire/errors.ts';

const ANSWER_TIMEOUT_ms = 30_000;

const wireErrorSchema = z.object({
  error: z.object({
    message: z.string(),
    code: z.custom<ErrorCode>((code) => typeof code === 'string' && Object.hasOwn(ERROR_CODES, code)),
    param: z.string().nullish(),
  }),
});

export type AdminRequest = {
  readonly method: 'GET' | 'POST' | 'PUT' | 'DELETE';
  /** Below `/admin/v1`, with its query. */
  readonly path: string;
  readonly body?: unknown;
};

export type AdminClient = {
  readonly edge: string;
  /**
   * The answer, parsed by `schema`.
   * @throws MaskrouteError the edge's own, `edge_unreachable` when nobody answers in time, `backend_error`
   * when what answers is no Maskroute edge.
   */
  request<T>(request: AdminRequest, schema: z.ZodType<T>): Promise<T>;
};

export function createAdminClient(edge: string, adminKey: string): AdminClient {
  const origin = edge.replace(/\/+$/, '');
  return {
    edge: origin,
    async request(request, schema) {
      const response = await send(`${origin}/admin/v1${request.path}`, request, adminKey);
      const answer = await response.json().catch(() => undefined);
      if (!response.ok) throw refusal(response.status, answer, origin);
      const parsed = schema.safeParse(answer);
      if (parsed.success) return parsed.data;
      throw new MaskrouteError('backend_error', `${origin} does not answer like a Maskroute edge.`, {
        cause: parsed.error,
      });
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

async function send(url: string, request: AdminRequest, adminKey: string): Promise<Response> {
  const headers: Record<string, string> = { authorization: `Bearer ${adminKey}` };
  if (request.body !== undefined) headers['content-type'] = 'application/json';
  try {
    return await fetch(url, {
      method: request.method,
      headers,
      body: request.body === undefined ? null : JSON.stringify(request.body),
      signal: AbortSignal.timeout(ANSWER_TIMEOUT_ms),
    });
  } catch (error) {
    const { origin } = new URL(url);
    throw new MaskrouteError('edge_unreachable', `No edge answers at ${origin}.`, { cause: error });
  }
}

function refusal(status: number, answer: unknown, origin: string): MaskrouteError {
  const parsed = wireErrorSchema.safeParse(answer);
  if (!parsed.success) {
    return new MaskrouteError(
      'backend_error',
      `${origin} answered ${status}, and not like a Maskroute edge.`,
    );
  }
  const { code, message, param } = parsed.data.error;
  return new MaskrouteError(code, message, { param: param ?? null });
}
