/** One of the threads that compile grammars and match answers (`xgrammar.ts`), as the main thread uses it. */
import { setTimeout as sleep } from 'node:timers/promises';
import { Worker } from 'node:worker_threads';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { type GrammarSession, giveUp, newSession } from '../engine/grammar.ts';
import type {
  FromGrammarThread,
  GrammarSpec,
  GrammarThreadStart,
  ToGrammarThread,
  Vocabulary,
} from './xgrammar.ts';

export type OpenGrammar = { readonly session: GrammarSession; close(): void };

export class GrammarThread {
  isGone = false;
  /** Sessions of running answers, with their tenants. */
  readonly sessions = new Map<GrammarSession, string>();
  #isRetired = false;
  readonly #worker: Worker;
  readonly #vocabularySize: number;
  readonly #bell = new SharedArrayBuffer(Int32Array.BYTES_PER_ELEMENT);
  /** What was asked of the thread, by its id; it answers with CPU time, ms. */
  readonly #pending = new Map<number, PromiseWithResolvers<number>>();
  #ids = 0;
  #compilations = 0;
  readonly #ready: Promise<void>;

  /** `onError` gets the stack of what ends the thread. */
  constructor(vocabulary: Vocabulary, onError: (detail: string) => void) {
    const workerData: GrammarThreadStart = { vocabulary, bell: this.#bell };
    this.#vocabularySize = vocabulary.size;
    this.#worker = new Worker(new URL('./xgrammar.ts', import.meta.url), {
      workerData,
      resourceLimits: { maxYoungGenerationSizeMb: 4 },
    });
    this.#worker.unref();
    const ready = Promise.withResolvers<void>();
    this.#ready = ready.promise;
    this.#ready.catch(() => {});
    this.#worker.on('error', (error) => onError(error.stack ?? String(error)));
    this.#worker.on('exit', () => {
      this.isGone = true;
      for (const { words } of this.sessions.keys()) giveUp(words);
      ready.reject(lost());
      for (const { reject } of this.#pending.values()) reject(lost());
      this.#pending.clear();
    });
    this.#worker.on('message', (message: FromGrammarThread) => {
      if (message.type === 'ready') return ready.resolve();
      const pending = this.#pending.get(message.id);
      this.#pending.delete(message.id);
      if (message.type === 'done') pending?.resolve(message.took_ms);
      else pending?.reject(new Error(message.detail));
    });
  }

  /** @returns CPU time, ms. Rejects with Error when the grammar cannot be compiled, or takes more than `limit_ms` of it. */
  async compile(key: string, spec: GrammarSpec, limit_ms: number): Promise<number> {
    const late = Promise.withResolvers<never>();
    const over = new AbortController();
    this.#compilations++;
    try {
      await this.#ready;
      this.#hasComputed(limit_ms, over.signal).then(
        () => late.reject(new Error(`it takes more than ${limit_ms} ms`)),
        // It is over, or the thread is gone.
        () => {},
      );
      return await Promise.race([this.#ask({ type: 'compile', id: this.#ids++, key, spec }), late.promise]);
    } finally {
      over.abort();
      this.#compilations--;
      this.#closeIfUnused();
    }
  }

  /** Resolves after so much CPU time of the thread: on a busy machine it may wait for a processor in between. */
  async #hasComputed(limit_ms: number, signal: AbortSignal): Promise<void> {
    const before = await this.#worker.cpuUsage();
    for (let left_ms = limit_ms; left_ms > 0; ) {
      await sleep(left_ms, undefined, { signal });
      const { user, system } = await this.#worker.cpuUsage(before);
      left_ms = limit_ms - (user + system) / 1000;
    }
  }

  async open(key: string, spec: GrammarSpec, tenant: string): Promise<OpenGrammar> {
    const id = this.#ids++;
    const session = newSession(this.#vocabularySize, this.#bell);
    this.sessions.set(session, tenant);
    const close = () => {
      if (!this.sessions.delete(session)) return;
      this.#worker.postMessage({ type: 'close', id } satisfies ToGrammarThread);
      this.#closeIfUnused();
    };
    try {
      await this.#ready;
      await this.#ask({ type: 'open', id, key, spec, session });
      return { session, close };
    } catch (cause) {
      close();
      throw cause instanceof MaskrouteError ? cause : lost(cause);
    }
  }

  /** Closes the thread after its last answer and its last compilation. */
  retire(): void {
    this.#isRetired = true;
    this.#closeIfUnused();
  }

  #closeIfUnused(): void {
    if (this.#isRetired && this.sessions.size === 0 && this.#compilations === 0) void this.close();
  }

  async close(): Promise<void> {
    await this.#worker.terminate();
  }

  async #ask(message: Extract<ToGrammarThread, { type: 'compile' | 'open' }>): Promise<number> {
    if (this.isGone) throw lost();
    const answer = Promise.withResolvers<number>();
    this.#worker.postMessage(message);
    this.#pending.set(message.id, answer);
    return answer.promise;
  }
}

/** What a request is answered whose thread has ended. */
export const lost = (cause?: unknown): MaskrouteError =>
  new MaskrouteError('engine_failed', 'Structured outputs are not available at the moment.', {
    cause,
  });
