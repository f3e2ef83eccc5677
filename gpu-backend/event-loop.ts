/** Turns of the event loop. Work that comes all at once delays every answer if it is done in one turn. */
import { setImmediate } from 'node:timers/promises';

/** Resolves in a turn of the event loop of its own, after all earlier calls. */
export type Turn = () => Promise<void>;

/** Resolves in the next turn of the event loop. */
export const nextTurn = (): Promise<void> => setImmediate();

/** @returns a function whose calls resolve in order, each in its own turn of the event loop. */
export function turnQueue(): Turn {
  let last: Promise<void> = Promise.resolve();
  return () => {
    last = last.then(nextTurn);
    return last;
  };
}

/*
 * Long work as a generator that yields between its pieces: its caller decides whether they share a turn.
 */

/** Runs all steps at once. */
export function finish<Result>(steps: Generator<unknown, Result>): Result {
  for (;;) {
    const step = steps.next();
    if (step.done) return step.value;
  }
}

/** Runs each step in its own turn, so that Ctrl-C and timers are heard. Rejects when `signal` aborts. */
export async function finishInTurns<Result>(
  steps: Generator<unknown, Result>,
  signal: AbortSignal | undefined,
): Promise<Result> {
  for (;;) {
    const step = steps.next();
    if (step.done) return step.value;
    await nextTurn();
    signal?.throwIfAborted();
  }
}
