/** Which completions are under way, so that a stop can wait for them, and after a while end them. */
import { MaskrouteError } from '../../shared/errors.ts';

export type Lifecycle = {
  readonly draining: boolean;
  readonly running: number;
  /** Aborts when the drain begins: what only waits for news has none to wait for. */
  readonly stopping: AbortSignal;
  /** Call the result once the answer has ended, however it did. */
  begin(abort: AbortController): () => void;
  /** Refuses new completions from now on; resolves when none runs, ending them after `limit_ms`, or `ending_ms` later. */
  drain(limit_ms: number, ending_ms: number): Promise<void>;
};

export function createLifecycle(): Lifecycle {
  const running = new Set<AbortController>();
  const idle: (() => void)[] = [];
  const stopping = new AbortController();
  let draining = false;
  return {
    get draining() {
      return draining;
    },
    get running() {
      return running.size;
    },
    stopping: stopping.signal,
    begin(abort) {
      running.add(abort);
      return () => {
        running.delete(abort);
        if (running.size === 0) for (const resolve of idle.splice(0)) resolve();
      };
    },
    async drain(limit_ms, ending_ms) {
      draining = true;
      stopping.abort();
      if (running.size === 0) return;
      const done = new Promise<void>((resolve) => idle.push(resolve));
      const shutDown = new MaskrouteError('not_ready', 'The server is shutting down.', { retryAfter_s: 5 });
      const end = setTimeout(() => {
        for (const abort of running) abort.abort(shutDown);
      }, limit_ms);
      const giveUp = setTimeout(() => {
        for (const resolve of idle.splice(0)) resolve();
      }, limit_ms + ending_ms);
      await done;
      clearTimeout(end);
      clearTimeout(giveUp);
    },
  };
}
