/**
 * Reads request bodies: with limits of size and time, and strict decoding; and queries. `shared/wire/parse-body.ts`
 * validates their content.
 */

import { createMiddleware } from 'hono/factory';
import type { z } from 'zod';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { BODY_BYTES_MAX } from '../../shared/wire/openai.ts';
import {
  parse,
  parseJson,
  readBounded,
  requireUnpacked,
  TooLargeError,
} from '../../shared/wire/parse-body.ts';
import { DeadlineError, withDeadline } from '../base/waiting.ts';
import { BODY_ARRIVAL, DRAIN_BYTES_MAX, JSON_DEPTH_MAX, JSON_FIELDS_MAX } from '../limits.ts';
import type { AppContext, AppEnv } from './context.ts';

/** The JSON value of a request's body. @throws what `readBody` throws. */
export const readJson = async (request: Request): Promise<unknown> => (await readBody(request)).value;

/**
 * A request's body, parsed and as text.
 * @throws MaskrouteError `unsupported_media_type`, `body_too_large` (in bytes, fields, or objects and lists), or
 * `invalid_json` (not UTF-8, not JSON, nested too deeply), `invalid_request` (a number that JSON does not have),
 * `request_timeout`.
 */
export async function readBody(request: Request): Promise<{ value: unknown; text: string }> {
  const type = request.headers.get('content-type');
  if (type !== null && !/^application\/(.+\+)?json\b/i.test(type)) {
    throw new MaskrouteError('unsupported_media_type', 'Send the body as application/json.');
  }
  requireUnpacked(request.headers);
  const text = await readText(request);
  requireCheap(text);
  return { value: parseJson(text), text };
}

/** Without `stream` a decoder keeps no state, so all bodies can share it. */
const strictUtf8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: false });

async function readText(request: Request): Promise<string> {
  const tooLarge = () =>
    new MaskrouteError('body_too_large', `The body has more than ${BODY_BYTES_MAX} bytes.`);
  const length = request.headers.get('content-length');
  if (Number(length) > BODY_BYTES_MAX) throw tooLarge();
  const read = async (): Promise<string> => {
    if (length === null) return await readBounded(request.body, BODY_BYTES_MAX);
    // The runtime enforces a declared length, so the body is read at once.
    const bytes = await request.arrayBuffer();
    if (bytes.byteLength > BODY_BYTES_MAX) throw tooLarge();
    return strictUtf8.decode(bytes);
  };
  const isSmall = length !== null && Number(length) <= BODY_ARRIVAL.untimedBytesMax;
  try {
    return await (isSmall ? read() : withDeadline(read(), BODY_ARRIVAL.limit_ms, 'the body'));
  } catch (error) {
    if (error instanceof MaskrouteError) throw error;
    if (error instanceof DeadlineError) {
      const limit_s = BODY_ARRIVAL.limit_ms / 1000;
      throw new MaskrouteError('request_timeout', `The body was not whole within ${limit_s} s.`);
    }
    if (error instanceof TooLargeError) throw tooLarge();
    if (error instanceof TypeError && !request.signal.aborted) {
      throw new MaskrouteError('invalid_json', 'The body is not valid UTF-8.', { cause: error });
    }
    throw new MaskrouteError('cancelled', 'The body ended early.', { cause: error });
  }
}

/**
 * Refuses a body that takes long to parse, since the isolate serves nobody else meanwhile. Counts colons and open brackets
 * outside of strings; one pass, no recursion. @throws MaskrouteError `invalid_json`, `body_too_large`.
 */
function requireCheap(text: string): void {
  let [depth, fields, opened] = [0, 0, 0];
  let inString = false;
  for (let i = 0; i < text.length; i++) {
    const code = text.charCodeAt(i);
    if (inString) {
      if (code === BACKSLASH) i++;
      else if (code === QUOTE) inString = false;
    } else if (code === QUOTE) inString = true;
    else if (code === OPEN_BRACE || code === OPEN_BRACKET) {
      if (++depth > JSON_DEPTH_MAX) throw tooDeep();
      if (++opened > JSON_FIELDS_MAX) throw tooMany('objects and lists');
    } else if (code === CLOSE_BRACE || code === CLOSE_BRACKET) depth--;
    else if (code === COLON && ++fields > JSON_FIELDS_MAX) throw tooMany('fields');
  }
}

const tooDeep = (): MaskrouteError =>
  new MaskrouteError('invalid_json', `The body is nested more than ${JSON_DEPTH_MAX} levels deep.`);
const tooMany = (what: string): MaskrouteError =>
  new MaskrouteError('body_too_large', `The body has more than ${JSON_FIELDS_MAX} ${what} in all.`);

const [QUOTE, BACKSLASH, COLON, OPEN_BRACE, CLOSE_BRACE, OPEN_BRACKET, CLOSE_BRACKET] = [
  0x22, 0x5c, 0x3a, 0x7b, 0x7d, 0x5b, 0x5d,
];

/**
 * A request's query by its schema. A parameter that is given twice is refused: only one of them would count.
 * @throws MaskrouteError `invalid_request`.
 */
export function readQuery<S extends z.ZodType>(c: AppContext, schema: S): z.output<S> {
  for (const [name, values] of Object.entries(c.req.queries())) {
    if (values.length > 1) {
      throw new MaskrouteError('invalid_request', `${name}: it is given more than once.`, { param: name });
    }
  }
  return parse(schema, c.req.query());
}

/*
 * Drains the body of a refused request. The runtime closes the connection of a request with an unread body, and a
 * client that is still sending would see a reset instead of the error.
 */

export const unreadBody = createMiddleware<AppEnv>(async (c, next) => {
  await next();
  // Checked first, as accessing `body` makes the runtime create a stream.
  if (c.req.raw.bodyUsed) return;
  const { body } = c.req.raw;
  if (body === null || body.locked) return;
  await withDeadline(drain(body, DRAIN_BYTES_MAX), BODY_ARRIVAL.limit_ms, 'a refused body').catch(() => {});
});

/** Reads and discards the body, up to `bytesMax`: a client that is still sending does not read answers. */
async function drain(body: ReadableStream<Uint8Array>, bytesMax: number): Promise<void> {
  const reader = body.getReader();
  for (let bytes = 0; bytes < bytesMax; ) {
    const { done, value } = await reader.read();
    if (done) return;
    bytes += value.length;
  }
  await reader.cancel();
}
