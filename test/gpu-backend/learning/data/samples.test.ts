/** What the model sees of a row. */
import { expect, it } from 'vitest';
import { parseRow } from '../../../../gpu-backend/learning/data/read-data.ts';
import { createSampler, encodeRow, tryTemplate } from '../../../../gpu-backend/learning/data/samples.ts';
import { openModelText } from '../../../../gpu-backend/model/tokenizer/model-text.ts';
import { installedModel } from '../../../support/installed-model.ts';

const ASK = { role: 'user', content: 'How warm is it in Ulm?' };
const CALLS = {
  role: 'assistant',
  content: null,
  tool_calls: [{ id: 'c1', type: 'function', function: { name: 'weather', arguments: '{"town":"Ulm"}' } }],
};
const RESULT = { role: 'tool', tool_call_id: 'c1', content: '{"degrees":12}' };
const ANSWER = { role: 'assistant', content: 'It is 12 degrees.' };

const { folder, manifest } = await installedModel();
const text = await openModelText(folder, manifest);
const eos = manifest.eosTokenIds[0]!;
const row = (value: object) => parseRow(JSON.stringify(value), 'chats', 'chats.jsonl:1');
const seen = (value: object) => text.tokenizer.decode([...encodeRow(row(value), text, eos)]);

it('calls of tools and their results are there as in a request that is served', () => {
  const whole = seen({ messages: [ASK, CALLS, RESULT, ANSWER] });
  for (const part of ['"town":"Ulm"', '{"degrees":12}']) expect(whole).toContain(part);
  const asked = [ASK, CALLS, RESULT].map((turn) => ({ ...turn })) as Parameters<typeof text.encodeChat>[0];
  const request = text.encodeChat(asked);
  expect(whole.startsWith(text.tokenizer.decode([...request]))).toBe(true);
  expect(seen({ messages: [ASK, ANSWER] })).not.toContain('weather');
});

it('calls that end a row are its answer', () => {
  const value = { messages: [ASK, CALLS] };
  expect(seen(value)).toContain('"town":"Ulm"');
  tryTemplate([row(value), row({ messages: [ASK, CALLS, RESULT] })], text);
  const { tokenIds, scoreFrom } = createSampler(text, eos, 1000, 'answers')(row(value))!;
  const answer = text.tokenizer.decode([...tokenIds.slice(scoreFrom + 1)]);
  expect(answer).toMatch(/^\s*(<tool_call>\s*)?\{"name": ?"weather"/);
});
