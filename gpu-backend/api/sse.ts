/**
 * Server-sent events: framing, keepalive comments while the source is silent, and backpressure. The client pulls the body:
 * if it stops reading, the source pauses, and after `stall_ms` its request ends.
 */

export const sseEvent = (event: string, value: unknown): string => `event: ${event}\n${sseData(value)}`;
export const sseData = (value: unknown): string => `data: ${JSON.stringify(value)}\n\n`;
export const SSE_DONE = 'data: [DONE]\n\n';
const SSE_KEEPALIVE = ': keepalive\n\n';

type SseBodyOptions = {
  readonly keepalive_ms: number;
  readonly stall_ms: number;
  /** The client took nothing for `stall_ms`; end its request and its connection. */
  readonly onStall: () => void;
  /** The client left. */
  readonly onCancel: () => void;
};

/**
 * `frames` yields framed events and never rejects; a failure is an event. It is started at once, so that its `finally` runs
 * even if the client leaves before reading anything.
 */
export function sseBody(
  frames: AsyncGenerator<string, void>,
  options: SseBodyOptions,
): ReadableStream<Uint8Array> {
  const encoder = new TextEncoder();
  let pending: Promise<IteratorResult<string, void>> | undefined = frames.next();
  let stall: NodeJS.Timeout | undefined;
  return new ReadableStream<Uint8Array>(
    {
      async pull(controller) {
        clearTimeout(stall);
        pending ??= frames.next();
        const result = await within(pending, options.keepalive_ms);
        if (result === undefined) {
          controller.enqueue(encoder.encode(SSE_KEEPALIVE));
        } else {
          pending = undefined;
          if (result.done) return controller.close();
          controller.enqueue(encoder.encode(result.value));
        }
        stall = setTimeout(options.onStall, options.stall_ms);
      },
      cancel() {
        clearTimeout(stall);
        options.onCancel();
        void frames.return().catch(() => {});
      },
    },
    // No buffer: the next event is pulled only when the client reads.
    { highWaterMark: 0 },
  );
}

/** Resolves with the value, or with undefined after `limit_ms`; rejects as `promise`. */
export async function within<Value>(promise: Promise<Value>, limit_ms: number): Promise<Value | undefined> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<undefined>((resolve) => {
    timer = setTimeout(resolve, limit_ms, undefined);
  });
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}
