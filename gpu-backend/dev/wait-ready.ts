/** Waits until a server says by `/readyz` that it is ready. */
import { setTimeout as sleep } from 'node:timers/promises';
import { MaskrouteError } from '../../shared/errors.ts';

const POLL_ms = 50;
const ANSWER_TIMEOUT_ms = 5000;
const REASON_CHARS_MAX = 500;

/** @throws MaskrouteError `start_failed` with the last answer when `limit_ms` pass; the reason of `signal`. */
export async function waitReady(url: string, limit_ms: number, signal: AbortSignal): Promise<void> {
  const deadline_ms = performance.now() + limit_ms;
  for (;;) {
    const answer = await ask(`${url}/readyz`);
    if (answer === 'ready') return;
    if (performance.now() > deadline_ms) {
      throw new MaskrouteError('start_failed', `${url} is not ready after ${limit_ms / 1000} s: ${answer}`);
    }
    await sleep(POLL_ms, undefined, { signal });
  }
}

async function ask(url: string): Promise<string> {
  try {
    const response = await fetch(url, { signal: AbortSignal.timeout(ANSWER_TIMEOUT_ms) });
    const text = await response.text();
    return response.ok ? 'ready' : text.slice(0, REASON_CHARS_MAX);
  } catch (error) {
    return String((error as Error).cause ?? error);
  }
}
