/** The app on a port: time limits for slow senders, and a stop that loses nothing. */
import { once } from 'node:events';
import type { IncomingMessage, Server, ServerResponse } from 'node:http';
import type { AddressInfo, Socket } from 'node:net';
import { setImmediate as nextTurn } from 'node:timers/promises';
import { createAdaptorServer } from '@hono/node-server';
import { createApp } from './api-app.ts';
import { type ApiOptions, openParts } from './parts.ts';

/** A client gets so long to send its headers. */
const HEADERS_TIMEOUT_ms = 10_000;
/**
 * And so long for its whole request: enough for the largest upload at 0.6 Mbit/s. Bodies of JSON have a time of their own
 * (`body.ts`), an upload that stands still is given up (`jobs/job-store.ts`), and no connection waits for a body that nobody reads.
 */
const REQUEST_TIMEOUT_ms = 3_600_000;
/** Longer than common proxies keep idle connections, so that they close first. */
const KEEP_ALIVE_ms = 75_000;
const SWEEP_ms = 500;

export type RunningServer = {
  readonly url: string;
  /**
   * Readiness turns to 503, new completions are refused and connections are not kept; resolves when what ran has
   * finished (bounded by `drain_ms`). What answers cost can still be asked.
   */
  drain(): Promise<void>;
  /** Drains; then the port closes. */
  close(): Promise<void>;
};

type Fetch = ReturnType<typeof createApp>['fetch'];

/** Who asks next gets a turn of the event loop of its own, behind all who asked before. */
function lineOfTurns(): () => Promise<void> {
  let last: Promise<void> = Promise.resolve();
  return () => {
    last = last.then(() => nextTurn());
    return last;
  };
}

/**
 * One poll of the sockets may bring a hundred requests. All of them at once would hold up the tokens of every answer, so each gets
 * a turn of the event loop, in the order in which they came.
 */
export function oneATurn(fetch: Fetch): Fetch {
  const turn = lineOfTurns();
  return async (...request) => {
    await turn();
    return fetch(...request);
  };
}

/** The same for new connections: the first request of each is not read before its turn. */
export function readOneATurn(server: Server): void {
  const turn = lineOfTurns();
  // As `net.createServer` takes it, which `http.createServer` does not pass on.
  Object.assign(server, { pauseOnConnect: true });
  server.on('connection', async (socket: Socket) => {
    await turn();
    socket.resume();
  });
}

/** The adaptor hangs up on unread bodies of all other methods. A connection that is not kept ends with its answer. */
function keepNoUnreadBody({ method, headers }: IncomingMessage, response: ServerResponse): void {
  const hasBody = 'content-length' in headers || 'transfer-encoding' in headers;
  if (hasBody && (method === 'GET' || method === 'HEAD')) response.shouldKeepAlive = false;
}

/** `port` 0 picks a free one. Rejects when the port is taken or the backend key is empty. */
export async function startServer(
  options: ApiOptions,
  { port, hostname }: { readonly port: number; readonly hostname: string },
): Promise<RunningServer> {
  const parts = await openParts(options);
  const server = createAdaptorServer({
    fetch: oneATurn(createApp(parts).fetch),
    overrideGlobalObjects: false,
    serverOptions: {
      headersTimeout: HEADERS_TIMEOUT_ms,
      requestTimeout: REQUEST_TIMEOUT_ms,
      keepAliveTimeout: KEEP_ALIVE_ms,
    },
  }) as Server;
  readOneATurn(server);
  server.prependListener('request', keepNoUnreadBody);
  server.listen(port, hostname);
  await once(server, 'listening');
  const { port: bound } = server.address() as AddressInfo;
  let draining: Promise<void> | undefined;
  let closing: Promise<void> | undefined;
  let sweep: NodeJS.Timeout | undefined;
  const drain = () => {
    // Clients keep connections open; each goes once its last answer is out, so that they come back on new ones, which a
    // balancer leads to others.
    // After the sockets were read: a connection whose next request is there already is not idle.
    sweep ??= setInterval(() => setImmediate(() => server.closeIdleConnections()), SWEEP_ms);
    draining ??= parts.lifecycle.drain(parts.limits.drain_ms, parts.limits.ending_ms);
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
    url: `http://${hostname.includes(':') ? `[${hostname}]` : hostname}:${bound}`,
    drain,
    close: () => {
      closing ??= stop();
      return closing;
    },
  };
}
