/** Bodies whose size nobody promised: what is read, and what becomes of the rest. */
import { expect, it } from 'vitest';
import { z } from 'zod';
import { createExperimentSchema } from '../../../shared/admin/experiment-wire.ts';
import { maskSetSchema } from '../../../shared/mask/mask-set.ts';
import { check, readAnswer, readBounded, TooLargeError } from '../../../shared/wire/parse-body.ts';

/** A body of these pieces, and whether it was called off. */
function bodyOf(...pieces: Uint8Array<ArrayBuffer>[]) {
  const state = { isCancelled: false };
  const body = new ReadableStream<Uint8Array<ArrayBuffer>>({
    pull(controller) {
      const piece = pieces.shift();
      if (piece === undefined) controller.close();
      else controller.enqueue(piece);
    },
    cancel() {
      state.isCancelled = true;
    },
  });
  return { body, state };
}
const bytes = (text: string) => new TextEncoder().encode(text);

it('is text whose characters may lie across pieces', async () => {
  const [first, second] = [bytes('ü').subarray(0, 1), bytes('ü').subarray(1)];
  expect(await readBounded(bodyOf(bytes('gr'), first, second, bytes('n')).body, 5)).toBe('grün');
  expect(await readBounded(null, 5)).toBe('');
  await expect(readBounded(bodyOf(first).body, 5)).rejects.toThrow(TypeError);
});

it('leaves what is too long to whoever sends it', async () => {
  const { body, state } = bodyOf(bytes('12345'), bytes('6'), bytes('7'));
  await expect(readBounded(body, 5)).rejects.toThrow(TooLargeError);
  expect([state.isCancelled, body.locked]).toEqual([false, false]);
  expect(await readBounded(body, 5)).toBe('7');
});

it.each([
  ['too long', bytes('123456')],
  ['no text', Uint8Array.of(0xff)],
])('calls off an answer that is %s', async (_, piece) => {
  const { body, state } = bodyOf(piece, bytes('7'));
  await expect(readAnswer({ body }, 5)).rejects.toThrow();
  expect(state.isCancelled).toBe(true);
  const whole = bodyOf(bytes('12345'));
  expect(await readAnswer(whole, 5)).toBe('12345');
  expect(whole.state.isCancelled).toBe(false);
});

it('lists the valid fields once for many unknown ones', () => {
  const schema = z.strictObject({ id: z.string(), inner: z.strictObject({ deep: z.string() }) });
  const checked = check(schema, { id: 'a', one: 1, two: 2, inner: { deep: 'b', three: 3 } });
  expect(checked).toEqual({
    kind: 'bad',
    message: [
      'inner.three: there is no such field here, only deep',
      'one: there is no such field here, only id, inner',
      'two: there is no such field here',
    ].join('; '),
    param: 'inner.three',
  });
});

it('says in words, and not as a pattern, what a text has to look like', () => {
  const set = check(maskSetSchema, {
    name: 'a b',
    model: { name: 'm', hash: 'x', blockCount: 2 },
    surrogates: 'x',
  });
  const draft = check(createExperimentSchema, { regions: [{ country: 'de' }], variants: [{ name: 'a b' }] });
  for (const refused of [set, draft]) {
    expect(refused).toMatchObject({ message: expect.not.stringContaining('/^') });
  }
  expect(set).toMatchObject({
    message: expect.stringContaining('model.hash: expected 64 hexadecimal digits'),
  });
});
