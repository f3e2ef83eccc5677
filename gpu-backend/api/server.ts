/** The app on a port: time limits for slow senders, and a stop that loses nothing. */
import { once } from 'node:events';
import type { Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { createAdaptorServer } from '@hono/node-server';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { createApp } from './api-app.ts';
import type { ApiParts } from './parts.ts';

/** A client gets so long to send its headers, and its whole request. */
const HEADERS_TIMEOUT_ms = 10_000;
const REQUEST_TIMEOUT_ms = 60_000;
/** Longer than common proxies keep idle connections, so that they close first. */
const KEEP_ALIVE_ms = 75_000;
/** How long the last bytes may take to reach their clients once every answer has ended. */
const FLUSH_ms = 2000;
const SWEEP_ms = 20;

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

/** `port` 0 picks a free one. Rejects when the port is taken. */
export async function startServer(
  parts: ApiParts,
  { port, hostname }: { readonly port: number; readonly hostname: string },
): Promise<RunningServer> {
  const server = createAdaptorServer({
    fetch: createApp(parts).fetch,
    overrideGlobalObjects: false,
    serverOptions: {
      headersTimeout: HEADERS_TIMEOUT_ms,
      requestTimeout: REQUEST_TIMEOUT_ms,
      keepAliveTimeout: KEEP_ALIVE_ms,
    },
  }) as Server;
  server.listen(port, hostname);
  await once(server, 'listening');
  const { port: bound } = server.address() as AddressInfo;
  let draining: Promise<void> | undefined;
  let closing: Promise<void> | undefined;
  let sweep: NodeJS.Timeout | undefined;
  const drain = () => {
    // Clients keep connections open; each goes once its last answer is out, so that they come back on new ones, which a
    // balancer leads to others.
    sweep ??= setInterval(() => server.closeIdleConnections(), SWEEP_ms);
    draining ??= parts.lifecycle.drain(parts.limits.drain_ms, parts.limits.ending_ms);
    return draining;
  };
  const stop = async () => {
    await drain();
    const closed = once(server, 'close');
    server.close();
    const flush = setTimeout(() => server.closeAllConnections(), FLUSH_ms);
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

/* Which completions are under way, so that a stop can wait for them, and after a while end them. */

export type Lifecycle = {
  readonly draining: boolean;
  readonly running: number;
  /** Aborts when the drain begins: what only waits for news has none to wait for. */
  readonly stopping: AbortSignal;
  /** Call the result once the answer has ended, however it did. */
  begin(abort: AbortController): () => void;
  /** Refuses new completions from now on; resolves when none runs, ending them after `limit_ms`, or `ending_ms` later. */
  drain(limit_ms: number, ending_ms: number): Promise<void>;
};

export function createLifecycle(): Lifecycle {
  const running = new Set<AbortController>();
  const idle: (() => void)[] = [];
  const stopping = new AbortController();
  let draining = false;
  return {
    get draining() {
      return draining;
    },
    get running() {
      return running.size;
    },
    stopping: stopping.signal,
    begin(abort) {
      running.add(abort);
      return () => {
        running.delete(abort);
        if (running.size === 0) for (const resolve of idle.splice(0)) resolve();
      };
    },
    async drain(limit_ms, ending_ms) {
      draining = true;
      stopping.abort();
      if (running.size === 0) return;
      const done = new Promise<void>((resolve) => idle.push(resolve));
      const shutDown = new MaskrouteError('not_ready', 'The server is shutting down.', { retryAfter_s: 5 });
      const end = setTimeout(() => {
        for (const abort of running) abort.abort(shutDown);
      }, limit_ms);
      const giveUp = setTimeout(() => {
        for (const resolve of idle.splice(0)) resolve();
      }, limit_ms + ending_ms);
      await done;
      clearTimeout(end);
      clearTimeout(giveUp);
    },
  };
}
