/** Lines of a UTF-8 text file, one at a time, with a bound on the length of each. */
import { basename } from 'node:path';
import { MaskrouteError } from '../../shared/errors.ts';
import { openRegular } from '../regular-file.ts';

export type Line = { readonly number: number; readonly text: string };

/**
 * @throws MaskrouteError `invalid_data`, naming file and line, for what is unreadable, not UTF-8 or too long;
 * `invalid_argument` for what is no regular file.
 */
export async function* readLines(path: string, charsMax: number): AsyncGenerator<Line> {
  const name = basename(path);
  const decoder = new TextDecoder('utf-8', { fatal: true });
  let number = 1;
  let rest = '';
  const fail = (reason: string, cause?: unknown) =>
    new MaskrouteError('invalid_data', `${name}:${number}: ${reason}`, { cause });
  const decode = (chunk?: Uint8Array): string => {
    try {
      return chunk === undefined ? decoder.decode() : decoder.decode(chunk, { stream: true });
    } catch (cause) {
      throw fail('the text at or after this line is not UTF-8', cause);
    }
  };
  const unreadable = (error: unknown): MaskrouteError =>
    error instanceof MaskrouteError
      ? error
      : new MaskrouteError('invalid_data', `${path} cannot be read: ${(error as Error).message}`, {
          cause: error,
        });
  const file = await openRegular(path).catch((error: unknown) => {
    throw unreadable(error);
  });
  const stream = file.createReadStream({ highWaterMark: 1 << 16 });
  try {
    for await (const chunk of stream) {
      const pieces = (rest + decode(chunk as Uint8Array)).split('\n');
      rest = pieces.pop()!;
      for (const text of pieces) {
        if (text.length > charsMax) throw fail(`the line is longer than ${charsMax} characters`);
        yield { number: number++, text: text.replace(/\r$/, '') };
      }
      if (rest.length > charsMax) throw fail(`the line is longer than ${charsMax} characters`);
    }
    rest += decode();
    if (rest !== '') yield { number, text: rest };
  } catch (error) {
    throw unreadable(error);
  } finally {
    stream.destroy();
  }
}
