/**
 * Handles SIGINT and SIGTERM. One Ctrl-C often arrives twice: the terminal signals all its processes, and npm, or the Node
 * that started this one (`bin/maskroute.js`), forwards its own signal. Such a duplicate must not count as a second Ctrl-C.
 */

/** A repetition of a signal within this time after the first is a duplicate. */
const REPEATED_WITHIN_ms = 1000;

/**
 * Calls `stop` once, at the first signal. The same signal again, later, ends the process at once.
 * @returns a function that removes the handlers; after the first signal it does nothing, as a duplicate may still come.
 */
export function onStopSignal(
  stop: () => void,
  signals: readonly NodeJS.Signals[] = ['SIGINT', 'SIGTERM'],
): () => void {
  const firstAt_ms = new Map<NodeJS.Signals, number>();
  const handle = (signal: NodeJS.Signals) => {
    const first_ms = firstAt_ms.get(signal);
    if (first_ms === undefined) {
      firstAt_ms.set(signal, performance.now());
      if (firstAt_ms.size === 1) stop();
    } else if (performance.now() - first_ms > REPEATED_WITHIN_ms) {
      process.removeListener(signal, handle);
      process.kill(process.pid, signal);
    }
  };
  for (const signal of signals) process.on(signal, handle);
  return () => {
    if (firstAt_ms.size > 0) return;
    for (const signal of signals) process.removeListener(signal, handle);
  };
}
