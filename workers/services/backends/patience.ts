/** How long a request may wait for its answer's first byte: the edge's bound, or less when its client says so. */
import { BACKEND_HEADERS } from '../../../shared/backends.ts';
import { MaskrouteError } from '../../../shared/errors.ts';

/** @throws MaskrouteError `invalid_request` when the header is no number of milliseconds. */
export function patience_ms(header: string | undefined, most_ms: number): number {
  if (header === undefined) return most_ms;
  if (!/^[1-9]\d{0,8}$/.test(header)) {
    const name = BACKEND_HEADERS.deadline;
    throw new MaskrouteError('invalid_request', `${name}: expected milliseconds.`, { param: name });
  }
  return Math.min(Number(header), most_ms);
}
