/**
 * Receives a request's body and parses it as JSON: limited in size, strict UTF-8. `shared/wire/parse-body.ts` checks the
 * value.
 *
 * A body that is still being received takes no place in the queue. If too many are being received, the tenant with most of
 * them loses its oldest: a body sent at once is complete within milliseconds, so slow senders cannot block others.
 */
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { parseJson, piecesOf, requireUnpacked, TooLargeError } from '../../shared/wire/parse-body.ts';
import type { Turn } from '../event-loop.ts';

export type ArrivalLimits = {
  readonly bodyBytesMax: number;
  /** Bodies that are being received: most at a time, most bytes together, and the longest time for each. */
  readonly bodiesArrivingMax: number;
  readonly bytesArrivingMax: number;
  readonly bodyArrival_ms: number;
};

type Arriving = { readonly tenant: string; readonly end: AbortController; bytes: number };

export class Bodies {
  readonly #limits: ArrivalLimits;
  readonly #turn: Turn;
  /** Oldest first. */
  readonly #arriving = new Set<Arriving>();

  /** `stopping` aborts all bodies that are being received, with its reason. */
  constructor(limits: ArrivalLimits, stopping: AbortSignal, turn: Turn) {
    this.#limits = limits;
    this.#turn = turn;
    stopping.addEventListener('abort', () => {
      for (const body of this.#arriving) this.#giveUp(body, stopping.reason);
    });
  }

  /**
   * @throws MaskrouteError `unsupported_media_type`, `body_too_large`, `invalid_json` or `invalid_request`;
   * `request_timeout` when it takes too long or is dropped for others; `not_ready` when the server stops meanwhile;
   * `cancelled` when the connection closes.
   */
  async readJson(request: Request, tenant: string): Promise<unknown> {
    requireJsonType(request.headers.get('content-type'));
    requireUnpacked(request.headers);
    const bytes = await this.#receive(request, tenant);
    return parseJson(decodeUtf8(bytes));
  }

  async #receive(request: Request, tenant: string): Promise<Uint8Array> {
    const { bodiesArrivingMax, bodyArrival_ms } = this.#limits;
    const body: Arriving = { tenant, end: new AbortController(), bytes: 0 };
    const { signal } = body.end;
    const ended = new Promise<never>((_, reject) => {
      signal.addEventListener('abort', () => reject(signal.reason));
    });
    this.#arriving.add(body);
    const late = setTimeout(() => {
      this.#giveUp(body, tooSlow(`The body was not complete within ${bodyArrival_ms / 1000} s`));
    }, bodyArrival_ms);
    try {
      this.#makeRoom(bodiesArrivingMax, () => 1);
      return await Promise.race([this.#read(request, body), ended]);
    } finally {
      clearTimeout(late);
      this.#arriving.delete(body);
    }
  }

  /** Stops storing bytes when the body was given up. */
  async #read(request: Request, body: Arriving): Promise<Uint8Array> {
    const { bodyBytesMax, bytesArrivingMax } = this.#limits;
    if (Number(request.headers.get('content-length') ?? 0) > bodyBytesMax) throw tooLarge(bodyBytesMax);
    const pieces: Uint8Array[] = [];
    try {
      for await (const piece of piecesOf(request.body, bodyBytesMax)) {
        body.bytes += piece.byteLength;
        this.#makeRoom(bytesArrivingMax, (one) => one.bytes);
        body.end.signal.throwIfAborted();
        pieces.push(piece);
      }
    } catch (error) {
      if (error instanceof MaskrouteError) throw error;
      if (error instanceof TooLargeError) throw tooLarge(bodyBytesMax);
      throw new MaskrouteError('cancelled', 'The connection closed before the body was complete.', {
        cause: error,
      });
    }
    // The ends of many bodies may come at once.
    await this.#turn();
    return Buffer.concat(pieces);
  }

  /** While the sum of `amount` exceeds `max`, gives up the oldest body of the tenant with the largest sum. */
  #makeRoom(max: number, amount: (body: Arriving) => number): void {
    for (;;) {
      let all = 0;
      for (const body of this.#arriving) all += amount(body);
      if (all <= max) return;
      const sums = new Map<string, number>();
      for (const body of this.#arriving) sums.set(body.tenant, (sums.get(body.tenant) ?? 0) + amount(body));
      const most = Math.max(...sums.values());
      const oldest = [...this.#arriving].find(({ tenant }) => sums.get(tenant) === most)!;
      this.#giveUp(oldest, tooSlow('Too many requests are being received, and this one is the oldest'));
    }
  }

  #giveUp(body: Arriving, error: MaskrouteError): void {
    this.#arriving.delete(body);
    body.end.abort(error);
  }
}

const tooLarge = (bytesMax: number): MaskrouteError =>
  new MaskrouteError('body_too_large', `The body is over the limit of ${bytesMax} bytes.`);

const tooSlow = (why: string): MaskrouteError =>
  new MaskrouteError('request_timeout', `${why}.`, { retryAfter_s: 1 });

function requireJsonType(contentType: string | null): void {
  const [type, ...parameters] = (contentType ?? '').toLowerCase().split(';');
  const charset = parameters.map((text) => text.trim()).find((text) => text.startsWith('charset='));
  const utf8 = charset === undefined || /^charset="?utf-?8"?$/.test(charset);
  if (type?.trim() === 'application/json' && utf8) return;
  throw new MaskrouteError('unsupported_media_type', 'Send `content-type: application/json` in UTF-8.');
}

function decodeUtf8(bytes: Uint8Array): string {
  try {
    return new TextDecoder('utf-8', { fatal: true }).decode(bytes);
  } catch (cause) {
    throw new MaskrouteError('invalid_json', 'The body is not valid UTF-8.', { cause });
  }
}
