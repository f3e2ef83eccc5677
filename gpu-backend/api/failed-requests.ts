/**
 * Requests that made the engine fail. After the second time the same request is refused: a client that asks again and again
 * takes no step from others. Backends behind one edge each learn it for themselves, and the edge blames none for it.
 */
import { createHash } from 'node:crypto';
import { LRUCache } from 'lru-cache';
import { MaskrouteError } from '../../shared/wire/errors.ts';

const REMEMBERED_MAX = 1000;
/** It was the machine, perhaps: after this long a request may try again. */
const REMEMBERED_ms = 10 * 60_000;
const FAILURES_MAX = 2;

export class FailedRequests {
  /** How often each has failed, by the hash of who asks what. */
  readonly #failures = new LRUCache<string, number>({ max: REMEMBERED_MAX, ttl: REMEMBERED_ms });

  /** @throws MaskrouteError `request_fails_engine`. */
  expectHarmless(request: object): void {
    // Nothing failed lately: most of the time no hash is made.
    if (this.#failures.size === 0) return;
    if ((this.#failures.get(hashOf(request)) ?? 0) < FAILURES_MAX) return;
    throw new MaskrouteError(
      'request_fails_engine',
      'This request made the engine fail twice; it is not run again.',
    );
  }

  failed(request: object): void {
    const hash = hashOf(request);
    this.#failures.set(hash, (this.#failures.get(hash) ?? 0) + 1);
  }

  succeeded(request: object): void {
    if (this.#failures.size > 0) this.#failures.delete(hashOf(request));
  }
}

/** Without what the edge adds to each anew. */
function hashOf(request: object): string {
  const text = JSON.stringify({ ...request, maskroute: undefined });
  return createHash('sha256').update(text).digest('base64');
}
