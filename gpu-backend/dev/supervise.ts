/** Keeps a child running: one that dies is started again on its old port, later each time that it dies soon. */
import { setTimeout as sleep } from 'node:timers/promises';
import { type Child, type ChildOptions, startChild } from './child.ts';

const RESTART_DELAY_ms = { first: 250, max: 10_000 };
/** A child that ran this long starts again with the first delay. */
const STEADY_ms = 60_000;

export type Supervised = {
  readonly url: string;
  /** See {@link Child}. One that is down has nothing to drain. */
  drain(limit_ms: number): Promise<void>;
  stop(limit_ms: number): Promise<void>;
};

/**
 * The first start must succeed; later ones are tried until {@link Supervised.stop}.
 * `say` gets one line whenever the child died or came back.
 */
export async function supervise<Config extends { readonly port: number }>(
  options: ChildOptions<Config>,
  say: (line: string) => void,
): Promise<Supervised> {
  let child: Child | undefined = await startChild(options);
  const { url } = child;
  const port = Number(new URL(url).port);
  const stopping = new AbortController();

  const keepRunning = async () => {
    let delay_ms = RESTART_DELAY_ms.first;
    while (child !== undefined) {
      const started_ms = performance.now();
      const reason = await child.ended;
      if (stopping.signal.aborted) return;
      if (performance.now() - started_ms > STEADY_ms) delay_ms = RESTART_DELAY_ms.first;
      say(`The ${options.name} ended (${reason}); starting it again. Its log: ${options.logFile}`);
      child = undefined;
      while (child === undefined) {
        await sleep(delay_ms, undefined, { signal: stopping.signal }).catch(() => undefined);
        if (stopping.signal.aborted) return;
        delay_ms = Math.min(delay_ms * 2, RESTART_DELAY_ms.max);
        child = await startChild({ ...options, config: { ...options.config, port } }).catch(
          (error: Error) => {
            say(`The ${options.name} does not start: ${error.message}`);
            return undefined;
          },
        );
        if (stopping.signal.aborted) return child?.stop(0);
      }
      say(`The ${options.name} runs again.`);
    }
  };
  const kept = keepRunning();
  return {
    url,
    async drain(limit_ms) {
      await child?.drain(limit_ms);
    },
    async stop(limit_ms) {
      stopping.abort();
      await child?.stop(limit_ms);
      await kept;
    },
  };
}
