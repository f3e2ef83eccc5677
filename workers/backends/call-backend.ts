/**
 * One request's way through the backends: the best one is asked, the next if it fails, until the first byte of an
 * answer. From then on nothing is asked again. The way ends with the caller's time, with the client's patience
 * (`signal`), or after a few attempts.
 */
import type { StickySource } from '../../shared/mask/sticky.ts';
import { BACKEND_HEADERS, type BackendAffinity, parseLoad } from '../../shared/wire/backend-load.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { LOCAL_REGION } from '../base/place.ts';
import type { RequestTrace } from '../base/telemetry.ts';
import type { Hold } from '../base/waiting.ts';
import { attempt, type BackendRequest, type Outcome, type Rest, type Send, unreachable } from './attempt.ts';
import type { Breaker, KnownBackend, LiveBackend, Observed } from './backend-state.ts';
import { affinityOf, type Candidate, homeOf, orderBackends, pagesKey, type Wish } from './choose.ts';

export type Call = {
  readonly request: BackendRequest;
  readonly purpose: Purpose;
  readonly time: CallTime;
  readonly retries: Retries;
  readonly signal: AbortSignal;
  readonly trace?: RequestTrace;
  readonly hold: Hold;
};

export type Purpose =
  | {
      readonly kind: 'completion';
      readonly region: string;
      readonly model: string;
      /** Its id, or what else names it. */
      readonly mask: string;
      readonly conversation: StickySource;
    }
  /** What comes of it says nothing of how completions fare, so that no breaker hears of it. */
  | { readonly kind: 'aside'; readonly region: string | undefined };

type CallTime = {
  /** Until the first byte of the answer, all attempts together. */
  readonly timeout_ms: number;
  /** That is all that the edge ever waits, and not what a client or a task behind requests gives it. */
  readonly isFullTime: boolean;
  /** A backend that is silent for so long is given up for the next one, where there is one. */
  readonly silence_ms?: number | undefined;
  /** As an attempt's. */
  readonly stall_ms?: number;
};

/**
 * How often a backend may still be asked after one failed. Whoever holds it sets 0 when what fails now fails for good (a
 * byte has gone to the client).
 */
export type Retries = { left: number };
export const RETRIES_MAX = 4;

export type Answer = {
  readonly response: Response;
  readonly backend: string;
  /** Undefined where there is one backend. */
  readonly affinity: BackendAffinity | undefined;
  /** Undefined for a stream, a large answer or an error. */
  readonly rest: Rest | undefined;
};

/** `gaveUp`: a backend was given up in silence, so it may have worked on the request, whatever came of it. */
export type Called = { readonly gaveUp: boolean } & (
  | ({ readonly kind: 'answer' } & Answer)
  | { readonly kind: 'error'; readonly error: MaskrouteError }
);

export type CallParts = {
  readonly send: Send;
  /** A token for one attempt at one backend. */
  readonly token: (request: BackendRequest, backend: LiveBackend) => Promise<string>;
  /** Asks a backend that let a whole answer's time pass for its load: it may only be busy. If it is gone, it is blamed. */
  readonly suspect: (backend: KnownBackend) => Promise<void>;
  /** A second backend is asked when the first is silent for so long; 0: never. */
  readonly hedge_ms: number;
};

/**
 * The answer, its body unread when it is a success; or `backend_unreachable` when no backend can be reached,
 * `deadline_exceeded` when none answers in time, `backend_error` when the answer does not keep to the protocol.
 * @throws MaskrouteError `cancelled` when `signal` aborts.
 */
export async function callBackend(
  parts: CallParts,
  call: Call,
  backends: readonly KnownBackend[],
): Promise<Called> {
  const way = new Way(parts, call, backends);
  for (;;) {
    const outcome = await way.next();
    if (outcome.kind === 'cancelled') throw hungUp();
    const isOver = outcome.kind === 'answer' || call.retries.left <= 0 || way.left_ms() <= 0;
    const step = isOver ? 'none' : way.peek();
    if (step === 'none') return { ...lastWord(outcome, call.time), gaveUp: way.gaveUp };
    call.retries.left--;
    // Another backend is asked at once; the same one after a pause.
    if (step === 'same') {
      const delay_ms = retryDelay_ms(way.again(), Math.random());
      await pause(Math.min(delay_ms, way.left_ms()), call.signal);
    }
  }
}

type Tried = Outcome & {
  readonly backend: string;
  readonly affinity: BackendAffinity | undefined;
  /** All of the caller's time that was left was for this attempt. */
  readonly hadAll: boolean;
};

/** What hears how a call went. */
type Listener = Pick<Breaker, 'succeeded' | 'failed' | 'released'>;
const DEAF: Listener = { succeeded() {}, failed() {}, released() {} };

/** Which backends were asked, what they said, and who is next. */
class Way {
  /** A backend was given up in silence. */
  gaveUp = false;
  readonly #parts: CallParts;
  readonly #call: Call;
  readonly #isAside: boolean;
  readonly #backends: readonly KnownBackend[];
  readonly #wish: Wish;
  /** The conversation's own backend. */
  readonly #home: string | undefined;
  #isHomeFull = false;
  readonly #started_ms = Date.now();
  /** How often, by id. */
  readonly #asked = new Map<string, number>();
  /** They would say the same again. */
  readonly #done = new Set<string>();
  /** A request blames a backend once, however often it tries: one bad request must not open a breaker. */
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

  left_ms(): number {
    return this.#call.time.timeout_ms - (Date.now() - this.#started_ms);
  }

  /** Attempts at backends that had been asked before. */
  again(): number {
    return [...this.#asked.values()].reduce((sum, times) => sum + times - 1, 0);
  }

  peek(): 'none' | 'other' | 'same' {
    const [first] = this.#open();
    return first === undefined ? 'none' : this.#asked.has(first.id) ? 'same' : 'other';
  }

  async next(): Promise<Tried> {
    const now_ms = Date.now();
    const open = this.#open();
    const [first, second] = open;
    if (first === undefined || !this.#mayAsk(first, now_ms)) {
      this.#last ??= { ...this.#nobody(now_ms), backend: '', affinity: undefined, hadAll: false };
      return this.#last;
    }
    this.#isHomeFull ||=
      first.id !== this.#home && open.some((backend) => this.#isPassedOver(backend, now_ms));
    // Nobody who may still answer is given up for a backend that would not.
    const fresh =
      second !== undefined && !this.#asked.has(second.id) && !second.seen.isAway(now_ms) ? second : undefined;
    this.#last = await hedged(
      (signal) => this.#ask(first, signal, fresh !== undefined),
      // A hedge takes no half-open backend's one trial.
      fresh && fresh.seen.breaker.state(now_ms) === 'closed'
        ? (signal) => this.#ask(fresh, signal, false)
        : undefined,
      this.#parts.hedge_ms,
      this.#call.signal,
    );
    return this.#last;
  }

  /** Those that may be asked now, the best first: the untried before the tried. */
  #open(): KnownBackend[] {
    const now_ms = Date.now();
    const usable = this.#backends.filter(
      ({ id, seen }) => !this.#done.has(id) && seen.breaker.admits(now_ms),
    );
    const timesAsked = ({ id }: KnownBackend) => this.#asked.get(id) ?? 0;
    return orderBackends(usable.map(candidateOf), this.#wish)
      .map(({ backend }) => backend)
      .sort((a, b) => timesAsked(a) - timesAsked(b));
  }

  /** Nothing but its load speaks against the conversation's own backend. */
  #isPassedOver({ id, seen }: KnownBackend, now_ms: number): boolean {
    return id === this.#home && !this.#asked.has(id) && !seen.isAway(now_ms);
  }

  #mayAsk({ seen: { breaker } }: KnownBackend, now_ms: number): boolean {
    return this.#isAside ? breaker.admits(now_ms) : breaker.admit(now_ms);
  }

  #nobody(now_ms: number): Outcome {
    const waits_ms = this.#backends.map(({ seen }) => seen.breaker.wait_ms(now_ms));
    const wait_ms = Math.min(...waits_ms);
    const retryAfter_s = Number.isFinite(wait_ms) ? Math.max(1, Math.ceil(wait_ms / 1000)) : 1;
    return { kind: 'failed', error: unreachable(undefined, retryAfter_s), again: false };
  }

  async #ask(backend: KnownBackend, signal: AbortSignal, hasOthers: boolean): Promise<Tried> {
    const { send, token: sign } = this.#parts;
    const { request, time } = this.#call;
    const { id, url, seen } = backend;
    this.#asked.set(id, (this.#asked.get(id) ?? 0) + 1);
    const token = await sign(request, backend);
    const wasDraining = seen.isDraining(Date.now());
    const left_ms = Math.max(1, this.left_ms());
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

  #learnState(outcome: Outcome, seen: Observed, wasDraining: boolean): void {
    if (outcome.kind !== 'answer' && outcome.kind !== 'refused') return;
    const load = parseLoad(outcome.response.headers.get(BACKEND_HEADERS.load));
    if (load !== undefined) seen.reported(load, Date.now());
    if (outcome.kind === 'refused') {
      if (outcome.why === 'stopping') seen.drains(true, Date.now());
      // What had been under way before says nothing: a backend that drains finishes it.
    } else if (wasDraining && !this.#isAside) seen.drains(false, Date.now());
  }

  #learnHealth(outcome: Outcome, backend: KnownBackend, breaker: Listener): void {
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
        this.gaveUp = true;
        // Backends send the headers of a stream early. A whole answer may take longer than its caller waits.
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
    else breaker.failed(Date.now(), isUnreachable);
    this.#blamed.add(id);
  }
}

function candidateOf(backend: KnownBackend): Candidate & { readonly backend: KnownBackend } {
  const { id, regions, weight, seen } = backend;
  const now_ms = Date.now();
  const [load, waiting, isAway] = [seen.load(now_ms), seen.waiting(now_ms), seen.isAway(now_ms)];
  return { backend, id, regions, weight, load, waiting, isAway, models: seen.models };
}

const sum = (counts: Iterable<number>): number => [...counts].reduce((total, count) => total + count, 0);

/** Where there is no choice, nothing is hashed. */
function wishOf(purpose: Purpose, tenant: string, isChoice: boolean): Wish {
  if (purpose.kind === 'aside') {
    return { region: purpose.region ?? LOCAL_REGION, model: undefined, key: '' };
  }
  const { region, model, mask, conversation } = purpose;
  return { region, model, key: isChoice ? pagesKey(tenant, mask, conversation) : '' };
}

/** The backend that a conversation has while all are well and idle; undefined without a choice. */
export const homeBackend = (
  backends: readonly KnownBackend[],
  purpose: Purpose,
  tenant: string,
): string | undefined => homeOf(backends.map(candidateOf), wishOf(purpose, tenant, backends.length > 1));

/** What the client is told when nobody else is asked. */
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
 * Hedging: a second backend is asked when the first has been silent for a while, and the first answer wins; the loser is
 * called off at once. It costs work done twice, so it is off unless configured.
 *
 * `after_ms` 0, or no `second`: plainly the first. A failure counts only when nobody else can still answer.
 */
export async function hedged<T extends Outcome>(
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
  clearTimeout(timer ?? null);
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

/**
 * How long to wait before a backend is asked again: exponential, with a little jitter so that callers spread.
 * `retry` counts from 0; `random` is in [0, 1).
 */
export function retryDelay_ms(retry: number, random: number): number {
  const delay_ms = Math.min(RETRY.first_ms * RETRY.factor ** retry, RETRY.max_ms);
  return delay_ms * (1 - RETRY.jitter + 2 * RETRY.jitter * random);
}

/** @throws MaskrouteError `cancelled` as soon as `signal` aborts: a client that hung up waits for nothing. */
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
