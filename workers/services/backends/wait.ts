/**
 * What one attempt waits for, with one timer for all of it: the headers, and then, of a small answer, the rest. A timer
 * is a fortieth of what a request costs the edge's main thread, and an `AbortController` that hears of another signal a
 * twelfth, so there is one only where it is needed.
 */

export type WaitOptions = {
  /** The caller's. */
  readonly signal: AbortSignal;
  /** For the headers. */
  readonly timeout_ms: number;
  /**
   * Whether the other side knows that time and stops by itself when it is over. If not, `signal` tells it; and what
   * nobody waits for any more else goes on until this request is over.
   */
  readonly isKnown: boolean;
  /** For what {@link Wait.rest} waits; undefined: it is not asked. */
  readonly rest_ms: number | undefined;
};

export interface Wait {
  /** For the request that is waited for. */
  readonly signal: AbortSignal;
  /** What `work` gives. @throws LateError after `timeout_ms`, and what `work` throws. */
  headers<T>(work: Promise<T>): Promise<T>;
  /** What `work` gives. @throws LateError after `rest_ms` from now, and what `work` throws. The wait ends with it. */
  rest<T>(work: Promise<T>): Promise<T>;
  /** Nothing more is waited for. */
  end(): void;
}

export class LateError extends Error {}

export function startWait({ signal, timeout_ms, isKnown, rest_ms }: WaitOptions): Wait {
  const controller = isKnown ? undefined : controlledBy(signal);
  let until_ms = Date.now() + timeout_ms;
  let giveUp = (_error: LateError): void => {};
  const inTime = <T>(work: Promise<T>): Promise<T> =>
    new Promise((resolve, reject) => {
      giveUp = reject;
      work.then(resolve, reject);
    });

  const look = (): void => {
    const left_ms = until_ms - Date.now();
    if (left_ms > 0) {
      timer = setTimeout(look, Math.min(left_ms, every_ms));
      return;
    }
    giveUp(new LateError());
    controller?.abort();
  };
  // Often enough for either wait: one that begins in between is looked at before it is over, and again when it is.
  const every_ms = Math.min(timeout_ms, rest_ms ?? timeout_ms);
  let timer = setTimeout(look, every_ms);
  const end = (): void => clearTimeout(timer);

  return {
    signal: controller?.signal ?? signal,
    headers: inTime,
    async rest(work) {
      until_ms = Date.now() + rest_ms!;
      try {
        return await inTime(work);
      } finally {
        end();
      }
    },
    end,
  };
}

/** Aborts with `signal`, too. `AbortSignal.any` of two takes the runtime a good deal longer to make. */
function controlledBy(signal: AbortSignal): AbortController {
  const controller = new AbortController();
  if (signal.aborted) controller.abort(signal.reason);
  else signal.addEventListener('abort', () => controller.abort(signal.reason), { once: true });
  return controller;
}
