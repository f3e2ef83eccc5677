/**
 * The clients of `npm run load` and `npm run soak`: autocannon's clients, of several tenants. Half of the requests stream, a
 * share of the clients hangs up at a random moment, and each client sends its next request at once, up to a rate. The
 * outcome of every request, as its client saw it, is kept.
 */
import autocannon from 'autocannon';
import type { AdminClient } from '../../gpu-backend/publication/admin-client.ts';
import type { Random } from '../../gpu-backend/random.ts';
import { createdKeySchema, tenantSchema } from '../../shared/admin/admin-wire.ts';
import { HEADERS } from '../../shared/wire/protocol.ts';

/** Error codes of a product under full load, which are no failures. */
export const REFUSALS: readonly string[] = [
  'queue_full',
  'queue_timeout',
  'rate_limit_exceeded',
  'budget_exceeded',
];

/** Creates a tenant, and returns a key of it. `terms`: its limits. */
export async function createTenant(admin: AdminClient, id: string, terms: object): Promise<string> {
  await admin.request({ method: 'POST', path: '/tenants', body: { id, name: id, ...terms } }, tenantSchema);
  const body = { tenant: id, name: id };
  const { key } = await admin.request({ method: 'POST', path: '/keys', body }, createdKeySchema);
  return key;
}

/** The routing that an answer reports; `none` when it was not routed. */
export type Routed = {
  readonly version: string;
  readonly maskSet: string;
  readonly cluster: string;
  readonly mask: string;
};

export type Result =
  | {
      /** A complete answer. */
      readonly kind: 'answer';
      readonly requestId: string;
      readonly prompt_tokens: number;
      readonly completion_tokens: number;
      /** The routing in the headers, and in the body. */
      readonly said: readonly [Routed, Routed];
    }
  | { readonly kind: 'error'; readonly code: string; readonly requestId: string }
  | { readonly kind: 'hang-up' };

export type Outcome = {
  readonly tenant: string;
  readonly isStream: boolean;
  readonly sentAt_ms: number;
  /** When a stream's first event came; undefined when none came. */
  readonly firstAt_ms: number | undefined;
  readonly endedAt_ms: number;
  readonly result: Result;
};

type Traffic = {
  readonly edge: string;
  readonly model: string;
  readonly tenants: readonly { readonly id: string; readonly key: string }[];
  readonly clients: number;
  readonly seconds: number;
  /** Most requests of a client a second. Without pauses, most answers would be refusals. */
  readonly rate: number;
  /** The share of requests whose client hangs up. */
  readonly hangUps: number;
  readonly random: Random;
  /** Stops the traffic early. */
  readonly signal: AbortSignal;
};

const HANG_UP_WITHIN_ms = 4000;
const ANSWER_WITHIN_s = 120;

/** Resolves when the time is over, or a second after `signal` aborts. Running requests are then cut off. */
export async function sendTraffic(traffic: Traffic): Promise<{ sent: number; outcomes: Outcome[] }> {
  const outcomes: Outcome[] = [];
  let sent = 0;
  const keep = (request: Sent, result: Result) => {
    const { sentAt_ms = Date.now(), firstAt_ms, tenant = '', isStream = false } = request;
    outcomes.push({ tenant, isStream, sentAt_ms, firstAt_ms, endedAt_ms: Date.now(), result });
  };
  const watch = (client: Client) => {
    client.on('request', () => sent++);
    client.on('body', (bytes: Buffer) => {
      // Comments, which keep a silent stream open, do not count.
      if (bytes.includes('data: ')) client.requestIterator.context.firstAt_ms ??= Date.now();
    });
    client.on('timeout', () =>
      keep(client.requestIterator.context, { kind: 'error', code: 'timeout', requestId: '' }),
    );
    client.on('connError', (error: NodeJS.ErrnoException) => {
      const code = error.code ?? error.message;
      keep(client.requestIterator.context, { kind: 'error', code, requestId: '' });
    });
    hangUpSometimes(client, traffic, keep);
  };
  traffic.signal.throwIfAborted();
  // autocannon's types lack `stop` and the fields of clients.
  const clients = autocannon({
    url: traffic.edge,
    connections: traffic.clients,
    connectionRate: traffic.rate,
    duration: traffic.seconds,
    timeout: ANSWER_WITHIN_s,
    setupClient: (client) => watch(client as unknown as Client),
    requests: [
      {
        method: 'POST',
        setupRequest: (request, context) => ({ ...request, ...nextRequest(traffic, context as Sent) }),
        onResponse: (status, text, context, headers) =>
          keep(context as Sent, readAnswer(status, text, headers ?? {})),
      },
    ],
  }) as Promise<unknown> & { stop(): void };
  const stop = () => clients.stop();
  traffic.signal.addEventListener('abort', stop);
  await clients;
  traffic.signal.removeEventListener('abort', stop);
  return { sent, outcomes };
}

/** A request's context in autocannon. */
type Sent = { tenant?: string; isStream?: boolean; sentAt_ms?: number; firstAt_ms?: number };

/** A client of autocannon with internal fields, which are needed to hang up and reconnect. */
type Client = NodeJS.EventEmitter & {
  readonly parser: { readonly type: string; reinitialize(type: string): void };
  readonly requestIterator: { readonly context: Sent };
  _resetConnection(): void;
};

function hangUpSometimes(
  client: Client,
  { random, hangUps }: Traffic,
  keep: (request: Sent, result: Result) => void,
): void {
  let timer: NodeJS.Timeout | undefined;
  client.on('request', () => {
    clearTimeout(timer);
    if (random.next() >= hangUps) return;
    timer = setTimeout(() => {
      keep(client.requestIterator.context, { kind: 'hang-up' });
      // Resets the parser, which would otherwise continue with the old answer.
      client.parser.reinitialize(client.parser.type);
      client._resetConnection();
    }, random.next() * HANG_UP_WITHIN_ms);
  });
  client.on('response', () => clearTimeout(timer));
  client.on('done', () => clearTimeout(timer));
}

/* Requests. */

const TASKS = [
  'Name three rivers of Europe.',
  'Write a haiku about rain.',
  'How many days are in seven weeks?',
  'Say in one sentence why the sky is blue.',
  'List some words that rhyme with cold.',
];

function nextRequest({ random, tenants, model }: Traffic, sent: Sent) {
  const { id, key } = tenants[random.below(tenants.length)]!;
  const content = `${TASKS[random.below(TASKS.length)]} (${random.below(1000)})`;
  const isStream = random.next() < 0.5;
  const body = {
    model,
    messages: [{ role: 'user', content: content.repeat(1 + random.below(8)) }],
    max_tokens: 4 + random.below(28),
    stream: isStream,
  };
  Object.assign(sent, { tenant: id, isStream, sentAt_ms: Date.now() });
  return {
    path: '/v1/chat/completions',
    headers: { authorization: `Bearer ${key}`, 'content-type': 'application/json' },
    body: JSON.stringify(body),
  };
}

/* Answers. */

/** Headers by names in the server's spelling. */
type RawHeaders = Readonly<Record<string, unknown>>;

export function readAnswer(status: number, text: string, rawHeaders: RawHeaders): Result {
  const headers = new Map(Object.entries(rawHeaders).map(([name, value]) => [name.toLowerCase(), value]));
  const header = (name: string): string => String(headers.get(name) ?? 'none');
  const requestId = header(HEADERS.requestId);
  const code = /"code":\s*"([a-z_]+)"/.exec(text)?.[1];
  const error = (name: string): Result => ({ kind: 'error', code: name, requestId });
  if (status !== 200) return error(code ?? `status_${status}`);
  const isStream = !text.startsWith('{');
  if (isStream && text.includes('event: error')) return error(code ?? 'error_event');
  if (isStream && !text.includes('data: [DONE]')) return error('stream_without_end');
  const said = saidIn(text, isStream);
  if (said === undefined) return error('answer_without_figures');
  const inHeaders = {
    version: header(HEADERS.version),
    maskSet: header(HEADERS.maskSet),
    cluster: header(HEADERS.cluster),
    mask: header(HEADERS.mask),
  };
  const inBody = {
    version: String(said.version ?? 'none'),
    maskSet: String(said.mask_set ?? 'none'),
    cluster: String(said.cluster ?? 'none'),
    mask: said.mask,
  };
  const { prompt_tokens, completion_tokens } = said;
  return { kind: 'answer', requestId, prompt_tokens, completion_tokens, said: [inHeaders, inBody] };
}

type Said = {
  readonly version?: string | null;
  readonly mask_set?: string | null;
  readonly cluster?: number | null;
  readonly mask: string;
  readonly prompt_tokens: number;
  readonly completion_tokens: number;
};

/** The field `maskroute` of an answer, or of a stream's last chunk. */
function saidIn(text: string, isStream: boolean): Said | undefined {
  const json = isStream
    ? text
        .split('\n')
        .findLast((line) => line.startsWith('data: {'))
        ?.slice(6)
    : text;
  try {
    return (JSON.parse(json ?? '') as { maskroute?: Said }).maskroute;
  } catch {
    return undefined;
  }
}
