/**
 * A stream of server-sent events on its way through the edge. Whole events pass as they come; a comment keeps the
 * connection open while nothing does; and what goes wrong after the status was sent is told in an `error` event,
 * never by a connection that breaks off inside of one.
 */
import { MaskrouteError, type WireError } from '../../shared/errors.ts';
import type { TappedBody } from './answer-tap.ts';
import { log, reasonOf } from './log.ts';
import type { WatchedAnswer } from './request-record.ts';
import type { Wait } from './wait.ts';

type Bytes = Uint8Array<ArrayBuffer>;

const encoder = new TextEncoder();
const KEEPALIVE = encoder.encode(': keepalive\n\n') as Bytes;
const NOTHING = new Uint8Array(0);
const LINE_FEED = 0x0a;
/** An event that is longer passes in pieces. */
const HELD_BYTES_MAX = 1024 * 1024;

/** `wait`: for the backend's next bytes, until a comment is due. */
export type RelayOptions = { readonly wait: Wait; readonly keepalive_ms: number; readonly requestId: string };

/** Pulled by the client: what it does not read is not read from the backend either. */
export function relayStream(
  answer: Promise<WatchedAnswer>,
  { wait, keepalive_ms, requestId }: RelayOptions,
): ReadableStream<Bytes> {
  let reader: TappedBody | undefined;
  let pending: Promise<Bytes | undefined> | undefined;
  /** The beginning of an event whose end has not come yet. */
  let held = NOTHING;

  const read = async (): Promise<Bytes | undefined> => {
    if (reader === undefined) {
      const { ok, body } = await answer;
      if (body.kind === 'plain') {
        const text = await new Response(body.body).text();
        return ok ? (encoder.encode(text) as Bytes) : errorEvent(text);
      }
      reader = body.body;
    }
    const { done, value } = await reader.read();
    return done ? undefined : (value as Bytes);
  };

  const close = (controller: ReadableStreamDefaultController<Bytes>): void => {
    wait.end();
    controller.close();
  };

  return new ReadableStream<Bytes>(
    {
      async pull(controller) {
        try {
          for (;;) {
            pending ??= read();
            const bytes = await wait.within(pending, keepalive_ms);
            if (bytes === 'late') return controller.enqueue(KEEPALIVE);
            pending = undefined;
            if (bytes === undefined) {
              if (held.length > 0) controller.enqueue(held);
              return close(controller);
            }
            if (reader === undefined) {
              // A refusal is one event, and an answer that is no stream one piece.
              controller.enqueue(bytes);
              return close(controller);
            }
            const [whole, rest] = cut(held, bytes);
            held = rest;
            if (whole.length > 0) return controller.enqueue(whole);
          }
        } catch (thrown) {
          controller.enqueue(errorEvent(JSON.stringify(lateError(thrown, requestId))));
          close(controller);
        }
      },
      async cancel(reason) {
        wait.end();
        await reader?.cancel(reason).catch(() => {});
      },
    },
    { highWaterMark: 0 },
  );
}

const errorEvent = (json: string): Bytes => encoder.encode(`event: error\ndata: ${json}\n\n`) as Bytes;

function lateError(thrown: unknown, requestId: string): WireError {
  if (thrown instanceof MaskrouteError) return thrown.toWire();
  log('error', 'stream_broke_off', { request_id: requestId, reason: reasonOf(thrown) });
  const message = 'The model backend broke off in the middle of its answer.';
  return new MaskrouteError('backend_error', message).toWire();
}

/** What is whole of `held` and `bytes` together, up to the last empty line, and the rest. */
function cut(held: Bytes, bytes: Bytes): [whole: Bytes, rest: Bytes] {
  const all = held.length === 0 ? bytes : concat(held, bytes);
  for (let end = all.length; end >= 2; end--) {
    if (all[end - 1] === LINE_FEED && all[end - 2] === LINE_FEED) {
      return end === all.length ? [all, NOTHING] : [all.subarray(0, end), all.slice(end)];
    }
  }
  return all.length > HELD_BYTES_MAX ? [all, NOTHING] : [NOTHING, all];
}

function concat(a: Bytes, b: Bytes): Bytes {
  const both = new Uint8Array(a.length + b.length);
  both.set(a);
  both.set(b, a.length);
  return both;
}
