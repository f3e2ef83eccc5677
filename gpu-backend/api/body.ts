/**
 * A request's body, from bytes to a JSON value: bounded before it is read, strict UTF-8. `shared/parse-body.ts` checks
 * the value.
 */
import { MaskrouteError } from '../../shared/errors.ts';
import { parseJson } from '../../shared/parse-body.ts';

/** Rejects with MaskrouteError `unsupported_media_type`, `body_too_large`, `invalid_json`, `invalid_request`. */
export async function readJson(request: Request, bytesMax: number): Promise<unknown> {
  requireJsonType(request.headers.get('content-type'));
  return parseJson(decodeUtf8(await readBounded(request, bytesMax)));
}

function requireJsonType(contentType: string | null): void {
  const [type, ...parameters] = (contentType ?? '').toLowerCase().split(';');
  const charset = parameters.map((text) => text.trim()).find((text) => text.startsWith('charset='));
  const utf8 = charset === undefined || /^charset="?utf-?8"?$/.test(charset);
  if (type?.trim() === 'application/json' && utf8) return;
  throw new MaskrouteError('unsupported_media_type', 'Send `content-type: application/json` in UTF-8.');
}

async function readBounded(request: Request, bytesMax: number): Promise<Uint8Array> {
  const tooLarge = () =>
    new MaskrouteError('body_too_large', `The body is over the limit of ${bytesMax} bytes.`);
  if (Number(request.headers.get('content-length') ?? 0) > bytesMax) throw tooLarge();
  const chunks: Uint8Array[] = [];
  let length = 0;
  // A reader, not `for await`: leaving the loop would cancel the upload before the answer is sent.
  const reader = request.body?.getReader();
  while (reader !== undefined) {
    const { done, value } = await readChunk(reader);
    if (done) break;
    length += value.byteLength;
    if (length > bytesMax) throw tooLarge();
    chunks.push(value);
  }
  return Buffer.concat(chunks, length);
}

async function readChunk(reader: ReadableStreamDefaultReader<Uint8Array>) {
  try {
    return await reader.read();
  } catch (cause) {
    throw new MaskrouteError('cancelled', 'The connection closed before the body was whole.', { cause });
  }
}

function decodeUtf8(bytes: Uint8Array): string {
  try {
    return new TextDecoder('utf-8', { fatal: true }).decode(bytes);
  } catch (cause) {
    throw new MaskrouteError('invalid_json', 'The body is not valid UTF-8.', { cause });
  }
}
