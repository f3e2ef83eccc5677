/** Reads bodies whose size nobody promised. */

export class TooLargeError extends Error {}

/**
 * The body as UTF-8 text. @throws TooLargeError past `bytesMax` (nothing more is read then), TypeError on
 * invalid UTF-8, and what the stream throws.
 */
export async function readBounded(
  body: ReadableStream<Uint8Array> | null,
  bytesMax: number,
): Promise<string> {
  if (body === null) return '';
  const decoder = new TextDecoder('utf-8', { fatal: true, ignoreBOM: false });
  let text = '';
  let bytes = 0;
  const reader = body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return text + decoder.decode();
      bytes += value.length;
      if (bytes > bytesMax) throw new TooLargeError(`the body has more than ${bytesMax} bytes`);
      text += decoder.decode(value, { stream: true });
    }
  } finally {
    reader.releaseLock();
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
