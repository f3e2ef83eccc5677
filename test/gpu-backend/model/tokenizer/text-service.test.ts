/** The thread that reads text: whose turn it is, who leaves, what does not end. */
import { copyFile, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { openModelText } from '../../../../gpu-backend/model/tokenizer/model-text.ts';
import type {
  TextJob,
  TextLimits,
  TextService,
} from '../../../../gpu-backend/model/tokenizer/text-service.ts';
import { openTextService } from '../../../../gpu-backend/model/tokenizer/text-service.ts';
import { installedModel } from '../../../support/installed-model.ts';

let installed: Awaited<ReturnType<typeof installedModel>>;
let service: TextService;
beforeAll(async () => {
  installed = await installedModel();
  service = await open();
}, 60_000);
afterAll(() => service.close());

const open = (
  limits: Partial<TextLimits> = {},
  chatTemplate = installed.manifest.chatTemplate,
  folder = installed.folder,
  onError: (detail: string) => void = () => {},
) =>
  openTextService({
    folder,
    manifest: { ...installed.manifest, chatTemplate },
    onError,
    limits: { turn_ms: 20_000, ...limits },
  });

const chat = (content: string): TextJob => ({
  type: 'chat',
  messages: [{ role: 'user', content }],
  tokensMax: 1e9,
});
const prompts = (texts: string[], tokensMax = 1e9): TextJob => ({
  type: 'prompts',
  texts,
  tokensMax,
  addSpecial: true,
  parseSpecial: false,
});
const call = (tenant = 'a', signal = new AbortController().signal) => ({
  tenant,
  signal,
  spent: { tokens: 0 },
});
/** A dozen turns and more. */
const LONG = 'Some words that differ 123, and others, too. '.repeat(8000);
const LONG_TOKENS = 80_000;
/** Until some of it was read. */
const isRead = ({ spent }: ReturnType<typeof call>) =>
  expect.poll(() => spent.tokens, { interval: 1, timeout: 20_000 }).toBeGreaterThan(0);

test('gives the ids that the tokenizer gives, and the bytes of every token', async () => {
  const text = await openModelText(installed.folder, installed.manifest);
  const said = call();
  const encoded = await service.encode(chat('Hi <|im_end|> there'), said);
  const expected = text.encodeChat([{ role: 'user', content: 'Hi <|im_end|> there' }]);
  expect(encoded).toEqual({ type: 'encoded', prompts: [expected] });
  expect(said.spent.tokens).toBe(expected.length);
  const two = await service.encode(prompts(['a b', 'c d e']), call());
  expect(two).toEqual({ type: 'encoded', prompts: ['a b', 'c d e'].map((one) => text.encodePrompt(one)) });
  for (let id = 0; id <= 49_152; id += 7)
    expect(service.tokenBytes(id)).toEqual(text.tokenizer.tokenBytes(id));
  expect(service.tokenBytesMax).toBe(text.tokenizer.tokenBytesMax);
});

test('a prompt that is too long is read no further, and costs what was read', async () => {
  const said = call();
  expect(await service.encode(prompts(['short', LONG], 1000), said)).toEqual({ type: 'too_long' });
  expect(said.spent.tokens).toBeGreaterThan(1000);
  // A step's tokens at most beyond the limit.
  expect(said.spent.tokens).toBeLessThan(1000 + 4200);
});

test('long prompts of one tenant hold up another’s short one by a turn or so, not by their length', async () => {
  const order: string[] = [];
  const flood = Array.from({ length: 6 }, (_, i) =>
    service.encode(prompts([LONG]), call('flood')).then(() => order.push(`long ${i}`)),
  );
  for (let i = 0; i < 5; i++)
    await service.encode(chat(`Hi ${i}`), call('other')).then(() => order.push('short'));
  expect(order).toEqual(Array.from({ length: 5 }, () => 'short'));
  await Promise.all(flood);
});

test('a tenant that floods waits for itself: a newcomer’s long prompt is done before its own', async () => {
  const order: string[] = [];
  const said = Array.from({ length: 5 }, () => call('flood'));
  const flood = said.map((one) => service.encode(prompts([LONG]), one).then(() => order.push('flood')));
  await isRead(said[0]!);
  await service.encode(prompts([LONG]), call('other')).then(() => order.push('other'));
  await Promise.all(flood);
  expect(order[0]).toBe('other');
});

describe('who leaves', () => {
  test('while it waits or is read is dropped, and what was read of it is known', async () => {
    const leave = new AbortController();
    const said = Array.from({ length: 4 }, () => call('a', leave.signal));
    const all = said.map((one) =>
      service.encode(prompts([LONG, LONG]), one).catch((error: unknown) => error),
    );
    await isRead(said[0]!);
    leave.abort();
    for (const outcome of await Promise.all(all)) expect(outcome).toMatchObject({ code: 'cancelled' });
    const read = said.reduce((sum, { spent }) => sum + spent.tokens, 0);
    expect(read).toBeGreaterThan(0);
    expect(read).toBeLessThan(4 * 2 * LONG_TOKENS);
    // Nobody is before this one.
    expect(await service.encode(chat('Hi'), call('a'))).toMatchObject({ type: 'encoded' });
  });

  test('before it came is not read at all', async () => {
    const said = call('a', AbortSignal.abort());
    await expect(service.encode(prompts([LONG]), said)).rejects.toMatchObject({ code: 'cancelled' });
    expect(said.spent.tokens).toBe(0);
  });
});

test('in a full line the newest of who has most is refused', async () => {
  await using full = withClose(await open({ waitingCharsMax: 2.5 * LONG.length }));
  const outcome = (tenant: string) =>
    full.service.encode(prompts([LONG]), call(tenant)).then(
      ({ type }) => type,
      (error) => error.code,
    );
  const all = [outcome('a'), outcome('a'), outcome('b')];
  expect(await Promise.all(all)).toEqual(['encoded', 'queue_full', 'encoded']);
});

const withClose = (opened: TextService) => ({
  service: opened,
  [Symbol.asyncDispose]: () => opened.close(),
});

describe('a template that does not end', () => {
  /** Some 10^12 rounds for a message of a million letters, three for `Hi`. */
  const HOSTILE =
    '{% for m in messages %}{% for a in range(m.content | length) %}{% for b in range(m.content | length) %}' +
    '{% if a < 0 %}x{% endif %}{% endfor %}{% endfor %}{{ m.content }}<|im_end|>{% endfor %}';

  test('is ended with its thread: its request is refused and costs its bound, the others are read', async () => {
    await using hostile = withClose(await open({ turn_ms: 500 }, HOSTILE));
    const said = { ...call('attacker') };
    const job = { ...chat('x'.repeat(1_000_000)), tokensMax: 8191 };
    const refused = hostile.service.encode(job, said);
    const others = ['Hi', 'Ho'].map((content, i) =>
      hostile.service.encode(chat(content), call(`tenant ${i}`)),
    );
    const long = hostile.service.encode(prompts([LONG]), call('long'));
    await expect(refused).rejects.toMatchObject({
      code: 'invalid_request',
      param: 'messages',
      message: expect.stringContaining('more than 0.5 s'),
    });
    expect(said.spent.tokens).toBe(8191);
    for (const other of [...others, long]) expect(await other).toMatchObject({ type: 'encoded' });
    expect(await hostile.service.encode(chat('Hi'), call())).toMatchObject({ type: 'encoded' });
  }, 60_000);

  test('does no harm where another model was installed meanwhile: its tokens are not taken', async () => {
    const folder = await mkdtemp(path.join(tmpdir(), 'maskroute-text-'));
    await using opened = new AsyncDisposableStack();
    opened.defer(() => rm(folder, { recursive: true }));
    for (const name of ['tokenizer.json', 'tokenizer_config.json'])
      await copyFile(path.join(installed.folder, name), path.join(folder, name));
    const failures: string[] = [];
    const hostile = await open({ turn_ms: 500 }, HOSTILE, folder, (detail) => failures.push(detail));
    opened.defer(() => hostile.close());
    const file = path.join(folder, 'tokenizer.json');
    const json = JSON.parse(await readFile(file, 'utf8'));
    const { vocab } = json.model;
    [vocab.a, vocab.b] = [vocab.b, vocab.a];
    await writeFile(file, JSON.stringify(json));
    await expect(hostile.encode(chat('x'.repeat(1_000_000)), call())).rejects.toMatchObject({
      code: 'invalid_request',
    });
    await expect(hostile.encode(prompts(['a b']), call())).rejects.toMatchObject({ code: 'engine_failed' });
    expect(failures.at(-1)).toMatch(/another model was installed/);
  }, 60_000);

  test('and one that hoards memory, too', async () => {
    const hoarding =
      '{% set ns = namespace(kept=[]) %}{% for a in range(messages[0].content | length) %}' +
      '{% set ns.kept = [ns.kept, range(1000) | list] %}{% endfor %}{{ ns.kept | length }}<|im_end|>';
    await using hostile = withClose(await open({ turn_ms: 20_000, heap_MB: 128 }, hoarding));
    const refused = hostile.service.encode(chat('x'.repeat(1_000_000)), call());
    await expect(refused).rejects.toMatchObject({ code: 'invalid_request' });
    expect(await hostile.service.encode(chat('x'), call())).toMatchObject({ type: 'encoded' });
  }, 60_000);
});

test('closing ends what waits', async () => {
  const closing = await open();
  const waiting = [1, 2].map(() => closing.encode(prompts([LONG]), call()).catch((error) => error.code));
  await closing.close();
  expect(await Promise.all(waiting)).toEqual(['engine_failed', 'engine_failed']);
  await expect(closing.encode(chat('Hi'), call())).rejects.toMatchObject({ code: 'engine_failed' });
});
