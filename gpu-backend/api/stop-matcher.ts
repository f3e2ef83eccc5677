/**
 * Stop strings in a stream of text. Text that could still become a stop string is held back, so no part of
 * one is ever shown; the result does not depend on how the text was cut into pieces.
 */
export type StopMatcher = {
  /** `text` may be shown now. After `stopped`, nothing more comes. */
  push(piece: string): { readonly text: string; readonly stopped: boolean };
  /** What was held back, when the stream ends without a stop string. */
  flush(): string;
};

export function createStopMatcher(stops: readonly string[]): StopMatcher {
  let held = '';
  return {
    push(piece) {
      held += piece;
      const cut = firstCompleted(held, stops);
      const stopped = cut !== undefined;
      const shown = cut ?? held.length - heldBack(held, stops);
      const text = held.slice(0, shown);
      held = stopped ? '' : held.slice(shown);
      return { text, stopped };
    },
    flush() {
      const text = held;
      held = '';
      return text;
    },
  };
}

/** Where the stop string that is complete first begins: what a reader of single characters would find. */
function firstCompleted(text: string, stops: readonly string[]): number | undefined {
  let start: number | undefined;
  let endMin = Number.POSITIVE_INFINITY;
  for (const stop of stops) {
    const index = text.indexOf(stop);
    const end = index + stop.length;
    if (index < 0 || end > endMin || (end === endMin && index >= start!)) continue;
    start = index;
    endMin = end;
  }
  return start;
}

/** The length of the longest end of `text` that begins a stop string. */
function heldBack(text: string, stops: readonly string[]): number {
  let longest = 0;
  for (const stop of stops) {
    for (let length = Math.min(stop.length - 1, text.length); length > longest; length--) {
      if (text.endsWith(stop.slice(0, length))) longest = length;
    }
  }
  return longest;
}
