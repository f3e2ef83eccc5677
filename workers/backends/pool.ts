/**
 * All backends behind one `call`: the best one is asked, the next if it fails, until the first byte of an answer.
 * From then on nothing is asked again. There is one loop of attempts, and it ends with the caller's time, with the
 * client's patience (`signal`), or after a few attempts.
 */

import { DENSE_MASK_ID } from '../../shared/mask/mask.ts';
import { BACKEND_HEADERS, parseLoad } from '../../shared/wire/backend-load.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import type { Hold } from '../base/waiting.ts';
import { attempt, type BackendRequest, type Outcome, type Rest, unreachable } from './attempt.ts';
import type { Breaker, LiveBackend, Observed } from './backend-state.ts';
import type { Send } from './call-backend.ts';
import { orderBackends, type Wish } from './choose.ts';

/*
 * Hedging: a second backend is asked when the first has been silent for a while, and the first answer wins. It
 * costs work done twice, so it is off unless configured; a loser is called off at once.
 */

type Ask<T> = (signal: AbortSignal) => Promise<T>;

/** `after_ms` 0, or no `second`: plainly the first. A failure counts only when nobody else can still answer. */
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

/* How long to wait before a backend is asked again: exponential, with a little jitter so that callers spread. */

const RETRY = { attemptsMax: 5, first_ms: 50, max_ms: 5_000, factor: 2, jitter: 0.1 } as const;

/** `retry` counts from 0; `random` is in [0, 1). */
export function retryDelay_ms(retry: number, random: number): number {
  const delay_ms = Math.min(RETRY.first_ms * RETRY.factor ** retry, RETRY.max_ms);
  return delay_ms * (1 - RETRY.jitter + 2 * RETRY.jitter * random);
}

/** @throws MaskrouteError `cancelled` as soon as `signal` aborts: a client that hung up waits for nothing. */
export async function pause(delay_ms: number, signal: AbortSignal): Promise<void> {
  const hungUp = () => new MaskrouteError('cancelled', 'The client hung up.');
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

type PoolRequest = BackendRequest & {
  /** Absent: any backend. */
  readonly wish?: Wish;
  /** A backend that is silent for so long is given up for the next one, where there is one. */
  readonly silence_ms?: number;
  /** `timeout_ms` is all that the edge ever waits, and not what a client or a task behind requests gives it. */
  readonly isFullTime?: boolean;
  /** No completion: what comes of it says nothing of how completions fare, so that no breaker hears of it. */
  readonly isAside?: boolean;
  /** A backend was given up in silence: it may have worked on the request. */
  readonly onLate?: () => void;
  /** False: what fails now fails for good (a byte has gone to the client). */
  readonly mayRetry?: () => boolean;
  readonly hold: Hold;
};

type Answer = {
  readonly response: Response;
  readonly backend: string;
  /** Undefined for a stream, a large answer or an error. */
  readonly rest: Rest | undefined;
};

export interface Backends {
  /**
   * The answer, its body unread when it is a success.
   * @throws MaskrouteError `backend_unreachable` when there is no answer, `deadline_exceeded` when there is none
   * in a time that is not the edge's own, `backend_error` when the answer is none of the protocol's, `cancelled`
   * when `signal` aborts.
   */
  call(request: PoolRequest): Promise<Answer>;
}

type PoolParts = {
  readonly send: Send;
  readonly list: (hold: Hold) => Promise<readonly LiveBackend[]>;
  readonly observed: (id: string) => Observed;
  /** A token for one attempt at one backend. */
  readonly token: (request: BackendRequest, backend: LiveBackend) => Promise<string>;
  /** Asks for the loads that are old, behind the request. */
  readonly refresh: (backends: readonly LiveBackend[], hold: Hold) => void;
  /** Asks one that let a whole answer's time pass for its load: it may only be busy. If it is gone, it is blamed. */
  readonly suspect: (backend: LiveBackend) => Promise<void>;
  /** A second backend is asked when the first is silent for so long; 0: never. */
  readonly hedge_ms: number;
  readonly random?: () => number;
};

const ANY: Wish = { region: 'local', mask: DENSE_MASK_ID, model: undefined };

export function createBackends(parts: PoolParts): Backends {
  const { random = Math.random } = parts;
  return {
    async call(request) {
      const backends = await parts.list(request.hold);
      parts.refresh(backends, request.hold);
      const run = startRun(parts, request, backends);
      for (let attempts = 1; ; attempts++) {
        const outcome = await run.next();
        switch (outcome.kind) {
          case 'answer':
            return outcome;
          case 'cancelled':
            throw new MaskrouteError('cancelled', 'The client hung up.');
          case 'refused':
          case 'failed':
          case 'late':
        }
        const retry = run.retries();
        const mayGoOn = attempts < RETRY.attemptsMax && request.mayRetry?.() !== false && run.left_ms() > 0;
        const step = mayGoOn ? run.peek() : 'none';
        if (step === 'none') return run.lastWord();
        // Another backend is asked at once; the same one after a pause.
        if (step === 'same')
          await pause(Math.min(retryDelay_ms(retry, random()), run.left_ms()), request.signal);
      }
    },
  };
}

type Listener = Pick<Breaker, 'succeeded' | 'failed' | 'released'>;
const DEAF: Listener = { succeeded() {}, failed() {}, released() {} };

/** `hadAll`: all of the caller's time that was left was for this attempt. */
type Tried = Outcome & { readonly backend: string; readonly hadAll: boolean };

/** One request's way through the backends: which were asked, what they said, who is next. */
function startRun(parts: PoolParts, request: PoolRequest, backends: readonly LiveBackend[]) {
  const started_ms = Date.now();
  const wish = request.wish ?? ANY;
  const asked = new Map<string, number>();
  /** They would say the same again. */
  const done = new Set<string>();
  /** A request blames a backend once, however often it tries: one bad request must not open a breaker. */
  const blamed = new Set<string>();
  let last: Tried | undefined;

  const left_ms = (): number => request.timeout_ms - (Date.now() - started_ms);

  /** Those that may be asked now, the best first: the untried before the tried. */
  const open = (): LiveBackend[] => {
    const now_ms = Date.now();
    const usable = backends
      .filter(({ id }) => !done.has(id) && parts.observed(id).breaker.admits(now_ms))
      .map((backend) => {
        const seen = parts.observed(backend.id);
        return {
          backend,
          ...backend,
          load: seen.load,
          waiting: seen.waiting,
          isHot: seen.isHot,
          isDraining: seen.isDraining,
          models: seen.models,
        };
      });
    const order = orderBackends(usable, wish).map(({ backend }) => backend);
    return order.sort((a, b) => (asked.get(a.id) ?? 0) - (asked.get(b.id) ?? 0));
  };

  const mayAsk = (id: string, now_ms: number): boolean => {
    const { breaker } = parts.observed(id);
    return request.isAside === true ? breaker.admits(now_ms) : breaker.admit(now_ms);
  };

  const ask = async (backend: LiveBackend, signal: AbortSignal, others: boolean): Promise<Tried> => {
    const { id, url } = backend;
    const seen = parts.observed(id);
    asked.set(id, (asked.get(id) ?? 0) + 1);
    const token = await parts.token(request, backend);
    const wasDraining = seen.isDraining;
    const end = request.isAside === true ? () => {} : seen.begin(wish.mask);
    const time_ms = Math.max(1, left_ms());
    const timeout_ms = others ? Math.min(time_ms, request.silence_ms ?? time_ms) : time_ms;
    const outcome = await attempt({
      ...{ send: parts.send, url, token, request, signal },
      ...{ timeout_ms, left_ms: time_ms },
    }).finally(end);
    if (outcome.kind === 'answer' || outcome.kind === 'refused') {
      const load = parseLoad(outcome.response.headers.get(BACKEND_HEADERS.load));
      if (load !== undefined) seen.reported(load, Date.now());
    }
    if (outcome.kind === 'refused' && outcome.why === 'stopping') seen.drains(true, Date.now());
    // What had been under way before says nothing: a backend that drains finishes it.
    else if (outcome.kind === 'answer' && wasDraining && request.isAside !== true)
      seen.drains(false, Date.now());
    learn(outcome, request.isAside === true ? DEAF : seen.breaker, backend);
    return { ...outcome, backend: id, hadAll: timeout_ms === time_ms };
  };

  const learn = (outcome: Outcome, breaker: Listener, backend: LiveBackend): void => {
    const { id } = backend;
    const blame = () => {
      if (blamed.has(id)) breaker.released();
      else breaker.failed(Date.now(), outcome.kind === 'failed' && outcome.again);
      blamed.add(id);
    };
    switch (outcome.kind) {
      case 'answer':
        breaker.succeeded();
        return;
      case 'cancelled':
        breaker.released();
        return;
      case 'refused':
        if (outcome.why !== 'stopping') done.add(id);
        if (outcome.why === 'sick') blame();
        else if (outcome.why === 'full') breaker.succeeded();
        else breaker.released();
        return;
      case 'failed':
        if (!outcome.again) done.add(id);
        blame();
        return;
      case 'late':
        done.add(id);
        request.onLate?.();
        // Backends send the headers of a stream early. A whole answer may take longer than its caller waits.
        if (outcome.waited_ms >= (request.silence_ms ?? Number.POSITIVE_INFINITY)) blame();
        else {
          breaker.released();
          if (request.isFullTime === true) request.hold(parts.suspect(backend));
        }
    }
  };

  return {
    left_ms,
    /** Attempts at backends that had been asked before. */
    retries: () => [...asked.values()].reduce((sum, times) => sum + times - 1, 0),
    peek: (): 'none' | 'other' | 'same' => {
      const [first] = open();
      return first === undefined ? 'none' : asked.has(first.id) ? 'same' : 'other';
    },
    async next(): Promise<Tried> {
      const now_ms = Date.now();
      const [first, second] = open();
      if (first === undefined || !mayAsk(first.id, now_ms)) {
        const wait_ms = Math.min(...backends.map(({ id }) => parts.observed(id).breaker.wait_ms(now_ms)));
        const retryAfter_s = Number.isFinite(wait_ms) ? Math.max(1, Math.ceil(wait_ms / 1000)) : 1;
        const error = unreachable(undefined, retryAfter_s);
        last ??= { kind: 'failed', error, again: false, backend: '', hadAll: false };
        return last;
      }
      // Nobody who may still answer is given up for one that drains: it would refuse.
      const fresh =
        second !== undefined && !asked.has(second.id) && !parts.observed(second.id).isDraining
          ? second
          : undefined;
      last = await hedged(
        (signal) => ask(first, signal, fresh !== undefined),
        // A hedge takes no half-open backend's one trial.
        fresh && parts.observed(fresh.id).breaker.state(now_ms) === 'closed'
          ? (signal) => ask(fresh, signal, false)
          : undefined,
        parts.hedge_ms,
        request.signal,
      );
      return last;
    },
    /** What the client is told when nobody is left to ask. */
    lastWord(): Answer {
      const said = last!;
      switch (said.kind) {
        case 'answer':
          return said;
        case 'refused':
          return { response: said.response, backend: said.backend, rest: undefined };
        case 'failed':
          throw said.error;
        case 'late':
          throw said.hadAll && request.isFullTime !== true
            ? new MaskrouteError('deadline_exceeded', `No answer came within ${request.timeout_ms} ms.`)
            : unreachable();
        case 'cancelled':
          throw new MaskrouteError('cancelled', 'The client hung up.');
      }
    },
  };
}
