/** Reads bodies whose size nobody promised. */

export class TooLargeError extends Error {}

/**
 * A body's pieces, as they come. Whoever stops early leaves the rest unread: a server that refuses a body lets its client
 * send it and then read why. @throws TooLargeError past `bytesMax`, and what the stream throws.
 */
export async function* piecesOf(
  body: ReadableStream<Uint8Array> | null,
  bytesMax: number,
): AsyncGenerator<Uint8Array, void, void> {
  if (body === null) return;
  let bytes = 0;
  const reader = body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      bytes += value.length;
      if (bytes > bytesMax) throw new TooLargeError(`the body has more than ${bytesMax} bytes`);
      yield value;
    }
  } finally {
    reader.releaseLock();
  }
}

/** The body as UTF-8 text. @throws as `piecesOf`, TypeError on invalid UTF-8. */
export async function readBounded(
  body: ReadableStream<Uint8Array> | null,
  bytesMax: number,
): Promise<string> {
  const decoder = new TextDecoder('utf-8', { fatal: true, ignoreBOM: false });
  let text = '';
  for await (const piece of piecesOf(body, bytesMax)) text += decoder.decode(piece, { stream: true });
  return text + decoder.decode();
}

/** The same of an answer. One that is not read to its end is called off: its connection is free again. */
export async function readAnswer({ body }: Pick<Response, 'body'>, bytesMax: number): Promise<string> {
  try {
    return await readBounded(body, bytesMax);
  } catch (error) {
    await body?.cancel().catch(() => {});
    throw error;
  }
}

/** JSON that somebody else wrote; null for what is none, which every schema of ours refuses. */
export function parseOrNull(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}
