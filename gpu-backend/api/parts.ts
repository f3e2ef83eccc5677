/**
 * What routes work with: the parts that `main.ts` wires together, what the API itself remembers, and every bound and
 * wait of it. Tests shorten the waits and bring an engine of their own.
 */
import type { HttpBindings } from '@hono/node-server';
import type { Tracer } from '@opentelemetry/api';
import type { Context } from 'hono';
import { LRUCache } from 'lru-cache';
import type { Logger } from 'pino';
import { HOT_MASKS_MAX } from '../../shared/wire/backend-load.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { BODY_BYTES_MAX } from '../../shared/wire/openai.ts';
import { type AnswerUsage, UNREAD_MAX_ms } from '../../shared/wire/protocol.ts';
import type { EncoderService } from '../encoder/encoder-service.ts';
import type { Engine } from '../engine/engine.ts';
import type { MaskRegistry } from '../engine/mask-registry.ts';
import type { Grammars } from '../grammar/grammars.ts';
import type { Jobs } from '../jobs/job-queue.ts';
import type { Schedules } from '../jobs/schedules.ts';
import type { TextService } from '../model/tokenizer/text-service.ts';
import { type Authenticate, type Caller, createAuthenticator, createScraperCheck } from './auth.ts';
import { type ArrivalLimits, Bodies } from './body.ts';
import { createMetrics, FailedRequests, type Metrics } from './metrics.ts';

/** What the API is given. */
export type ApiOptions = {
  readonly model: ServedModel;
  readonly masks: MaskRegistry;
  readonly encoders: EncoderService;
  /** Undefined: this backend runs none. */
  readonly jobs: Jobs | undefined;
  /** Of its jobs. */
  readonly schedules?: Schedules | undefined;
  readonly keys: ApiKeys;
  /** Undefined: nothing is traced. */
  readonly tracer: Tracer | undefined;
  readonly limits: ApiLimits;
  readonly log: Logger;
};

export type ServedModel = {
  readonly name: string;
  /** Unix time, seconds. */
  readonly created_s: number;
  readonly engine: Engine;
  readonly text: TokenText;
  readonly grammars: Grammars;
  /** Ids that end an answer unless `ignore_eos`. */
  readonly endTokenIds: readonly number[];
};

/** The way between text and token ids. */
export type TokenText = Omit<TextService, 'close' | 'table'>;

type ApiKeys = {
  readonly backendKey: string;
  /** Taken besides the backend key while that is rotated. */
  readonly otherBackendKey?: string | undefined;
  /** For whoever collects `/metrics`, and for nothing else; without it only the backend key reads them. */
  readonly metricsKey: string | undefined;
  /** As `createAuthenticator` has it. */
  readonly audience: string | Promise<string> | undefined;
};

/** What routes are given. */
export type ApiParts = Omit<ApiOptions, 'keys'> & {
  readonly authenticate: Authenticate;
  /** @throws MaskrouteError `invalid_api_key`. */
  readonly expectScraper: (authorization: string | undefined) => void;
  readonly metrics: Metrics;
  readonly bodies: Bodies;
  readonly lifecycle: Lifecycle;
  /**
   * What recent answers cost, for callers that did not hear the end of theirs: an edge whose client hung up still has to
   * account for the tokens. Memory only: an answer that is asked for late is not there.
   */
  readonly recentAnswers: LRUCache<string, AnswerUsage & { readonly finished: boolean }>;
  readonly failedRequests: FailedRequests;
  /** The masks of recent requests: their next requests should come here. The latest comes first. */
  readonly recentMasks: LRUCache<string, true>;
};

const RECENT_ANSWERS_MAX = 5_000;

/** @throws Error when the backend key is empty. */
export async function openParts({ keys, ...given }: ApiOptions): Promise<ApiParts> {
  const { model, limits } = given;
  const lifecycle = new Lifecycle();
  return {
    ...given,
    authenticate: await createAuthenticator(keys.backendKey, keys),
    expectScraper: createScraperCheck(keys.backendKey, keys.otherBackendKey, keys.metricsKey),
    metrics: createMetrics(model.engine, model.name),
    bodies: new Bodies(limits, lifecycle.stopping),
    lifecycle,
    recentAnswers: new LRUCache({ max: RECENT_ANSWERS_MAX }),
    failedRequests: new FailedRequests(),
    recentMasks: new LRUCache({ max: HOT_MASKS_MAX }),
  };
}

/** Which completions are under way, so that a stop can wait for them, and after a while end them. */
export class Lifecycle {
  /** With the tenant of each. */
  readonly #running = new Map<AbortController, string>();
  readonly #stop = new AbortController();
  readonly #idle = Promise.withResolvers<void>();

  /** Aborts when the drain begins, with the error for all that comes too late. */
  get stopping(): AbortSignal {
    return this.#stop.signal;
  }

  get draining(): boolean {
    return this.#stop.signal.aborted;
  }

  get running(): number {
    return this.#running.size;
  }

  runningOf(tenant: string): number {
    return [...this.#running.values()].filter((one) => one === tenant).length;
  }

  /** Call the result once the answer has ended, however it did. */
  begin(abort: AbortController, tenant: string): () => void {
    this.#running.set(abort, tenant);
    return () => {
      this.#running.delete(abort);
      if (this.draining && this.#running.size === 0) this.#idle.resolve();
    };
  }

  /** Refuses new completions from now on; resolves when none runs, ending them after `limit_ms`, or `ending_ms` later. */
  async drain(limit_ms: number, ending_ms: number): Promise<void> {
    const shutDown = new MaskrouteError('not_ready', 'The server is shutting down.', { retryAfter_s: 5 });
    this.#stop.abort(shutDown);
    if (this.#running.size === 0) return;
    const end = setTimeout(() => {
      for (const abort of this.#running.keys()) abort.abort(shutDown);
    }, limit_ms);
    const giveUp = setTimeout(this.#idle.resolve, limit_ms + ending_ms);
    await this.#idle.promise;
    clearTimeout(end);
    clearTimeout(giveUp);
  }
}

export type ApiEnv = {
  /** Empty when the app is called without a server. */
  readonly Bindings: Partial<HttpBindings>;
  Variables: { requestId: string; caller: Caller };
};

export type ApiContext = Context<ApiEnv>;

/** They stay when the request fails later. */
export function setHeaders(c: ApiContext, headers: Record<string, string>): void {
  for (const [name, value] of Object.entries(headers)) c.header(name, value);
}

export type ApiLimits = ArrivalLimits & {
  /** Completions that are under way, once their bodies are whole: more than the engine's line holds, yet bounded. */
  readonly inFlightMax: number;
  /** Prompts times `n` in one request. */
  readonly choicesMax: number;
  /** Choices of one request that are in the engine at a time, so that one request cannot fill the line. */
  readonly choicesAtOnce: number;
  /** How long a streaming answer waits for its first event before it commits to status 200. */
  readonly commit_ms: number;
  /** A comment goes out when a stream has been silent for so long. */
  readonly keepalive_ms: number;
  /** A client that takes nothing for so long is gone. */
  readonly stall_ms: number;
  /** How long a choice of an admitted request keeps asking for a place in a full line. */
  readonly readmit_ms: number;
  /** An engine that gives no sign of life for so long is stuck. Longer than a step of a large model on a slow machine. */
  readonly engineSilence_ms: number;
  /** How long running requests may take to finish after a signal to stop. */
  readonly drain_ms: number;
  /** How long requests that the stop has ended may take to let go before it goes on without them. */
  readonly ending_ms: number;
  /** How long the last bytes may take to reach their clients once every answer has ended. */
  readonly flush_ms: number;
};

export const DEFAULT_LIMITS: ApiLimits = {
  bodyBytesMax: BODY_BYTES_MAX,
  bodiesArrivingMax: 256,
  bytesArrivingMax: 64 * 1024 * 1024,
  bodyArrival_ms: 30_000,
  inFlightMax: 256,
  choicesMax: 256,
  choicesAtOnce: 8,
  commit_ms: 2000,
  keepalive_ms: 5000,
  stall_ms: UNREAD_MAX_ms,
  readmit_ms: 30_000,
  engineSilence_ms: 120_000,
  drain_ms: 30_000,
  ending_ms: 3000,
  flush_ms: 2000,
};
