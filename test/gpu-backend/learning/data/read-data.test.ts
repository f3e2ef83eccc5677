import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { snippets } from '../../../../gpu-backend/learning/data/distill.ts';
import {
  parseRow,
  readData,
  readDistinct,
  readLines,
  sizeOfData,
} from '../../../../gpu-backend/learning/data/read-data.ts';

let folder = '';
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'maskroute-data-'));
});
afterAll(() => rmSync(folder, { recursive: true }));

function file(name: string, content: string | Uint8Array): string {
  const path = join(folder, name);
  writeFileSync(path, content);
  return path;
}
const row = (value: unknown) => parseRow(JSON.stringify(value), 'math', 'math.jsonl:1');
const user = (content: string) => ({ role: 'user', content });
const assistant = (content: string) => ({ role: 'assistant', content });
const CALL = { id: 'c1', type: 'function', function: { name: 'weather', arguments: '{"town":"Ulm"}' } };
const part = (text: string) => ({ type: 'text', text });

describe('a row', () => {
  it.each([
    [{ question: 'q', answer: 'a' }, 'q', [user('q'), assistant('a')]],
    [{ prompt: 'p', completion: 'c' }, 'p', [user('p'), assistant('c')]],
    [{ prompt: 'p', completion: '' }, 'p', [user('p')]],
    [{ instruction: 'i', output: 'o' }, 'i', [user('i'), assistant('o')]],
    [{ instruction: 'i', input: 'x', output: 'o' }, 'i\n\nx', [user('i\n\nx'), assistant('o')]],
    [
      { messages: [{ role: 'developer', content: 's' }, user('u'), assistant('a'), user('later')] },
      'u',
      [{ role: 'system', content: 's' }, user('u'), assistant('a'), user('later')],
    ],
    [
      {
        messages: [
          { role: 'user', content: [part('one '), part('two')] },
          { role: 'assistant', content: [part('a')] },
        ],
      },
      'one two',
      [user('one two'), assistant('a')],
    ],
    [
      {
        messages: [
          user('u'),
          { role: 'assistant', content: null, tool_calls: [CALL], refusal: null },
          { role: 'tool', tool_call_id: 'c1', content: '12' },
          assistant('a'),
        ],
        tools: [],
      },
      'u',
      [
        user('u'),
        { role: 'assistant', content: '', tool_calls: [CALL] },
        { role: 'tool', tool_call_id: 'c1', content: '12' },
        assistant('a'),
      ],
    ],
    // A field of one form beside all fields of another.
    [{ prompt: 'unused', question: 'q', answer: 'a' }, 'q', [user('q'), assistant('a')]],
    [{ question: 'q', instruction: 'i', input: null, output: 'o' }, 'i', [user('i'), assistant('o')]],
  ])('of the form %j becomes a conversation', (value, routeText, turns) => {
    expect(row(value)).toEqual({ kind: 'math', routeText, content: { type: 'chat', turns } });
  });

  it('of plain text stays text, and is routed by its beginning', () => {
    const text = `${'x'.repeat(5000)} end`;
    expect(row({ text, kind: 'prose' })).toEqual({
      kind: 'prose',
      routeText: 'x'.repeat(4000),
      content: { type: 'text', text },
    });
  });

  it.each([
    ['{"text": ', /math\.jsonl:1: the line is not JSON/],
    ['[1]', /not an object/],
    ['{"body": "x", "n": 1}', /none of the known forms .*it has body, n/],
    ['{"question": "q"}', /answer: /],
    ['{"prompt": 5, "completion": ""}', /prompt: /],
    ['{"messages": []}', /messages: /],
    ['{"messages": [{"role": "robot", "content": ""}]}', /messages\[0\]\.role: /],
    ['{"messages": [{"role": "user", "text": "u"}]}', /messages\[0\]\.content: expected a string or a list/],
    ['{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', /messages\[0\]\.content/],
  ])('that reads %s is refused with its place', (line, message) => {
    expect(() => parseRow(line, 'math', 'math.jsonl:1')).toThrow(message);
    expect(() => parseRow(line, 'math', 'math.jsonl:1')).toThrow(
      expect.objectContaining({ code: 'invalid_data' }),
    );
  });
});

describe('a file', () => {
  it('is read whatever its line ends, with a byte order mark, blank lines and no last newline', async () => {
    const path = file(
      'crlf.jsonl',
      '\uFEFF{"text":"é"}\r\n\r\n{"text":"日本"}\n{"text":" "}\n{"text":"last"}',
    );
    const rows = await readData([path]);
    expect(rows.map((one) => one.routeText)).toEqual(['é', '日本', 'last']);
    expect(rows[0]!.kind).toBe('crlf');
  });

  it('is read no further when the run is stopped', async () => {
    const path = file('long.jsonl', '{"text":"some words of a row"}\n'.repeat(100_000));
    const stop = new AbortController();
    setTimeout(() => stop.abort(new Error('stopped')));
    await expect(readData([path], undefined, stop.signal)).rejects.toThrow('stopped');
  });

  it('is measured without being parsed, as far as it is read', async () => {
    const path = file('sizes.jsonl', '{"text":"a"}\n'.repeat(300_000));
    const bytes = 300_000 * 13;
    expect(await sizeOfData({ files: [path] })).toEqual({ bytes, lines: 300_000 });
    expect(await sizeOfData({ files: [path, path] })).toEqual({ bytes: 2 * bytes, lines: 600_000 });
    const few = await sizeOfData({ files: [path], rowsMax: 10 });
    expect(few.lines).toBe(10);
    expect(few.bytes).toBeLessThan(bytes);
  });

  it('without a prompt in a row, or with it again, says how many rows are left out', async () => {
    const row = (content: string) => `${JSON.stringify({ messages: [{ role: 'user', content }] })}\n`;
    const told: string[] = [];
    const read = (path: string) => readDistinct({ files: [path] }, { log: (line) => void told.push(line) });
    const mixed = file('mixed.jsonl', [' ', 'a', 'b', 'a', '', 'a'].map(row).join(''));
    expect(await read(mixed)).toHaveLength(2);
    expect(told).toEqual(['Of 6 rows 4 are left out: 2 without a prompt, 2 repeated.']);
    expect(await read(file('whole.jsonl', row('a') + row('b')))).toHaveLength(2);
    expect(told).toHaveLength(1);
  });

  it('gives no more rows than asked for, from each file', async () => {
    const many = file('many.jsonl', '{"text":"a"}\n'.repeat(10));
    expect(await readData([many, many], 3)).toHaveLength(6);
  });

  it('is refused at the line that is wrong', async () => {
    const path = file('wrong.jsonl', '{"text":"a"}\n\n{"text":1}\n');
    await expect(readData([path])).rejects.toThrow(`${path}:3: text`);
  });

  it('that is not UTF-8, has an endless line, is missing or holds nothing is refused', async () => {
    const latin = file('latin.jsonl', Uint8Array.from([0x7b, 0xe9, 0x7d, 0x0a]));
    await expect(readData([latin])).rejects.toThrow(new RegExp(`^${latin}:1: .*UTF-8`));
    const endless = file('endless.jsonl', 'x'.repeat(200_000));
    await expect(readLines(endless, 100_000).next()).rejects.toThrow(/longer than 100000/);
    await expect(readData([join(folder, 'none.jsonl')])).rejects.toThrow(
      /none\.jsonl cannot be read: there is no such file\.$/,
    );
    await expect(readData([file('empty.jsonl', '')])).rejects.toThrow(/no row with a prompt/);
  });

  it('keeps a character that lies across two chunks', async () => {
    const path = file('chunks.jsonl', `{"text":"${'x'.repeat(65_525)}日"}\n`);
    expect((await readData([path]))[0]!.content).toEqual({
      type: 'text',
      text: `${'x'.repeat(65_525)}日`,
    });
  });
});

it('snippets are prompts first, then sentences, each once', () => {
  const rows = [
    row({
      question: 'How many clips did she sell? She sold them in May.',
      answer: 'She sold half as many clips in May. Ok. Yes.',
    }),
    row({ text: 'How many clips did she sell?' }),
  ];
  expect(snippets(rows, 3)).toEqual(
    [
      'How many clips did she sell? She sold them in May.',
      'How many clips did she sell?',
      'She sold them in May. ',
      'She sold half as many clips in May.',
    ].map((text) => text.trim()),
  );
});
