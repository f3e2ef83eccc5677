/**
 * Signals that ask this process to end. A Ctrl-C often comes twice: the terminal sends it to all of its processes, and npm, or an
 * older Node that handed over (`bin/maskroute.js`), passes on what it got. The second one is no second wish.
 */

/** In this time after the first, the same signal is the same wish. */
const REPEATED_WITHIN_ms = 1000;

/**
 * Calls `stop` once, at the first of them. The same signal later again ends the process at once. Call the result to listen no more,
 * unless one has come: its second may still be on the way, while the process ends.
 */
export function onStopSignal(
  stop: () => void,
  signals: readonly NodeJS.Signals[] = ['SIGINT', 'SIGTERM'],
): () => void {
  const firstAt_ms = new Map<NodeJS.Signals, number>();
  const hear = (signal: NodeJS.Signals) => {
    const first_ms = firstAt_ms.get(signal);
    if (first_ms === undefined) {
      firstAt_ms.set(signal, performance.now());
      if (firstAt_ms.size === 1) stop();
    } else if (performance.now() - first_ms > REPEATED_WITHIN_ms) {
      process.removeListener(signal, hear);
      process.kill(process.pid, signal);
    }
  };
  for (const signal of signals) process.on(signal, hear);
  return () => {
    if (firstAt_ms.size > 0) return;
    for (const signal of signals) process.removeListener(signal, hear);
  };
}
