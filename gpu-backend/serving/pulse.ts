/**
 * Whether a thread still answers. It is asked by whoever looks, so an engine that nobody looks at pays nothing; a thread
 * that is stuck in native code throws nothing and ends nothing, and is known by its silence alone.
 */

export type Pulse = {
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
