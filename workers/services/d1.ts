/** Questions to D1 that a request has to wait for: bounded, and answered with a reason when D1 is down. */
import { MaskrouteError } from '../../shared/errors.ts';
import { D1_TIMEOUT_ms, RETRY_AFTER_s } from '../limits.ts';
import { withDeadline } from './deadline.ts';

/**
 * A write that missed the deadline may still happen. Every write here is safe to send again, a rollback if it says which
 * version it takes back.
 * @throws MaskrouteError `configuration_unavailable` when D1 fails or stalls, and errors of ours as they are.
 */
export async function d1<T>(work: Promise<T>): Promise<T> {
  try {
    return await withDeadline(work, D1_TIMEOUT_ms, 'D1');
  } catch (error) {
    if (error instanceof MaskrouteError) throw error;
    throw new MaskrouteError('configuration_unavailable', 'The database cannot be reached right now.', {
      retryAfter_s: RETRY_AFTER_s,
      cause: error,
    });
  }
}
