/**
 * What routes use: the parts that `main.ts` wires together, the API's own state, and all its limits and timeouts. Tests
 * shorten the timeouts and use an engine of their own.
 */
import { createHash } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';
import type { HttpBindings } from '@hono/node-server';
import type { Tracer } from '@opentelemetry/api';
import type { Context } from 'hono';
import { LRUCache } from 'lru-cache';
import type { Logger } from 'pino';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { BODY_BYTES_MAX } from '../../shared/wire/openai.ts';
import { type AnswerUsage, UNREAD_MAX_ms } from '../../shared/wire/protocol.ts';
import type { EncoderService } from '../encoder/encoder-service.ts';
import type { Engine } from '../engine/engine.ts';
import type { MaskRegistry } from '../engine/mask-registry.ts';
import { type Turn, turnQueue } from '../event-loop.ts';
import type { Grammars } from '../grammar/grammars.ts';
import type { HomeJobs } from '../jobs/home-jobs.ts';
import type { TextService } from '../model/tokenizer/text-service.ts';
import {
  type Authenticate,
  type Caller,
  createAuthenticator,
  createScraperCheck,
  type TokenRules,
} from './auth.ts';
import { type ArrivalLimits, Bodies } from './body.ts';
import { createMetrics, type Metrics } from './metrics.ts';

/** Everything that the API needs to start. */
export type ApiOptions = {
  readonly model: ServedModel;
  readonly masks: MaskRegistry;
  readonly encoders: EncoderService;
  /** The jobs and schedules of the home; undefined while this backend does not run them. */
  readonly jobs: () => HomeJobs['held'];
  readonly keys: ApiKeys;
  /** Undefined: tracing is off. */
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

/** Encodes text to token ids and decodes it again. */
export type TokenText = Omit<TextService, 'close' | 'table'>;

type ApiKeys = TokenRules & {
  readonly backendKey: string;
  /** A key that reads `/metrics` and nothing else; without, only the backend key reads them. */
  readonly metricsKey: string | undefined;
};

/** Everything that routes need. */
export type ApiParts = Omit<ApiOptions, 'keys'> & {
  readonly authenticate: Authenticate;
  /** @throws MaskrouteError `invalid_api_key`. */
  readonly expectScraper: (authorization: string | undefined) => void;
  readonly metrics: Metrics;
  readonly bodies: Bodies;
  /** One for all requests: a turn of the event loop does one piece of work for one of them. */
  readonly turn: Turn;
  readonly lifecycle: Lifecycle;
  /**
   * Token counts of recent answers, by id. An edge whose client hung up does not see the end of the answer, but still has
   * to account for its tokens. In memory only, so the oldest are dropped.
   */
  readonly recentAnswers: LRUCache<string, AnswerUsage & { readonly finished: boolean }>;
  readonly failedRequests: FailedRequests;
};

const RECENT_ANSWERS_MAX = 5_000;

/** @throws Error when the backend key is empty. */
export function openParts({ keys, ...given }: ApiOptions): ApiParts {
  const { model, limits } = given;
  const lifecycle = new Lifecycle();
  const turn = turnQueue();
  return {
    ...given,
    authenticate: createAuthenticator(keys.backendKey, keys),
    expectScraper: createScraperCheck(keys.backendKey, keys.otherBackendKey, keys.metricsKey),
    metrics: createMetrics(model.engine, model.name),
    bodies: new Bodies(limits, lifecycle.stopping, turn),
    turn,
    lifecycle,
    recentAnswers: new LRUCache({ max: RECENT_ANSWERS_MAX }),
    failedRequests: new FailedRequests(),
  };
}

type DrainLimits = Pick<ApiLimits, 'drain_ms' | 'ending_ms' | 'costs_ms'>;

/** Tracks what runs, so that a shutdown can wait for it and, after a while, abort it. */
export class Lifecycle {
  /** Each completion's controller and its tenant. */
  readonly #completions = new Map<AbortController, string>();
  readonly #embeddings = new Set<AbortController>();
  readonly #stop = new AbortController();
  readonly #idle = Promise.withResolvers<void>();
  /** When a completion last broke off, or lost its client: edges ask then what it cost. */
  #brokeOffAt_ms = Number.NEGATIVE_INFINITY;

  /** Aborts when the drain begins; its reason is the error for later requests. */
  get stopping(): AbortSignal {
    return this.#stop.signal;
  }

  get draining(): boolean {
    return this.#stop.signal.aborted;
  }

  /** Running completions, of all tenants. */
  get completions(): number {
    return this.#completions.size;
  }

  completionsOf(tenant: string): number {
    return [...this.#completions.values()].filter((one) => one === tenant).length;
  }

  /** Registers a completion. @returns a function to call when it has ended; `isWhole`: successfully. */
  beginCompletion(abort: AbortController, tenant: string): (isWhole: boolean) => void {
    this.#completions.set(abort, tenant);
    return (isWhole) => {
      if (!isWhole) this.#brokeOffAt_ms = performance.now();
      this.#leave(this.#completions, abort);
    };
  }

  /** The same for embeddings, which take no place from completions. */
  beginEmbeddings(abort: AbortController): () => void {
    this.#embeddings.add(abort);
    return () => this.#leave(this.#embeddings, abort);
  }

  #leave(group: { delete(abort: AbortController): void }, abort: AbortController): void {
    group.delete(abort);
    if (this.draining && this.#isIdle) this.#idle.resolve();
  }

  get #isIdle(): boolean {
    return this.#completions.size === 0 && this.#embeddings.size === 0;
  }

  /**
   * Refuses new work, and aborts what still runs after `drain_ms`. Resolves when nothing runs, at most `ending_ms` later; where
   * a completion broke off or lost its client, not before edges have had `costs_ms` to ask what it cost.
   */
  async drain({ drain_ms, ending_ms, costs_ms }: DrainLimits): Promise<void> {
    const shutDown = new MaskrouteError('not_ready', 'The server is shutting down.', { retryAfter_s: 5 });
    this.#stop.abort(shutDown);
    if (this.#isIdle) this.#idle.resolve();
    const end = setTimeout(() => {
      for (const abort of [...this.#completions.keys(), ...this.#embeddings]) abort.abort(shutDown);
    }, drain_ms);
    const giveUp = setTimeout(this.#idle.resolve, drain_ms + ending_ms);
    await this.#idle.promise;
    clearTimeout(end);
    clearTimeout(giveUp);
    await sleep(Math.max(0, this.#brokeOffAt_ms + costs_ms - performance.now()));
  }
}

/**
 * Places in the engine's queue for the choices with which an answer begins: fewer when the queue is nearly full. They are taken
 * when the mask is known, before the prompt is read, and each is kept until its choice is in the engine: opening its grammar
 * takes time, too. More choices run at a time once there is room.
 */
export class Places {
  readonly #engine: Engine;
  readonly #tenant: string;
  readonly #atOnceMax: number;
  /** What gives a choice's place back. As many choices run at a time as ever had one. */
  readonly #places = new Map<number, () => void>();

  constructor(engine: Engine, tenant: string, { choicesAtOnce }: Pick<ApiLimits, 'choicesAtOnce'>) {
    this.#engine = engine;
    this.#tenant = tenant;
    this.#atOnceMax = Math.max(1, Math.min(choicesAtOnce, engine.stats().queueCapacity));
  }

  /**
   * Takes places for an answer of so many choices.
   * @throws MaskrouteError `queue_full` when others took the last one since the request came.
   */
  take(choices: number): void {
    const places = this.#engine.reserve(this.#tenant, Math.min(choices, this.#atOnceMax));
    for (const [choice, giveBack] of places.entries()) this.#places.set(choice, giveBack);
  }

  /** Lets a choice begin while so many others of the answer run, if it may. If it is one more than before, it takes a place. */
  tryBegin(choice: number, running: number): boolean {
    if (running < this.#places.size) return true;
    if (running === this.#atOnceMax) return false;
    try {
      const [giveBack] = this.#engine.reserve(this.#tenant, 1);
      this.#places.set(choice, giveBack!);
      return true;
    } catch {
      // The queue is still full.
      return false;
    }
  }

  /** Call it just before a choice comes to the engine, which counts it from then on. */
  giveBack(choice: number): void {
    this.#places.get(choice)?.();
  }

  giveAllBack(): void {
    for (const giveBack of this.#places.values()) giveBack();
  }
}

/*
 * Requests that made the engine fail. After the second failure the same request is refused, so that a client's retries do
 * not disturb others. Each backend learns this separately, and the edge does not count it against the backend.
 */

const REMEMBERED_MAX = 1000;
/** The cause may have been the machine, so after this long a request may be tried again. */
const REMEMBERED_ms = 10 * 60_000;
const FAILURES_MAX = 2;

class FailedRequests {
  /** How often each request has failed, by the hash of its tenant, endpoint and body. */
  readonly #failures = new LRUCache<string, number>({ max: REMEMBERED_MAX, ttl: REMEMBERED_ms });

  /** @throws MaskrouteError `request_fails_engine`. */
  expectHarmless(request: object): void {
    // Usually nothing has failed, and no hash is computed.
    if (this.#failures.size === 0) return;
    if ((this.#failures.get(hashOf(request)) ?? 0) < FAILURES_MAX) return;
    throw new MaskrouteError(
      'request_fails_engine',
      'This request made the engine fail twice; it is not run again.',
    );
  }

  failed(request: object): void {
    const hash = hashOf(request);
    this.#failures.set(hash, (this.#failures.get(hash) ?? 0) + 1);
  }

  succeeded(request: object): void {
    if (this.#failures.size > 0) this.#failures.delete(hashOf(request));
  }
}

/** Without the edge's field `maskroute`, which differs on every attempt. */
function hashOf(request: object): string {
  const text = JSON.stringify({ ...request, maskroute: undefined });
  return createHash('sha256').update(text).digest('base64');
}

export type ApiEnv = {
  /** Empty when the app is called without a server. */
  readonly Bindings: Partial<HttpBindings>;
  Variables: { requestId: string; caller: Caller };
};

export type ApiContext = Context<ApiEnv>;

/** The tenant of a request. All holders of the backend key itself count as one, ''. */
export const tenantOf = (c: ApiContext): string => c.get('caller').tenant ?? '';

/** Sets response headers, which stay even if the request fails later. */
export function setHeaders(c: ApiContext, headers: Record<string, string>): void {
  for (const [name, value] of Object.entries(headers)) c.header(name, value);
}

export type ApiLimits = ArrivalLimits & {
  /** Most running completions, counted from the complete body on; larger than the engine's queue. */
  readonly inFlightMax: number;
  /** Most choices of one request: prompts times `n`. */
  readonly choicesMax: number;
  /** Most choices of one request in the engine at a time, so that one request cannot fill the queue. */
  readonly choicesAtOnce: number;
  /** How long a streaming answer waits for its first event before it commits to status 200. */
  readonly commit_ms: number;
  /** A stream without events for this long sends a comment. */
  readonly keepalive_ms: number;
  /** A client that reads nothing for this long counts as gone. */
  readonly stall_ms: number;
  /** How long a later choice of an admitted request retries while the queue is full. */
  readonly readmit_ms: number;
  /** An engine that does not answer for this long is stuck. Longer than a step of a large model on a slow machine. */
  readonly engineSilence_ms: number;
  /** How long running requests may take to finish after a stop signal; then they are aborted. */
  readonly drain_ms: number;
  /** How long aborted requests may take to end; then the shutdown continues without them. */
  readonly ending_ms: number;
  /** How long a server that stops still tells the cost of an answer that broke off, or lost its client. */
  readonly costs_ms: number;
  /** How long the last bytes may take to reach their clients after every answer has ended. */
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
  // An edge asks 0.05, 0.3 and 1.3 s after such an end.
  costs_ms: 1500,
  flush_ms: 2000,
};
