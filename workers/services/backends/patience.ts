/** How long a request may wait for its answer's first byte: the edge's bound, or less when its client says so. */
import { BACKEND_HEADERS } from '../../../shared/backends.ts';
import { MaskrouteError } from '../../../shared/errors.ts';

export type Patience = {
  readonly time_ms: number;
  /** The client gives less time than the edge would: that it ran out is the client's doing, and nobody else's. */
  readonly isShort: boolean;
};

/** @throws MaskrouteError `invalid_request` when the header is no number of milliseconds. */
export function patienceOf(header: string | undefined, most_ms: number): Patience {
  if (header === undefined) return { time_ms: most_ms, isShort: false };
  if (!/^[1-9]\d{0,8}$/.test(header)) {
    const name = BACKEND_HEADERS.deadline;
    throw new MaskrouteError('invalid_request', `${name}: expected milliseconds.`, { param: name });
  }
  const time_ms = Math.min(Number(header), most_ms);
  return { time_ms, isShort: time_ms < most_ms };
}
