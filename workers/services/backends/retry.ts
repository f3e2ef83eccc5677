/** How long to wait before a backend is asked again: exponential, with a little jitter so that callers spread. */
import { MaskrouteError } from '../../../shared/errors.ts';

export const RETRY = { attemptsMax: 5, first_ms: 50, max_ms: 5_000, factor: 2, jitter: 0.1 } as const;

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
