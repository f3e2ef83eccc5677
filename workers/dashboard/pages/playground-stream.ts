/**
 * The playground's requests to the edge, with a key of its own: a streamed completion, with its speed and routing
 * decision.
 */
import { EventSourceParserStream } from 'eventsource-parser/stream';
import { z } from 'zod';
import { createdKeySchema } from '../../../shared/admin/admin-wire.ts';
import { DENSE_SUFFIX, HEADERS, TRIAL_HEADERS } from '../../../shared/wire/protocol.ts';
import { ApiError, admin, edgeNow_ms, failure, reachEdge } from '../api.ts';

export type Prompt = {
  readonly model: string;
  /** Empty: none. */
  readonly system: string;
  readonly text: string;
  readonly tokensMax: number;
  readonly temperature: number;
  /** Version of the mask set to route by; undefined: the live set. */
  readonly version: string | undefined;
  /** One mask, in place of routing. */
  readonly mask: string | undefined;
};

export type Progress = {
  readonly text: string;
  readonly tokens: number;
  /** From sending to the first token; null before it. */
  readonly first_ms: number | null;
  /** From sending to the last token that came; null before the first. */
  readonly last_ms: number | null;
  /** The mask's id and sparsity as the response's headers say; null before they came. */
  readonly mask: { readonly id: string; readonly sparsity: number } | null;
  readonly isDone: boolean;
};

export const NO_PROGRESS: Progress = {
  text: '',
  tokens: 0,
  first_ms: null,
  last_ms: null,
  mask: null,
  isDone: false,
};

const chunkSchema = z.object({
  choices: z.array(z.object({ delta: z.object({ content: z.string().nullish() }).optional() })).optional(),
  usage: z.object({ completion_tokens: z.number() }).nullish(),
  error: z.object({ message: z.string(), code: z.string().nullish() }).optional(),
});

export const chatBody = (prompt: Prompt, kind: 'masked' | 'dense') => ({
  model: kind === 'dense' ? prompt.model + DENSE_SUFFIX : prompt.model,
  messages: [
    ...(prompt.system === '' ? [] : [{ role: 'system', content: prompt.system }]),
    { role: 'user', content: prompt.text },
  ],
  max_tokens: prompt.tokensMax,
  temperature: prompt.temperature,
  ...(kind === 'dense' || prompt.mask === undefined ? {} : { mask: prompt.mask }),
});

/** Headers that mark the request as a trial, outside experiments. */
const trialHeaders = ({ version }: Pick<Prompt, 'version'>): Record<string, string> => ({
  [TRIAL_HEADERS.source]: 'playground',
  ...(version === undefined ? {} : { [TRIAL_HEADERS.version]: version }),
});

/** The masked request as a curl command, without a key: the person inserts their own. */
export function curlOf(origin: string, prompt: Prompt): string {
  const quoted = (text: string) => `'${text.replaceAll("'", `'\\''`)}'`;
  const version = prompt.version === undefined ? [] : Object.entries(trialHeaders(prompt));
  const headers = [['authorization', 'Bearer YOUR_KEY'], ['content-type', 'application/json'], ...version];
  return [
    `curl ${origin}/v1/chat/completions`,
    ...headers.map(([name, value]) => `-H ${quoted(`${name}: ${value}`)}`),
    `-d ${quoted(JSON.stringify(chatBody(prompt, 'masked')))}`,
  ].join(' \\\n  ');
}

/**
 * Calls `onProgress` with every token.
 * @throws ApiError what the edge or, later, the backend answers; `network` when the answer breaks off.
 */
export async function streamChat(
  tenant: string,
  prompt: Prompt,
  kind: 'masked' | 'dense',
  onProgress: (progress: Progress) => void,
  signal: AbortSignal,
): Promise<void> {
  const started_ms = performance.now();
  const body = { ...chatBody(prompt, kind), stream: true, stream_options: { include_usage: true } };
  const response = await askEdge(tenant, '/v1/chat/completions', { body, prompt, signal });
  const id = response.headers.get(HEADERS.mask);
  const mask = id === null ? null : { id, sparsity: Number(response.headers.get(HEADERS.sparsity) ?? 0) };
  let progress: Progress = { ...NO_PROGRESS, mask };
  onProgress(progress);
  const events = response
    .body!.pipeThrough(new TextDecoderStream())
    .pipeThrough(new EventSourceParserStream());
  for await (const { data } of readAll(events)) {
    if (data === '[DONE]') return onProgress({ ...progress, isDone: true });
    const chunk = chunkSchema.parse(JSON.parse(data));
    if (chunk.error !== undefined) throw new ApiError(502, chunk.error.code ?? 'error', chunk.error.message);
    progress = advance(progress, chunk, performance.now() - started_ms);
    onProgress(progress);
  }
  throw brokeOff();
}

const brokeOff = () => new ApiError(0, 'network', 'The answer broke off before its end.');

/** A chunk may have several tokens (which together make one character); the last chunk has the total. */
function advance(before: Progress, chunk: z.infer<typeof chunkSchema>, now_ms: number): Progress {
  const content = chunk.choices?.[0]?.delta?.content ?? '';
  const tokens = chunk.usage?.completion_tokens ?? before.tokens + (content === '' ? 0 : 1);
  if (content === '') return { ...before, tokens };
  const first_ms = before.first_ms ?? now_ms;
  return { ...before, text: before.text + content, tokens, first_ms, last_ms: now_ms };
}

/** Mean time per token between the first and the last; null with fewer than two. */
export const perToken_ms = ({ tokens, first_ms, last_ms }: Progress): number | null =>
  first_ms === null || last_ms === null || tokens < 2 ? null : (last_ms - first_ms) / (tokens - 1);

type Question = { readonly body?: object; readonly prompt?: Prompt; readonly signal: AbortSignal };

/**
 * A request to the clients' API, as the tenant; with a body it is a POST. A revoked key is replaced.
 * @throws ApiError what the edge answers, or `network`.
 */
export async function askEdge(tenant: string, path: string, question: Question): Promise<Response> {
  const key = await playgroundKey(tenant);
  let response = await askWith(key, path, question);
  if (response.status === 401) {
    if (held.get(tenant)?.key === key) held.delete(tenant);
    response = await askWith(await playgroundKey(tenant), path, question);
  }
  if (!response.ok) throw await failure(response);
  return response;
}

const askWith = (key: string, path: string, { body, prompt, signal }: Question): Promise<Response> =>
  reachEdge(path, {
    headers: {
      authorization: `Bearer ${key}`,
      'content-type': 'application/json',
      ...(prompt === undefined ? {} : trialHeaders(prompt)),
    },
    ...(body === undefined ? {} : { method: 'POST', body: JSON.stringify(body) }),
    signal,
  });

/** Not every browser supports iterating streams. */
async function* readAll<T>(stream: ReadableStream<T>): AsyncGenerator<T> {
  const reader = stream.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read().catch(() => {
        throw brokeOff();
      });
      if (done) return;
      yield value;
    }
  } finally {
    await reader.cancel().catch(() => undefined);
  }
}

/*
 * The playground's key: an ordinary tenant key, so that the tenant's budgets and routing apply. It is created on first
 * use, expires after an hour, and is kept only in this page's memory until logout.
 */

const LIFETIME_ms = 3_600_000;
/** A key about to expire is not used for a long answer. */
const SPARE_ms = 300_000;

let held = new Map<string, { readonly key: string; readonly expiresAt_ms: number }>();

export function forgetPlaygroundKeys(): void {
  held = new Map();
}

/** @throws ApiError when the edge makes none. */
async function playgroundKey(tenant: string): Promise<string> {
  // If the person logs out meanwhile, the key must not be kept.
  const keys = held;
  const known = keys.get(tenant);
  if (known !== undefined && known.expiresAt_ms - edgeNow_ms() > SPARE_ms) return known.key;
  const expiresAt_ms = edgeNow_ms() + LIFETIME_ms;
  const body = {
    kind: 'tenant',
    tenant,
    name: 'Playground',
    expires_at: new Date(expiresAt_ms).toISOString(),
  };
  const { key } = await admin(createdKeySchema, '/keys', { method: 'POST', body });
  keys.set(tenant, { key, expiresAt_ms });
  return key;
}
