/**
 * Calls backends for one request: the best backend, then the next if it fails, until the first byte of an answer. After
 * that nothing is retried. Attempts also end with the caller's time limit, when the client hangs up (`signal`), or
 * after a few.
 */
import type { StickySource } from '../../shared/mask/sticky.ts';
import { BACKEND_HEADERS, type BackendAffinity, parseLoad } from '../../shared/wire/backend-load.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import type { RequestTrace } from '../base/telemetry.ts';
import { type Hold, steadyNow_ms } from '../base/waiting.ts';
import {
  type Attempted,
  attempt,
  type BackendRequest,
  type Rest,
  type Send,
  unreachable,
} from './attempt.ts';
import type { Breaker, KnownBackend, LiveBackend, Observed } from './backend-state.ts';
import {
  affinityOf,
  type Candidate,
  canUseMask,
  homeOf,
  type MaskNeeds,
  orderBackends,
  pagesKey,
  type Wish,
} from './choose.ts';

export type Call = {
  readonly request: BackendRequest;
  readonly purpose: Purpose;
  readonly time: CallTime;
  readonly retries: Retries;
  /** Each backend is added by its id before it is asked. */
  readonly asked?: Map<string, LiveBackend>;
  readonly signal: AbortSignal;
  readonly trace?: RequestTrace;
  readonly hold: Hold;
};

export type Purpose =
  | {
      readonly kind: 'completion';
      readonly region: string;
      readonly model: string;
      /** The mask's id, or another name for it. */
      readonly mask: string;
      /** As the decision's. */
      readonly needs: MaskNeeds | undefined;
      readonly conversation: StickySource;
    }
  /** Its result says nothing about completions, so it does not affect breakers. */
  | { readonly kind: 'aside'; readonly region: string };

type CallTime = {
  /** Until the first byte of the answer, all attempts together. */
  readonly timeout_ms: number;
  /** True: the time limit is the edge's own, not shorter by a client or a background task. */
  readonly isFullTime: boolean;
  /** A backend that is silent for this long is abandoned for the next one, if there is one. */
  readonly silence_ms?: number | undefined;
  /** As an attempt's. */
  readonly stall_ms?: number;
};

/**
 * How many retries are left. Its owner sets 0 when a failure can no longer be retried (a byte has been sent to the
 * client).
 */
export type Retries = { left: number };
export const RETRIES_MAX = 4;

export type Answer = {
  readonly response: Response;
  readonly backend: string;
  /** Undefined if there is only one backend. */
  readonly affinity: BackendAffinity | undefined;
  /** Undefined for a stream, a large answer or an error. */
  readonly rest: Rest | undefined;
};

/** `gaveUp`: a silent backend was abandoned; it may have worked on the request, whatever the result. */
export type Called = { readonly gaveUp: boolean } & (
  | ({ readonly kind: 'answer' } & Answer)
  | { readonly kind: 'error'; readonly error: MaskrouteError }
);

export type CallParts = {
  readonly send: Send;
  /** A token for one attempt at one backend. */
  readonly token: (request: BackendRequest, backend: LiveBackend) => Promise<string>;
  /**
   * Probes the load of a backend that timed out on a non-streaming answer: it may only be busy. If the probe fails, its
   * breaker counts a failure.
   */
  readonly suspect: (backend: KnownBackend) => Promise<void>;
  /** A second backend is asked (hedging) when the first is silent for this long; 0: never. */
  readonly hedge_ms: number;
};

/**
 * The answer, with its body unread if it is a success; or `backend_unreachable` when no backend can be reached,
 * `deadline_exceeded` when none answers in time, `backend_error` when the answer does not keep to the protocol.
 * @throws MaskrouteError `cancelled` when `signal` aborts.
 */
export async function callBackend(
  parts: CallParts,
  call: Call,
  backends: readonly KnownBackend[],
): Promise<Called> {
  return await new Way(parts, call, backends).run();
}

type Tried = Attempted & {
  readonly backend: string;
  readonly affinity: BackendAffinity | undefined;
  /** Whether this attempt had all of the caller's remaining time. */
  readonly hadAll: boolean;
};

/** Receives the result of a call. */
type Listener = Pick<Breaker, 'succeeded' | 'failed' | 'released'>;
const DEAF: Listener = { succeeded() {}, failed() {}, released() {} };

/** The state of one call: which backends were asked, their results, and which is next. */
class Way {
  /** Whether a silent backend was abandoned. */
  #gaveUp = false;
  readonly #parts: CallParts;
  readonly #call: Call;
  readonly #isAside: boolean;
  readonly #backends: readonly KnownBackend[];
  readonly #wish: Wish;
  /** The conversation's own backend. */
  readonly #home: string | undefined;
  #isHomeFull = false;
  readonly #started_ms = steadyNow_ms();
  /** Number of attempts, by backend id. */
  readonly #asked = new Map<string, number>();
  /** Backends that would give the same answer again. */
  readonly #done = new Set<string>();
  /**
   * Backends for which this request has counted a failure. It counts once for each, however many attempts: one bad
   * request must not open a breaker.
   */
  readonly #blamed = new Set<string>();
  #last: Tried | undefined;

  constructor(parts: CallParts, call: Call, backends: readonly KnownBackend[]) {
    this.#parts = parts;
    this.#call = call;
    this.#isAside = call.purpose.kind === 'aside';
    this.#backends = backends;
    this.#wish = wishOf(call.purpose, call.request.tenant, backends.length > 1);
    this.#home = this.#isAside ? undefined : homeOf(backends.map(candidateOf), this.#wish);
  }

  async run(): Promise<Called> {
    const { retries, time, signal } = this.#call;
    for (;;) {
      const outcome = await this.#next();
      if (outcome.kind === 'cancelled') throw hungUp();
      const isOver = outcome.kind === 'answer' || retries.left <= 0 || this.#left_ms() <= 0;
      const [second] = isOver ? [] : this.#open();
      if (second === undefined) return { ...lastWord(outcome, time), gaveUp: this.#gaveUp };
      retries.left--;
      // Another backend is asked at once; the same backend after a delay.
      if (this.#asked.has(second.id)) {
        const delay_ms = retryDelay_ms(this.#again(), Math.random());
        await pause(Math.min(delay_ms, this.#left_ms()), signal);
      }
    }
  }

  #left_ms(): number {
    return this.#call.time.timeout_ms - (steadyNow_ms() - this.#started_ms);
  }

  /** Number of attempts at backends that had been asked before. */
  #again(): number {
    return sum(this.#asked.values()) - this.#asked.size;
  }

  async #next(): Promise<Tried> {
    const now_ms = steadyNow_ms();
    const open = this.#open();
    const [first, second] = open;
    // An aside does not take the single trial of a half-open backend.
    if (first === undefined || !(this.#isAside || first.seen.breaker.admit(now_ms))) {
      this.#last ??= { ...this.#nobody(now_ms), backend: '', affinity: undefined, hadAll: false };
      return this.#last;
    }
    this.#isHomeFull ||=
      first.id !== this.#home && open.some((backend) => this.#isPassedOver(backend, now_ms));
    // A backend that may still answer is not abandoned for one that would refuse or stay silent.
    const fresh =
      second !== undefined && !this.#asked.has(second.id) && !second.seen.isAway(now_ms) ? second : undefined;
    // A hedge must not take the single trial of a half-open backend. A backend that cannot use the mask would refuse at
    // once, and the first one would be called off for that.
    const mayHedge =
      fresh?.seen.breaker.state(now_ms) === 'closed' && canUseMask(candidateOf(fresh), this.#wish);
    this.#last = await hedged(
      (signal) => this.#ask(first, signal, fresh !== undefined),
      mayHedge ? (signal) => this.#ask(fresh, signal, false) : undefined,
      this.#parts.hedge_ms,
      this.#call.signal,
    );
    return this.#last;
  }

  /** Backends that may be asked now, the best first: untried before tried ones. */
  #open(): KnownBackend[] {
    const now_ms = steadyNow_ms();
    const usable = this.#backends.filter(
      ({ id, seen }) => !this.#done.has(id) && seen.breaker.admits(now_ms),
    );
    const timesAsked = ({ id }: KnownBackend) => this.#asked.get(id) ?? 0;
    return orderBackends(usable.map(candidateOf), this.#wish)
      .map(({ backend }) => backend)
      .sort((a, b) => timesAsked(a) - timesAsked(b));
  }

  /** Whether a backend is the conversation's own and passed over only because of its load. */
  #isPassedOver({ id, seen }: KnownBackend, now_ms: number): boolean {
    return id === this.#home && !this.#asked.has(id) && !seen.isAway(now_ms);
  }

  #nobody(now_ms: number): Attempted {
    const waits_ms = this.#backends.map(({ seen }) => seen.breaker.wait_ms(now_ms));
    const wait_ms = Math.min(...waits_ms);
    const retryAfter_s = Number.isFinite(wait_ms) ? Math.max(1, Math.ceil(wait_ms / 1000)) : 1;
    return { kind: 'failed', error: unreachable(undefined, retryAfter_s), again: false, seemsGone: false };
  }

  async #ask(backend: KnownBackend, signal: AbortSignal, hasOthers: boolean): Promise<Tried> {
    const { send, token: sign } = this.#parts;
    const { request, time } = this.#call;
    const { id, url, seen } = backend;
    this.#asked.set(id, (this.#asked.get(id) ?? 0) + 1);
    this.#call.asked?.set(id, backend);
    const token = await sign(request, backend);
    const wasDraining = seen.isDraining(steadyNow_ms());
    const left_ms = Math.max(1, this.#left_ms());
    const timeout_ms = hasOthers ? Math.min(left_ms, time.silence_ms ?? left_ms) : left_ms;
    const times = { timeout_ms, left_ms, stall_ms: time.stall_ms };
    const ended = this.#isAside ? undefined : seen.began(timeout_ms);
    const traced = this.#call.trace?.attempt(backend, sum(this.#asked.values()));
    const sending = { send, url, token, request, signal, time: times, trace: traced?.headers };
    const outcome = await attempt(sending).finally(ended);
    traced?.end(outcome.kind, 'response' in outcome ? outcome.response.status : null);
    this.#learnState(outcome, seen, wasDraining);
    this.#learnHealth(outcome, backend, this.#isAside ? DEAF : seen.breaker);
    const affinity = affinityOf(id, this.#home, this.#isHomeFull);
    return { ...outcome, backend: id, affinity, hadAll: timeout_ms === left_ms };
  }

  #learnState(outcome: Attempted, seen: Observed, wasDraining: boolean): void {
    if (outcome.kind !== 'answer' && outcome.kind !== 'refused') return;
    const load = parseLoad(outcome.response.headers.get(BACKEND_HEADERS.load));
    if (load !== undefined) seen.reported(load, steadyNow_ms());
    if (outcome.kind === 'refused') {
      if (outcome.why === 'stopping') seen.drains(true, steadyNow_ms());
      // An answer to an earlier request says nothing: a draining backend finishes its running requests.
    } else if (wasDraining && !this.#isAside) seen.drains(false, steadyNow_ms());
  }

  #learnHealth(outcome: Attempted, backend: KnownBackend, breaker: Listener): void {
    const { id } = backend;
    const { time, hold } = this.#call;
    switch (outcome.kind) {
      case 'answer':
        breaker.succeeded();
        return;
      case 'cancelled':
        breaker.released();
        return;
      case 'refused':
        if (outcome.why !== 'stopping') this.#done.add(id);
        if (outcome.why === 'full') this.#isHomeFull ||= id === this.#home;
        if (outcome.why === 'sick') this.#blame(id, breaker, false);
        else if (outcome.why === 'full') breaker.succeeded();
        else breaker.released();
        return;
      case 'failed':
        if (!outcome.again) this.#done.add(id);
        this.#blame(id, breaker, outcome.again);
        return;
      case 'late':
        this.#done.add(id);
        this.#gaveUp = true;
        // Backends send the headers of a stream early, but a non-streaming answer may take longer than the caller
        // waits.
        if (outcome.waited_ms >= (time.silence_ms ?? Number.POSITIVE_INFINITY)) {
          this.#blame(id, breaker, false);
          return;
        }
        breaker.released();
        if (time.isFullTime) hold(this.#parts.suspect(backend));
    }
  }

  #blame(id: string, breaker: Listener, isUnreachable: boolean): void {
    if (this.#blamed.has(id)) breaker.released();
    else breaker.failed(steadyNow_ms(), isUnreachable);
    this.#blamed.add(id);
  }
}

function candidateOf(backend: KnownBackend): Candidate & { readonly backend: KnownBackend } {
  const { id, regions, weight, seen } = backend;
  const now_ms = steadyNow_ms();
  const [load, waiting, isAway] = [seen.load(now_ms), seen.waiting(now_ms), seen.isAway(now_ms)];
  return { backend, id, regions, weight, load, waiting, isAway, models: seen.models };
}

const sum = (counts: Iterable<number>): number => [...counts].reduce((total, count) => total + count, 0);

/** With a single backend nothing is hashed. */
function wishOf(purpose: Purpose, tenant: string, isChoice: boolean): Wish {
  if (purpose.kind === 'aside') {
    return { region: purpose.region, model: undefined, needs: undefined, key: '' };
  }
  const { region, model, mask, needs, conversation } = purpose;
  return { region, model, needs, key: isChoice ? pagesKey(tenant, mask, conversation) : '' };
}

/** The conversation's own backend (while all are healthy and idle); undefined with a single backend. */
export const homeBackend = (
  backends: readonly KnownBackend[],
  purpose: Purpose,
  tenant: string,
): string | undefined => homeOf(backends.map(candidateOf), wishOf(purpose, tenant, backends.length > 1));

/** The final result for the client when no other backend is asked. */
function lastWord(
  said: Exclude<Tried, { kind: 'cancelled' }>,
  { isFullTime, timeout_ms, silence_ms }: CallTime,
): ({ kind: 'answer' } & Answer) | { kind: 'error'; error: MaskrouteError } {
  switch (said.kind) {
    case 'answer':
    case 'refused': {
      const { response, backend, affinity } = said;
      return { kind: 'answer', response, backend, affinity, rest: 'rest' in said ? said.rest : undefined };
    }
    case 'failed':
      return { kind: 'error', error: said.error };
    case 'late': {
      if (!said.hadAll) return { kind: 'error', error: unreachable() };
      const advice = isFullTime && silence_ms === undefined ? ' Stream an answer that takes longer.' : '';
      const late = `No answer came within ${timeout_ms} ms.${advice}`;
      return { kind: 'error', error: new MaskrouteError('deadline_exceeded', late) };
    }
  }
}

export const hungUp = (): MaskrouteError => new MaskrouteError('cancelled', 'The client hung up.');

type Ask<T> = (signal: AbortSignal) => Promise<T>;

/**
 * Hedging: a second backend is asked when the first has been silent for a while. The first answer wins and the other
 * attempt is aborted. Work is done twice, so it is off unless configured.
 *
 * With `after_ms` 0 or no `second` only the first is asked. A failure counts only when the other can no longer answer.
 */
export async function hedged<T extends Attempted>(
  first: Ask<T>,
  second: Ask<T> | undefined,
  after_ms: number,
  signal: AbortSignal,
): Promise<T> {
  if (second === undefined || after_ms === 0) return await first(signal);
  const callOff = [new AbortController(), new AbortController()] as const;
  const begin = (ask: Ask<T>, index: 0 | 1) => ask(AbortSignal.any([signal, callOff[index].signal]));
  const running = [begin(first, 0)];
  let timer: ReturnType<typeof setTimeout> | undefined;
  const silent = new Promise<'silent'>((resolve) => {
    timer = setTimeout(resolve, after_ms, 'silent');
  });
  const early = await Promise.race([running[0]!, silent]);
  if (timer !== undefined) clearTimeout(timer);
  if (early !== 'silent') return early;

  running.push(begin(second, 1));
  const winner = await Promise.race(
    running
      .map(async (attempt, index) => {
        const outcome = await attempt;
        return outcome.kind === 'answer' ? { outcome, index } : await new Promise<never>(() => {});
      })
      .concat(Promise.all(running).then((outcomes) => ({ outcome: outcomes[1]!, index: 1 }))),
  );
  callOff[winner.index === 0 ? 1 : 0].abort();
  return winner.outcome;
}

const RETRY = { first_ms: 50, max_ms: 5_000, factor: 2, jitter: 0.1 } as const;

/** Exponential backoff with jitter before a backend is asked again. `retry` counts from 0; `random` is in [0, 1). */
export function retryDelay_ms(retry: number, random: number): number {
  const delay_ms = Math.min(RETRY.first_ms * RETRY.factor ** retry, RETRY.max_ms);
  return delay_ms * (1 - RETRY.jitter + 2 * RETRY.jitter * random);
}

/** Waits. @throws MaskrouteError `cancelled` as soon as `signal` aborts. */
export async function pause(delay_ms: number, signal: AbortSignal): Promise<void> {
  if (signal.aborted) throw hungUp();
  await new Promise<void>((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(hungUp());
    };
    const timer = setTimeout(() => {
      signal.removeEventListener('abort', stop);
      resolve();
    }, delay_ms);
    signal.addEventListener('abort', stop, { once: true });
  });
}
