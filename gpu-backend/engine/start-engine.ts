/** The engine on the main thread: a worker thread behind the `Engine` interface. */
import { availableParallelism } from 'node:os';
import { Worker } from 'node:worker_threads';
import type { ModelHash, SurrogatesId } from '../../shared/mask/mask.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { turnQueue } from '../event-loop.ts';
import { BATCH_PLACES } from '../model/architectures/batched-attention.ts';
import type { KvType, ModelConfig } from '../model/model-source.ts';
import { CPU, type Device } from '../onnx/device.ts';
import {
  type Engine,
  type EngineEvent,
  type EngineModel,
  type EngineStats,
  type GenerateRequest,
  newSharedStats,
  readStats,
} from './engine.ts';
import type { LoopLimits } from './engine-loop.ts';
import type { FromThread, RequestNews, ThreadError, ThreadStart, ToThread } from './engine-thread.ts';
import { tokenBytes } from './kv-cache.ts';
import { PAGE_TOKENS, PREFIX_TOKENS_MAX } from './prefix-cache.ts';
import { countsByTenant, queueFull } from './queue.ts';
import { kvTypeOn } from './runner-interface.ts';

type EngineOptions = {
  readonly modelDir: string;
  readonly hash: ModelHash;
  readonly config: ModelConfig;
  readonly surrogates?: SurrogatesId;
  readonly threads?: number;
  /** The CPU unless given. */
  readonly device?: Device | undefined;
  /** Number type of the KV cache; fp32 unless given. */
  readonly kvType?: KvType | undefined;
  readonly limits?: Partial<LoopLimits>;
  /** Called with the stack of each failure, for the log; clients never see it. */
  readonly onError?: (detail: string) => void;
};

/** Requests that share a step. */
const RUNNING_MAX = BATCH_PLACES;
/** At some 3 ms a token and 100 tokens an answer, the last of 64 waits about 20 s: more would only time out. */
const WAITING_MAX = 64;
const QUEUE_TIMEOUT_ms = 30_000;
/** Longest step: a cancellation waits for the end of a step. */
const STEP_MAX_ms = 100;
const CHUNK_TOKENS = 256;

/** Rejects with MaskrouteError `engine_failed` when the model cannot be opened. */
export async function createEngine(options: EngineOptions): Promise<Engine> {
  const { modelDir, hash, config, surrogates, device = CPU } = options;
  const { layerCount, kvHeadCount, headSize } = config;
  const kvType = kvTypeOn(device, options.kvType);
  const limits: LoopLimits = {
    runningMax: RUNNING_MAX,
    waitingMax: WAITING_MAX,
    queueTimeout_ms: QUEUE_TIMEOUT_ms,
    stepMax_ms: STEP_MAX_ms,
    chunkTokens: CHUNK_TOKENS,
    cacheTokensMax: RUNNING_MAX * config.contextTokens,
    prefixTokensMax: PREFIX_TOKENS_MAX,
    ...options.limits,
  };
  if (limits.runningMax > BATCH_PLACES)
    throw new RangeError(`a step has ${BATCH_PLACES} places, not ${limits.runningMax}`);
  const threads = options.threads ?? availableParallelism();
  const stats = newSharedStats();
  const workerData: ThreadStart = { modelDir, config, surrogates, threads, device, kvType, limits, stats };
  const worker = new Worker(new URL('./engine-thread.ts', import.meta.url), {
    workerData,
    resourceLimits: { maxYoungGenerationSizeMb: 2 },
  });
  const page_bytes = PAGE_TOKENS * tokenBytes({ layerCount, width: kvHeadCount * headSize, kvType });
  const model: EngineModel = {
    hash,
    device,
    kv: { type: kvType, page_bytes },
    blockCount: 2 * layerCount,
    contextTokens: config.contextTokens,
    vocabularySize: config.vocabularySize,
    ...(surrogates === undefined ? {} : { surrogates }),
  };
  const engine = new ThreadEngine(worker, model, limits, new Float64Array(stats), options.onError);
  await ready(worker);
  return engine;
}

/** Resolves when the thread sends its first message. */
function ready(worker: Worker): Promise<void> {
  return new Promise((resolve, reject) => {
    const failed = (message: string, cause?: Error) =>
      reject(new MaskrouteError('engine_failed', message, { cause }));
    worker.once('message', () => resolve());
    worker.once('error', (error) => failed(`The engine did not start: ${error.message}`, error));
    worker.once('exit', (code) => failed(`The engine's thread ended with code ${code}.`));
  });
}

class ThreadEngine implements Engine {
  readonly model: EngineModel;
  failure: MaskrouteError | undefined;
  readonly #worker: Worker;
  readonly #onError: EngineOptions['onError'];
  readonly #limits: LoopLimits;
  readonly #stats: Float64Array;
  readonly #exited: Promise<void>;
  readonly #pulse = new Pulse(() => this.#post({ type: 'ping' }));
  /** The events of each request that waits or runs. */
  readonly #queues = new Map<string, EventQueue<EngineEvent>>();
  /** Requests that have not started to run. */
  readonly #unstarted = new Map<string, GenerateRequest>();
  /** Places of requests that are about to come. */
  readonly #reserved = new Set<{ readonly tenant: string }>();
  readonly #failing = turnQueue();

  constructor(
    worker: Worker,
    model: EngineModel,
    limits: LoopLimits,
    stats: Float64Array,
    onError: EngineOptions['onError'],
  ) {
    this.model = model;
    this.#worker = worker;
    this.#onError = onError;
    this.#limits = limits;
    this.#stats = stats;
    worker.on('message', (message: FromThread) => this.#receive(message));
    worker.on('error', (error) => this.#fail(error.stack ?? String(error)));
    worker.on('exit', (code) => {
      this.#fail(this.#queues.size === 0 ? undefined : `The engine's thread ended with code ${code}.`);
    });
    this.#exited = new Promise((resolve) => worker.once('exit', () => resolve()));
  }

  async *generate(
    request: GenerateRequest,
    signal: AbortSignal,
    onToken?: () => void,
  ): AsyncGenerator<EngineEvent> {
    if (this.failure !== undefined) throw this.failure;
    const { requestId } = request;
    const queue = new EventQueue<EngineEvent>(({ type }) => type === 'token' && onToken?.());
    const cancel = () => this.#post({ type: 'cancel', requestId });
    this.#queues.set(requestId, queue);
    this.#unstarted.set(requestId, request);
    this.#post({ type: 'generate', request });
    if (signal.aborted) cancel();
    signal.addEventListener('abort', cancel, { once: true });
    let finished = false;
    try {
      for await (const event of queue) {
        finished = event.type === 'finished';
        yield event;
        if (finished) return;
      }
    } finally {
      signal.removeEventListener('abort', cancel);
      this.#queues.delete(requestId);
      this.#unstarted.delete(requestId);
      if (!finished) cancel();
    }
  }

  /**
   * The rule is that of `Scheduler.add`: a full queue drops the newest request of the tenant with most requests in it.
   * Requests that the engine's thread has not received yet, and reserved places, count as queued, minus those that will
   * start at once.
   */
  #hasRoom(tenant: string): boolean {
    const { waitingMax, runningMax } = this.#limits;
    const size = this.#unstarted.size + this.#reserved.size;
    if (size < waitingMax) return true;
    const { requestsRunning, requestsWaiting } = readStats(this.#stats);
    if (requestsWaiting < waitingMax && size < waitingMax + runningMax - requestsRunning) return true;
    const counts = countsByTenant([...this.#unstarted.values(), ...this.#reserved]);
    return (counts.get(tenant) ?? 0) + 1 < Math.max(...counts.values());
  }

  expectRoom(tenant: string): void {
    if (!this.#hasRoom(tenant)) throw queueFull(this.#limits.waitingMax);
  }

  reserve(tenant: string, countMax: number): (() => void)[] {
    this.expectRoom(tenant);
    const giveBacks: (() => void)[] = [];
    do {
      const place = { tenant };
      this.#reserved.add(place);
      giveBacks.push(() => this.#reserved.delete(place));
    } while (giveBacks.length < countMax && this.#hasRoom(tenant));
    return giveBacks;
  }

  stats(): EngineStats {
    const { leastRecentStep_ms, oldestUnstarted_ms, ...counts } = readStats(this.#stats);
    const [stepAge_ms, queueAge_ms] = [age_ms(leastRecentStep_ms), age_ms(oldestUnstarted_ms)];
    return { ...counts, queueCapacity: this.#limits.waitingMax, stepAge_ms, queueAge_ms };
  }

  silence_ms(): number {
    return this.#pulse.silence_ms();
  }

  async close(): Promise<void> {
    this.#post({ type: 'close' });
    await this.#exited;
  }

  #post(message: ToThread): void {
    this.#worker.postMessage(message);
  }

  #receive(message: FromThread): void {
    switch (message.type) {
      case 'ready':
        return;
      case 'pong':
        this.#pulse.answered();
        return;
      case 'news':
        for (const news of message.news) this.#onNews(news);
    }
  }

  #onNews(news: RequestNews): void {
    const queue = this.#queues.get(news.requestId);
    switch (news.type) {
      case 'started':
        this.#unstarted.delete(news.requestId);
        return;
      case 'event':
        queue?.push(news.event);
        return;
      case 'failed':
        if (news.error.detail !== '') this.#onError?.(news.error.detail);
        this.#unstarted.delete(news.requestId);
        // A step may refuse all that wait, and the end of a request is much work.
        void this.#failing().then(() => queue?.fail(fromThread(news.error)));
    }
  }

  /** The thread has ended: all its requests fail. `detail`: for the log. */
  #fail(detail: string | undefined): void {
    this.failure ??= new MaskrouteError('engine_failed', 'The engine has stopped.');
    if (detail !== undefined) this.#onError?.(detail);
    for (const queue of this.#queues.values()) queue.fail(this.failure);
    this.#queues.clear();
    this.#unstarted.clear();
  }
}

/** The clocks of two threads may differ by some milliseconds, so a negative age becomes 0. */
const age_ms = (since_ms: number): number =>
  since_ms === 0 ? 0 : Math.max(0, performance.timeOrigin + performance.now() - since_ms);

const fromThread = ({ code, message, param, retryAfter_s }: ThreadError): MaskrouteError =>
  new MaskrouteError(code, message, { param, ...(retryAfter_s === undefined ? {} : { retryAfter_s }) });

/** A queue of events with an async iterator. It holds at most one request's tokens, so it needs no bound. */
class EventQueue<T> implements AsyncIterable<T> {
  readonly #events: T[] = [];
  #error: MaskrouteError | undefined;
  #wake: (() => void) | undefined;
  readonly #onPush: (event: T) => void;

  constructor(onPush: (event: T) => void) {
    this.#onPush = onPush;
  }

  push(event: T): void {
    this.#events.push(event);
    this.#onPush(event);
    this.#wake?.();
  }

  /** Ends the iteration with `error`, after what was pushed before. */
  fail(error: MaskrouteError): void {
    this.#error = error;
    this.#wake?.();
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<T> {
    for (;;) {
      while (this.#events.length > 0) yield this.#events.shift()!;
      if (this.#error !== undefined) throw this.#error;
      await new Promise<void>((resolve) => {
        this.#wake = resolve;
      });
      this.#wake = undefined;
    }
  }
}

/**
 * Detects a thread that no longer answers: one stuck in native code throws no error and does not exit. It pings only when
 * `silence_ms` is called, so it costs nothing while nobody checks.
 */
export class Pulse {
  readonly #ask: () => void;
  readonly #now_ms: () => number;
  #askedAt_ms: number | undefined;

  constructor(ask: () => void, now_ms: () => number = () => performance.now()) {
    this.#ask = ask;
    this.#now_ms = now_ms;
  }

  /** Time since the pending ping; without a pending ping it sends one and returns 0. */
  silence_ms(): number {
    if (this.#askedAt_ms !== undefined) return this.#now_ms() - this.#askedAt_ms;
    this.#askedAt_ms = this.#now_ms();
    this.#ask();
    return 0;
  }

  answered(): void {
    this.#askedAt_ms = undefined;
  }
}
