/** Turns of the event loop. Work that comes all at once delays every answer if it is done in one turn. */
import { setImmediate as nextTurn } from 'node:timers/promises';

/** Resolves in a turn of the event loop of its own, after all earlier calls. */
export type Turn = () => Promise<void>;

/** @returns a function whose calls resolve in order, each in its own turn of the event loop. */
export function turnQueue(): Turn {
  let last: Promise<void> = Promise.resolve();
  return () => {
    last = last.then(() => nextTurn());
    return last;
  };
}
