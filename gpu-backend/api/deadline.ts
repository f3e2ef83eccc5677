/** How long a caller waits for the first byte: what comes later would be computed for nobody. */
import { BACKEND_HEADERS } from '../../shared/backends.ts';
import { MaskrouteError } from '../../shared/errors.ts';

/** Timers take no more; nobody waits for weeks. */
const MOST_ms = 2 ** 31 - 1;

/** Undefined without the header. @throws MaskrouteError `invalid_request` when it is no number of milliseconds. */
export function deadline_ms(header: string | undefined): number | undefined {
  if (header === undefined) return undefined;
  const name = BACKEND_HEADERS.deadline;
  if (!/^[1-9]\d{0,15}$/.test(header)) {
    throw new MaskrouteError('invalid_request', `${name}: expected milliseconds.`, { param: name });
  }
  return Math.min(Number(header), MOST_ms);
}

export const deadlineExceeded = (after_ms: number): MaskrouteError =>
  new MaskrouteError(
    'deadline_exceeded',
    `There was no answer within the ${after_ms} ms that the caller has.`,
  );
