/** The engine on the main thread: a worker thread behind the `Engine` interface. */
import { availableParallelism } from 'node:os';
import { Worker } from 'node:worker_threads';
import type { ModelHash, SurrogatesId } from '../../shared/mask/mask.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import type { ModelConfig } from '../model/model-source.ts';
import type { Engine, EngineEvent, GenerateRequest } from './engine.ts';
import type { LoopLimits } from './engine-loop.ts';
import { PREFIX_TOKENS_MAX } from './prefix-cache.ts';
import {
  type FromThread,
  newSharedStats,
  readStats,
  type ThreadError,
  type ThreadStart,
  type ToThread,
} from './thread-messages.ts';

/** Events pushed on one side, iterated on the other. It holds at most one request's tokens, so it needs no bound. */
class EventQueue<T> implements AsyncIterable<T> {
  readonly #events: T[] = [];
  #error: unknown;
  #failed = false;
  #wake: (() => void) | undefined;

  push(event: T): void {
    this.#events.push(event);
    this.#wake?.();
  }

  /** Ends the iteration with `error`, after what was pushed before. */
  fail(error: unknown): void {
    this.#failed = true;
    this.#error = error;
    this.#wake?.();
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<T> {
    for (;;) {
      while (this.#events.length > 0) yield this.#events.shift()!;
      if (this.#failed) throw this.#error;
      await new Promise<void>((resolve) => {
        this.#wake = resolve;
      });
      this.#wake = undefined;
    }
  }
}

/*
 * Whether a thread still answers. It is asked by whoever looks, so an engine that nobody looks at pays nothing; a thread
 * that is stuck in native code throws nothing and ends nothing, and is known by its silence alone.
 */

type Pulse = {
  /** How long the thread has owed an answer, in ms; 0 when it owed none, and then it is asked again. */
  silence_ms(): number;
  answered(): void;
};

export function createPulse(ask: () => void, now_ms: () => number = () => performance.now()): Pulse {
  let askedAt_ms: number | undefined;
  return {
    silence_ms() {
      if (askedAt_ms !== undefined) return now_ms() - askedAt_ms;
      askedAt_ms = now_ms();
      ask();
      return 0;
    },
    answered() {
      askedAt_ms = undefined;
    },
  };
}

type EngineOptions = {
  readonly modelDir: string;
  readonly hash: ModelHash;
  readonly config: ModelConfig;
  readonly surrogates?: SurrogatesId;
  readonly threads?: number;
  readonly limits?: Partial<LoopLimits>;
  /** Hears of failures with their stack, which the wire never carries. */
  readonly onError?: (detail: string) => void;
};

/** Requests that share the engine; each decodes more slowly with more of them. */
const RUNNING_MAX = 8;
/** At some 3 ms a token and 100 tokens an answer, the last of 64 waits about 20 s: more would only time out. */
const WAITING_MAX = 64;
const QUEUE_TIMEOUT_ms = 30_000;
/**
 * 128 tokens take some 70 ms on two cores, 170 when they are scored, and up to 450 after 8,000 others: the longest that a
 * cancel waits.
 */
const CHUNK_TOKENS = 128;

export async function createEngine(options: EngineOptions): Promise<Engine> {
  const { config } = options;
  const limits: LoopLimits = {
    runningMax: RUNNING_MAX,
    waitingMax: WAITING_MAX,
    queueTimeout_ms: QUEUE_TIMEOUT_ms,
    chunkTokens: CHUNK_TOKENS,
    cacheTokensMax: RUNNING_MAX * config.contextTokens,
    prefixTokensMax: PREFIX_TOKENS_MAX,
    ...options.limits,
  };
  const threads = options.threads ?? availableParallelism();
  const stats = newSharedStats();
  const { modelDir, surrogates } = options;
  const workerData: ThreadStart = { modelDir, config, surrogates, threads, limits, stats };
  const worker = new Worker(new URL('./engine-thread.ts', import.meta.url), {
    workerData,
    resourceLimits: { maxYoungGenerationSizeMb: 2 },
  });
  const queues = new Map<string, EventQueue<EngineEvent>>();
  const state: { failure: MaskrouteError | undefined } = { failure: undefined };

  const post = (message: ToThread) => worker.postMessage(message);
  const pulse = createPulse(() => post({ type: 'ping' }));
  worker.on('message', (message: FromThread) => receive(message, queues, pulse, options.onError));
  const exited = new Promise<void>((resolve) => worker.once('exit', () => resolve()));
  const stop = (detail: string) => {
    state.failure ??= new MaskrouteError('engine_failed', 'The engine has stopped.');
    if (queues.size > 0 || detail !== '') options.onError?.(detail);
    for (const queue of queues.values()) queue.fail(state.failure);
    queues.clear();
  };
  worker.on('error', (error) => stop(error.stack ?? String(error)));
  worker.on('exit', () => stop(''));
  await ready(worker);

  const shared = new Float64Array(stats);
  return {
    model: {
      hash: options.hash,
      blockCount: 2 * config.layerCount,
      contextTokens: config.contextTokens,
      vocabularySize: config.vocabularySize,
      ...(options.surrogates === undefined ? {} : { surrogates: options.surrogates }),
    },
    generate: (request, signal) => generate(request, signal, queues, state, post),
    stats: () => {
      const { leastRecentStep_ms, oldestUnstarted_ms, ...counts } = readStats(shared);
      const [stepAge_ms, queueAge_ms] = [age_ms(leastRecentStep_ms), age_ms(oldestUnstarted_ms)];
      return { ...counts, queueCapacity: limits.waitingMax, stepAge_ms, queueAge_ms };
    },
    get failure() {
      return state.failure;
    },
    silence_ms: pulse.silence_ms,
    close: async () => {
      post({ type: 'close' });
      await exited;
    },
  };
}

/** Threads have clocks of their own, which agree to some milliseconds. */
const age_ms = (since_ms: number): number =>
  since_ms === 0 ? 0 : Math.max(0, performance.timeOrigin + performance.now() - since_ms);

async function* generate(
  request: GenerateRequest,
  signal: AbortSignal,
  queues: Map<string, EventQueue<EngineEvent>>,
  state: { readonly failure: MaskrouteError | undefined },
  post: (message: ToThread) => void,
): AsyncGenerator<EngineEvent> {
  if (state.failure !== undefined) throw state.failure;
  const { requestId } = request;
  const queue = new EventQueue<EngineEvent>();
  const cancel = () => post({ type: 'cancel', requestId });
  queues.set(requestId, queue);
  post({ type: 'generate', request });
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
    queues.delete(requestId);
    if (!finished) cancel();
  }
}

function receive(
  message: FromThread,
  queues: Map<string, EventQueue<EngineEvent>>,
  pulse: Pulse,
  onError: ((detail: string) => void) | undefined,
): void {
  switch (message.type) {
    case 'ready':
      return;
    case 'pong':
      pulse.answered();
      return;
    case 'event':
      queues.get(message.requestId)?.push(message.event);
      return;
    case 'failed':
      if (message.error.detail !== '') onError?.(message.error.detail);
      queues.get(message.requestId)?.fail(fromWire(message.error));
  }
}

const fromWire = ({ code, message, param, retryAfter_s }: ThreadError): MaskrouteError =>
  new MaskrouteError(code, message, { param, ...(retryAfter_s === undefined ? {} : { retryAfter_s }) });

/** Resolves with the thread's first message; rejects when the model cannot be opened. */
function ready(worker: Worker): Promise<void> {
  return new Promise((resolve, reject) => {
    worker.once('message', () => resolve());
    worker.once('error', (error) =>
      reject(
        new MaskrouteError('engine_failed', `The engine did not start: ${error.message}`, { cause: error }),
      ),
    );
    worker.once('exit', (code) =>
      reject(new MaskrouteError('engine_failed', `The engine's thread ended with code ${code}.`)),
    );
  });
}
