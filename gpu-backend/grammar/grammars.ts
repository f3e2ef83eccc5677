/**
 * Compiles grammars in worker threads, so that neither the HTTP thread nor the engine waits for it. A new grammar is compiled
 * in a trial thread. If that is fast, the shared thread, which serves all fast grammars, compiles it again. If it is slow,
 * the trial thread becomes that grammar's own, so that no answer waits for another answer's slow grammar.
 */
import { createHash } from 'node:crypto';
import { aborted } from 'node:util';
import { LRUCache } from 'lru-cache';
import { cancellation, MaskrouteError } from '../../shared/wire/errors.ts';
import { GrammarThread, lost, type OpenGrammar } from './grammar-thread.ts';
import type { GrammarSpec, Vocabulary } from './xgrammar.ts';

export type PreparedGrammar = {
  readonly key: string;
  readonly spec: GrammarSpec;
  /** The field of the request that errors name. */
  readonly param: string;
};

export type Grammars = {
  /**
   * Compiles a grammar unless it is known. Rejects with MaskrouteError `invalid_schema` when it cannot be compiled in time,
   * `queue_full`, `engine_failed`, or the reason of `signal`.
   */
  prepare(spec: GrammarSpec, call: GrammarCall & { readonly param: string }): Promise<PreparedGrammar>;
  /** Opens a session for one answer; rejects as `prepare`. */
  open(grammar: PreparedGrammar, call: GrammarCall): Promise<OpenGrammar>;
  close(): Promise<void>;
};

export type GrammarCall = { readonly tenant: string; readonly signal: AbortSignal };

export type GrammarLimits = {
  /** CPU time up to which a grammar counts as quick and may delay others in the shared thread. */
  readonly quick_ms: number;
  /** A compilation that takes more CPU time is aborted, together with its thread. */
  readonly compile_ms: number;
  /** Most slow grammars, each with a thread, at a time; and most that answers of one tenant use, so that others have room. */
  readonly slowMax: number;
  readonly slowOfOneMax: number;
  /** Most new grammars that are compiled at a time, each of another tenant. */
  readonly trialsMax: number;
  /** Most grammars that wait to be compiled, of all tenants and of one. */
  readonly waitingMax: number;
  readonly waitingOfOneMax: number;
};

const DEFAULT_LIMITS: GrammarLimits = {
  quick_ms: 150,
  compile_ms: 20_000,
  slowMax: 3,
  slowOfOneMax: 2,
  trialsMax: 2,
  waitingMax: 32,
  waitingOfOneMax: 8,
};
/** Most quick grammars that are remembered, and most of the others. */
const KNOWN_MAX = 1024;
/** Then they are tried again: a machine that was busy may have computed more slowly. */
const JUDGED_FOR_ms = 10 * 60_000;

type GrammarsOptions = {
  readonly vocabulary: Vocabulary;
  /** Called with the stack of each failure, for the log; clients never see it. */
  readonly onError: (detail: string) => void;
  readonly limits?: Partial<GrammarLimits>;
};

/** Opens no thread before the first grammar. */
export function createGrammars(options: GrammarsOptions): Grammars {
  return new GrammarThreads(options, { ...DEFAULT_LIMITS, ...options.limits });
}

class GrammarThreads implements Grammars {
  readonly #options: GrammarsOptions;
  readonly #limits: GrammarLimits;
  /** They compile new grammars and serve no answers. */
  readonly #trials = new Set<GrammarThread>();
  /** Compiles the next new grammar. */
  #spare: GrammarThread | undefined;
  /** Serves all quick grammars. */
  #shared: GrammarThread | undefined;
  /** The threads of slow grammars, by key; least recently used first. */
  readonly #slow = new Map<string, GrammarThread>();
  readonly #quick = new LRUCache<string, true>({ max: KNOWN_MAX });
  /** Grammars that took long or failed, so that they are not compiled again to be refused again. */
  readonly #judged = new LRUCache<string, 'slow' | 'unusable'>({ max: KNOWN_MAX, ttl: JUDGED_FOR_ms });
  /** A place for each grammar that waits to be compiled, the next one first. */
  readonly #waiting = new Set<Place>();
  /** The tenants of the grammars that are being compiled. */
  readonly #compiling = new Set<string>();
  #isClosed = false;

  constructor(options: GrammarsOptions, limits: GrammarLimits) {
    this.#options = options;
    this.#limits = limits;
  }

  async prepare(
    spec: GrammarSpec,
    { param, ...call }: GrammarCall & { readonly param: string },
  ): Promise<PreparedGrammar> {
    const key = createHash('sha256').update(JSON.stringify(spec)).digest('base64');
    const grammar = { key, spec, param };
    await this.#ensure(grammar, call);
    this.#requireShare(key, call.tenant);
    return grammar;
  }

  async open(grammar: PreparedGrammar, call: GrammarCall): Promise<OpenGrammar> {
    // Its thread may have been closed meanwhile.
    await this.#ensure(grammar, call);
    const { key, spec } = grammar;
    // Nothing is awaited between this and `thread.open`, so that two answers do not both take the tenant's last place.
    this.#requireShare(key, call.tenant);
    const thread = this.#slow.get(key) ?? this.#sharedThread();
    if (this.#slow.delete(key)) this.#slow.set(key, thread);
    try {
      return await thread.open(key, spec, call.tenant);
    } catch (error) {
      this.#retire(thread);
      throw error;
    }
  }

  /** After a failure a thread's memory may be full or corrupted: later answers get a new thread. */
  #retire(thread: GrammarThread): void {
    if (this.#shared === thread) this.#shared = undefined;
    for (const [key, slow] of this.#slow) if (slow === thread) this.#slow.delete(key);
    thread.retire();
  }

  async close(): Promise<void> {
    this.#isClosed = true;
    const threads = [this.#spare, ...this.#trials, this.#shared, ...this.#slow.values()];
    await Promise.all(threads.map((thread) => thread?.close()));
  }

  async #ensure(grammar: PreparedGrammar, call: GrammarCall): Promise<void> {
    if (this.#isKnown(grammar.key)) return;
    this.#refuseJudged(grammar, call.tenant);
    await this.#inTurn(call, () => this.#try(grammar, call.tenant));
  }

  #refuseJudged({ key, param }: PreparedGrammar, tenant: string): void {
    const judged = this.#judged.get(key);
    if (judged === 'unusable') throw unusable(param);
    if (judged === 'slow' && (this.#hasShare(tenant) || !this.#hasRoom())) throw tooManySlow();
  }

  /** A slow grammar that an answer uses serves any tenant: one more answer takes no place. */
  #requireShare(key: string, tenant: string): void {
    if (this.#slow.get(key)?.sessions.size === 0 && this.#hasShare(tenant)) throw tooManySlow();
  }

  /** Whether the tenant's answers use as many slow grammars as they may. */
  #hasShare(tenant: string): boolean {
    const own = [...this.#slow.values()].filter(({ sessions }) => [...sessions.values()].includes(tenant));
    return own.length >= this.#limits.slowOfOneMax;
  }

  #isKnown(key: string): boolean {
    const slow = this.#slow.get(key);
    if (slow?.isGone === true) this.#slow.delete(key);
    return this.#slow.has(key) || this.#quick.has(key);
  }

  /**
   * Tenants take turns, and each has one new grammar compiled at a time: schemas that take as long as they may delay their
   * own tenant. Rejects, and gives its place back, as soon as the caller's signal aborts.
   */
  async #inTurn({ tenant, signal }: GrammarCall, work: () => Promise<void>): Promise<void> {
    const { waitingMax, waitingOfOneMax } = this.#limits;
    const own = [...this.#waiting].filter((one) => one.tenant === tenant).length;
    if (this.#waiting.size >= waitingMax || own >= waitingOfOneMax)
      throw new MaskrouteError('queue_full', 'Too many new schemas are waiting to be compiled.', {
        retryAfter_s: 1,
      });
    const turn = Promise.withResolvers<void>();
    const place = { tenant, begin: turn.resolve };
    this.#waiting.add(place);
    this.#beginNext();
    const begun = turn.promise.then(async () => {
      if (!signal.aborted) await work();
    });
    const done = begun.finally(() => this.#ended(place));
    await Promise.race([done, aborted(signal, place)]);
    if (!signal.aborted) return;
    this.#waiting.delete(place);
    throw cancellation(signal);
  }

  #beginNext(): void {
    for (const place of [...this.#waiting]) {
      const { tenant, begin } = place;
      if (this.#compiling.size === this.#limits.trialsMax) return;
      if (this.#compiling.has(tenant)) continue;
      this.#waiting.delete(place);
      this.#compiling.add(tenant);
      begin();
    }
  }

  #ended({ tenant }: Place): void {
    this.#compiling.delete(tenant);
    // The tenant's others are behind those of tenants that have waited meanwhile.
    const own = [...this.#waiting].filter((one) => one.tenant === tenant);
    for (const place of own) this.#waiting.delete(place);
    for (const place of own) this.#waiting.add(place);
    this.#beginNext();
  }

  async #try(grammar: PreparedGrammar, tenant: string): Promise<void> {
    const { key, spec, param } = grammar;
    // Another request may have compiled it meanwhile.
    if (this.#isKnown(key)) return;
    this.#refuseJudged(grammar, tenant);
    if (this.#isClosed) throw lost();
    const trial = this.#spare === undefined || this.#spare.isGone ? this.#newThread() : this.#spare;
    this.#spare = undefined;
    this.#trials.add(trial);
    let took_ms: number;
    try {
      took_ms = await trial.compile(key, spec, this.#limits.compile_ms);
    } catch (error) {
      // The thread's memory may be corrupted, or the compilation may never end.
      void trial.close();
      this.#options.onError(`a grammar could not be compiled: ${(error as Error).message}`);
      if (error instanceof MaskrouteError) throw error;
      this.#judged.set(key, 'unusable');
      throw unusable(param);
    } finally {
      this.#trials.delete(trial);
    }
    // A thread that has compiled it before takes no time.
    const isSlow = took_ms > this.#limits.quick_ms || this.#judged.get(key) === 'slow';
    if (isSlow) this.#judged.set(key, 'slow');
    // A tenant that could not use it closes no grammar of another.
    if (isSlow && !this.#isKnown(key) && !this.#hasShare(tenant) && this.#tryMakeRoom()) {
      this.#slow.set(key, trial);
      return;
    }
    this.#keep(trial);
    if (!isSlow) return await this.#share(key, spec);
    if (!this.#isKnown(key)) throw tooManySlow();
  }

  #keep(trial: GrammarThread): void {
    // That of a trial that has ended meanwhile.
    void this.#spare?.close();
    this.#spare = trial;
  }

  /** The schema compiled a moment ago, so a failure here is the thread's. */
  async #share(key: string, spec: GrammarSpec): Promise<void> {
    const shared = this.#sharedThread();
    try {
      await shared.compile(key, spec, this.#limits.compile_ms);
    } catch (error) {
      this.#retire(shared);
      this.#options.onError(`a grammar could not be compiled again: ${(error as Error).message}`);
      throw error instanceof MaskrouteError ? error : lost(error);
    }
    this.#quick.set(key, true);
  }

  /** Closes a slow grammar that no answer uses, if there is no room for another. False: all are in use. */
  #tryMakeRoom(): boolean {
    if (this.#slow.size < this.#limits.slowMax) return true;
    const idle = this.#idleSlow();
    if (idle === undefined) return false;
    this.#slow.delete(idle[0]);
    void idle[1].close();
    return true;
  }

  #hasRoom(): boolean {
    return this.#slow.size < this.#limits.slowMax || this.#idleSlow() !== undefined;
  }

  #idleSlow(): [string, GrammarThread] | undefined {
    return [...this.#slow].find(([, thread]) => thread.sessions.size === 0);
  }

  #sharedThread(): GrammarThread {
    if (this.#isClosed) throw lost();
    if (this.#shared === undefined || this.#shared.isGone) this.#shared = this.#newThread();
    return this.#shared;
  }

  #newThread(): GrammarThread {
    return new GrammarThread(this.#options.vocabulary, this.#options.onError);
  }
}

/** In the line of new grammars. */
type Place = { readonly tenant: string; readonly begin: () => void };

const tooManySlow = (): MaskrouteError =>
  new MaskrouteError('queue_full', 'Too many answers with complex schemas are running.', { retryAfter_s: 5 });

const unusable = (param: string): MaskrouteError =>
  new MaskrouteError('invalid_schema', `${param}: the schema cannot be compiled to a grammar.`, { param });
