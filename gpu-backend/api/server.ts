/** Serves the app on a port, with time limits for slow senders and a graceful shutdown. */
import { once } from 'node:events';
import {
  createServer,
  type IncomingMessage,
  maxHeaderSize,
  type Server,
  type ServerResponse,
  STATUS_CODES,
} from 'node:http';
import type { AddressInfo, Socket } from 'node:net';
import { getRequestListener, RequestError } from '@hono/node-server';
import { MaskrouteError, toMaskrouteError } from '../../shared/wire/errors.ts';
import type { Turn } from '../event-loop.ts';
import { createApp, noteError } from './api-app.ts';
import { type ApiOptions, type ApiParts, openParts } from './parts.ts';

/** Longest time for a request's headers. */
const HEADERS_TIMEOUT_ms = 10_000;
/**
 * Longest time for a whole request: enough for the largest upload at 0.6 Mbit/s. JSON bodies have a shorter limit
 * (`body.ts`), and a stalled upload is aborted (`jobs/job-store.ts`).
 */
const REQUEST_TIMEOUT_ms = 3_600_000;
/** Longer than common proxies keep idle connections, so that they close first. */
const KEEP_ALIVE_ms = 75_000;
const SWEEP_ms = 500;

export type RunningServer = {
  readonly url: string;
  /**
   * `/readyz` returns 503, new requests are refused and connections are not kept alive; `GET /v1/answers/{id}` still works.
   * Resolves as {@link Lifecycle.drain}.
   */
  drain(): Promise<void>;
  /** Drains, then closes the port. */
  close(): Promise<void>;
};

type Fetch = ReturnType<typeof createApp>['fetch'];

/**
 * Handles one request in each turn of the event loop, in order of arrival. One poll of the sockets may bring a hundred
 * requests, which would delay the tokens of every answer if they were handled in one turn.
 */
export function oneATurn(fetch: Fetch, turn: Turn): Fetch {
  return async (...request) => {
    await turn();
    return fetch(...request);
  };
}

/** The same for new connections: in its own turn each gets its parser and is read from then on. */
export function connectOneATurn(server: Server, turn: Turn): void {
  const [listen] = server.listeners('connection') as [(socket: Socket) => void];
  server.off('connection', listen);
  // An option of `net.createServer` that `http.createServer` does not pass on.
  Object.assign(server, { pauseOnConnect: true });
  server.on('connection', async (socket: Socket) => {
    await turn();
    listen.call(server, socket);
    socket.resume();
  });
}

/** Ends the connection after a GET or HEAD with a body, which nobody reads. For other methods the adaptor does this. */
function keepNoUnreadBody({ method, headers }: IncomingMessage, response: ServerResponse): void {
  const hasBody = 'content-length' in headers || 'transfer-encoding' in headers;
  if (hasBody && (method === 'GET' || method === 'HEAD')) response.shouldKeepAlive = false;
}

/** What a client expects beyond `100-continue` may be ignored (RFC 9110, 10.1.1); Node sends 417 without a body. */
const ignoreExpectation = (server: Server): unknown =>
  server.on('checkExpectation', (request, response) => server.emit('request', request, response));

/** In HTTP/1.0 a request need not name a host; a load balancer's probe does not. */
function nameHost({ httpVersion, headers }: IncomingMessage): void {
  if (httpVersion === '1.0') headers.host ??= 'localhost';
}

/** What never reaches the app is refused in the same form: Node and the adaptor would send a status without a body. */
function refuseMalformed(server: Server, parts: ApiParts): void {
  /** The unfinished answers of each connection. Once an answer has begun, an error cannot be written any more. */
  const unfinished = new WeakMap<Socket, Set<ServerResponse>>();
  server.prependListener('request', ({ socket }: IncomingMessage, response: ServerResponse) => {
    const answers = unfinished.get(socket) ?? new Set();
    unfinished.set(socket, answers.add(response));
    response.once('close', () => answers.delete(response));
  });
  server.on('clientError', (thrown: MalformedError, socket: Socket) => {
    const answers = [...(unfinished.get(socket) ?? [])];
    if (socket.writable && !answers.some(({ headersSent }) => headersSent)) {
      const error = malformed(thrown);
      // A request whose body was being read is counted by the app: its client is gone, or it took too long.
      const unread = answers.map(({ req }) => req).filter(({ complete }) => !complete);
      if (unread.length === 0) note(parts, error);
      socket.write(rawAnswer(error), () => {
        if (error.code === 'request_timeout') for (const request of unread) request.destroy(error);
      });
    }
    socket.destroySoon();
  });
}

/** `reason`: what the parser does not accept. */
type MalformedError = NodeJS.ErrnoException & { readonly reason?: string };

function malformed({ code, reason }: MalformedError): MaskrouteError {
  switch (code) {
    case 'HPE_HEADER_OVERFLOW':
      return new MaskrouteError(
        'headers_too_large',
        `The request's headers are over the limit of ${maxHeaderSize} bytes.`,
      );
    case 'ERR_HTTP_REQUEST_TIMEOUT':
      return new MaskrouteError('request_timeout', 'The request was not complete in time.');
    case 'HPE_INVALID_EOF_STATE':
      return notHttp('it ended early');
    default:
      return notHttp(reason ?? 'it cannot be read');
  }
}

const notHttp = (reason: string): MaskrouteError =>
  new MaskrouteError('invalid_request', `This is no valid HTTP request: ${reason}.`);

/** The log has no request by which to find the reason, so it has the message. */
const note = (parts: ApiParts, error: MaskrouteError): void =>
  noteError(parts, error, { endpoint: 'other', message: error.message });

function rawAnswer(error: MaskrouteError): string {
  const body = JSON.stringify(error.toWire());
  return [
    `HTTP/1.1 ${error.status} ${STATUS_CODES[error.status]}`,
    'content-type: application/json',
    `content-length: ${Buffer.byteLength(body)}`,
    'connection: close',
    '',
    body,
  ].join('\r\n');
}

/** `port` 0 picks a free one. Rejects when the port is taken or the backend key is empty. */
export async function startServer(
  options: ApiOptions,
  { port, hostname }: { readonly port: number; readonly hostname: string },
): Promise<RunningServer> {
  const parts = openParts(options);
  const listener = getRequestListener(oneATurn(createApp(parts).fetch, parts.turn), {
    overrideGlobalObjects: false,
    errorHandler: (thrown) => {
      const error = thrown instanceof RequestError ? notHttp(thrown.message) : toMaskrouteError(thrown);
      note(parts, error);
      return Response.json(error.toWire(), { status: error.status });
    },
  });
  const server = createServer(
    {
      headersTimeout: HEADERS_TIMEOUT_ms,
      requestTimeout: REQUEST_TIMEOUT_ms,
      keepAliveTimeout: KEEP_ALIVE_ms,
      // The listener refuses requests without a host, and says why.
      requireHostHeader: false,
    },
    listener,
  );
  connectOneATurn(server, parts.turn);
  refuseMalformed(server, parts);
  ignoreExpectation(server);
  server.prependListener('request', nameHost);
  server.prependListener('request', keepNoUnreadBody);
  server.listen(port, hostname);
  await once(server, 'listening');
  const { port: bound } = server.address() as AddressInfo;
  const url = `http://${hostname.includes(':') ? `[${hostname}]` : hostname}:${bound}`;
  return { url, ...endOf(server, parts) };
}

/** How a server ends: both may be called again. */
function endOf(server: Server, parts: ApiParts): Pick<RunningServer, 'drain' | 'close'> {
  let draining: Promise<void> | undefined;
  let closing: Promise<void> | undefined;
  let sweep: NodeJS.Timeout | undefined;
  const drain = () => {
    // Idle connections are closed, so that clients reconnect and a load balancer routes them to other backends.
    // `setImmediate` comes after the sockets are read: a connection with a new request is then not idle.
    sweep ??= setInterval(() => setImmediate(() => server.closeIdleConnections()), SWEEP_ms);
    draining ??= parts.lifecycle.drain(parts.limits);
    return draining;
  };
  const stop = async () => {
    await drain();
    const closed = once(server, 'close');
    server.close();
    const flush = setTimeout(() => server.closeAllConnections(), parts.limits.flush_ms);
    await closed;
    clearInterval(sweep);
    clearTimeout(flush);
  };
  return {
    drain,
    close: () => {
      closing ??= stop();
      return closing;
    },
  };
}
