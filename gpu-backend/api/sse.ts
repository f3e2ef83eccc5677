/**
 * Server-sent events: framing, keepalive comments while the source is silent, and backpressure. The body is
 * pulled, never pushed: a client that does not read stops the source, and after a while its request.
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
 * `frames` yields framed events and never rejects: a failure is an event of its own. It is begun at once, so that it
 * gets to its end also when the client is gone before it has read anything.
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
    // Zero: one event is in flight, the rest wait in the source.
    { highWaterMark: 0 },
  );
}

/** The value, or undefined when it takes longer than `limit_ms`. */
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
