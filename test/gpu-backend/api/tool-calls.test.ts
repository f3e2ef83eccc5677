/** Calls out of text, however the text was cut into pieces. */
import fc from 'fast-check';
import { expect, test } from 'vitest';
import { CallReader, readCalls } from '../../../gpu-backend/api/answer.ts';
import type { ChoiceEvent } from '../../../gpu-backend/api/choice.ts';
import { PLAIN_FORMAT, type ToolFormat } from '../../../gpu-backend/model/tokenizer/tool-format.ts';

const { begin, middle, end } = PLAIN_FORMAT;
const BARE: ToolFormat = { ...PLAIN_FORMAT, begin: '{"name": "', end: '}', trigger: '{"name": "' };

/** What is read of `pieces`: the text, and each call's name and arguments. */
function read(pieces: readonly string[], format = PLAIN_FORMAT) {
  const reader = new CallReader(format);
  const found = { text: '', calls: [] as [string, string][] };
  for (const part of [...pieces.flatMap((piece) => reader.push(piece)), ...reader.flush()]) {
    if (part.type === 'text') found.text += part.text;
    else if (part.type === 'call') found.calls.push([part.name, '']);
    else found.calls[part.call]![1] += part.text;
  }
  return found;
}

const plain = fc.string({ unit: fc.constantFrom('<', 'tool_call', '>', '\n', ' ', '{', '"', 'a') });
/** Most often an object; a schema may want something else. */
const json = fc
  .oneof(fc.dictionary(fc.string(), fc.jsonValue()), fc.jsonValue({ maxDepth: 1 }))
  .map((value) => JSON.stringify(value));

test('the pieces decide nothing, and nothing is lost', () => {
  const wanted = fc.record({
    before: plain,
    calls: fc.array(fc.tuple(fc.constantFrom('f', 'get.x'), json), { maxLength: 3 }),
  });
  fc.assert(
    fc.property(
      wanted,
      fc.array(fc.nat(), { maxLength: 20 }),
      fc.boolean(),
      ({ before, calls }, cuts, isBare) => {
        const format = isBare ? { ...BARE, middle } : PLAIN_FORMAT;
        fc.pre(
          !before.includes(format.trigger) && !`${before}${format.begin}`.slice(0, -1).includes(format.begin),
        );
        const written = calls
          .map(([name, given]) => `${format.begin}${name}${middle}${given}${format.end}`)
          .join('\n');
        const whole = before + written;
        const places = [
          0,
          ...cuts.map((cut) => cut % (whole.length + 1)).sort((a, b) => a - b),
          whole.length,
        ];
        const pieces = places.slice(1).map((at, i) => whole.slice(places[i], at));
        const text = calls.length === 0 ? before : before.trimEnd();
        expect(read(pieces, format)).toEqual({ text, calls: calls.map(([name, given]) => [name, given]) });
      },
    ),
    { seed: 16, numRuns: 300 },
  );
});

test('a call that breaks off leaves what was written of it', () => {
  expect(read([`${begin}f${middle}{"a": "x`])).toEqual({ text: '', calls: [['f', '{"a": "x']] });
  expect(read([`Yes. ${begin}f`])).toEqual({ text: 'Yes.', calls: [] });
  expect(read([`Yes. ${begin.slice(0, -2)}`])).toEqual({ text: 'Yes.', calls: [] });
  expect(read([`${begin}f${middle}{}${end}\n${begin.slice(0, -2)}`])).toEqual({
    text: '',
    calls: [['f', '{}']],
  });
  expect(read([`${begin}f${middle}{}${end}\n`])).toEqual({ text: '', calls: [['f', '{}']] });
});

/** What comes of `texts`, a token each: every text with the tokens whose log-probabilities stand with it. */
async function shown(texts: readonly string[]) {
  async function* events(): AsyncGenerator<ChoiceEvent> {
    let offset = 0;
    for (const [tokenId, text] of texts.entries()) {
      const places = { offset, offset_codePoints: offset };
      const pieces = [{ ...places, tokenId, logprob: { tokenId, logprob: -1, top: [] } }];
      offset += text.length;
      yield { type: 'text', index: 0, text, pieces };
    }
    yield { type: 'finished', index: 0, reason: 'stop' };
  }
  const found: [string, string[]][] = [];
  for await (const event of readCalls(events(), PLAIN_FORMAT)) {
    if (event.type === 'text') found.push([event.text, event.pieces.map(({ tokenId }) => texts[tokenId]!)]);
  }
  return found;
}

test('what is held back, as it might begin a call, keeps its log-probabilities', async () => {
  expect(await shown(['Yes', '.', '\n', '\n', '<', 'b', '>', '\n'])).toEqual([
    ['Yes', ['Yes']],
    ['.', ['.']],
    ['\n\n<b', ['\n', '\n', '<', 'b']],
    ['>', ['>']],
    ['\n', ['\n']],
  ]);
});

test('calls have no log-probabilities, and take none from the text around them', async () => {
  const call = ['<tool', '_call>', '\n{"name": "f', middle, '{', '}', end];
  expect(await shown(['Yes', '.\n', ...call, ' ok', '\n'])).toEqual([
    ['Yes', ['Yes']],
    ['.', ['.\n']],
    [' ok', [' ok']],
  ]);
});

test('a call that a stop string cuts is not called finished', async () => {
  const reasonAfter = async (text: string, reason: 'stop' | 'length' = 'stop') => {
    async function* events(): AsyncGenerator<ChoiceEvent> {
      yield { type: 'text', index: 0, text, pieces: [] };
      yield { type: 'finished', index: 0, reason };
    }
    const reasons: string[] = [];
    for await (const event of readCalls(events(), PLAIN_FORMAT))
      if (event.type === 'finished') reasons.push(event.reason);
    return reasons;
  };
  expect(await reasonAfter(`${begin}f${middle}{"a": "x`)).toEqual(['stop']);
  expect(await reasonAfter(`${begin}f${middle}{}${end}\n${begin}g${middle}{`)).toEqual(['stop']);
  // The last tag says nothing more.
  expect(await reasonAfter(`${begin}f${middle}{}}\n`)).toEqual(['tool_calls']);
  expect(await reasonAfter(`${begin}f${middle}{}${end}`)).toEqual(['tool_calls']);
  // Others might have followed.
  expect(await reasonAfter(`${begin}f${middle}{}${end}`, 'length')).toEqual(['length']);
});
