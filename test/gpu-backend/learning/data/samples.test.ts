/** What the model sees of a row. */
import { describe, expect, it } from 'vitest';
import { parseRow } from '../../../../gpu-backend/learning/data/read-data.ts';
import {
  createSampler,
  encodeRow,
  type Scored,
  scoredPositions,
  tryTemplate,
} from '../../../../gpu-backend/learning/data/samples.ts';
import { packRows } from '../../../../gpu-backend/learning/gates/batches.ts';
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

const sampler = (scored: Scored = 'all', tokensMax = 1000) =>
  createSampler(text, eos, { tokensMax, contextTokens: manifest.config.contextTokens, scored });

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
  const { tokenIds, scoreFrom } = sampler('answers')(row(value))!;
  const answer = text.tokenizer.decode([...tokenIds.slice(scoreFrom + 1)]);
  expect(answer).toMatch(/^\s*(<tool_call>\s*)?\{"name": ?"weather"/);
});

describe('a system prompt', () => {
  const system = (words: number) => ({
    role: 'system',
    content: Array.from({ length: words }, (_, i) => `rule ${i}`).join(', '),
  });
  const long = { role: 'assistant', content: 'It is warm. '.repeat(100) };
  const decoded = (ids: Int32Array) => text.tokenizer.decode([...ids]);

  it('is context: no position in it is scored, and the rest of the row is read as far as without one', () => {
    const plain = sampler('all', 128)(row({ messages: [ASK, long] }))!;
    const led = sampler('all', 128)(row({ messages: [system(40), ASK, long] }))!;
    expect(decoded(led.tokenIds.slice(0, led.scoreFrom + 1))).toContain('rule 39');
    expect(led.tokenIds.slice(led.scoreFrom)).toEqual(plain.tokenIds.slice(plain.scoreFrom));
    expect(scoredPositions(led)).toBe(scoredPositions(plain));
    // Each row has its own, such as a date in it.
    const other = sampler('all', 128)(row({ messages: [system(41), ASK, long] }))!;
    expect(other.tokenIds.slice(other.scoreFrom)).toEqual(plain.tokenIds.slice(plain.scoreFrom));
  });

  it('changes nothing for rows without one', () => {
    for (const messages of [[ASK, long], [long, ASK, ANSWER], [ASK]]) {
      const whole = encodeRow(row({ messages }), text, eos);
      const { tokenIds, scoreFrom } = sampler('all', 40)(row({ messages }))!;
      expect(tokenIds).toEqual(whole.slice(0, 40));
      expect(scoreFrom).toBeLessThan(40);
    }
  });

  it('that is very long loses its middle: its beginning, its end and the answer stay', () => {
    const { tokenIds, scoreFrom } = sampler('answers', 128)(row({ messages: [system(900), ASK, ANSWER] }))!;
    expect(tokenIds.length).toBeLessThan(128 + 256);
    const context = decoded(tokenIds.slice(0, scoreFrom + 1));
    for (const part of ['rule 0,', 'rule 899', ASK.content]) expect(context).toContain(part);
    expect(context).not.toContain('rule 450');
    expect(decoded(tokenIds.slice(scoreFrom + 1))).toContain(ANSWER.content);
  });

  it('is no part of the text that surrogates learn from, where every token counts', () => {
    const packed = (messages: readonly object[]) =>
      packRows([row({ messages })], text, eos, { length: 32, sequencesMax: 4, seed: 1 });
    expect(packed([system(40), ASK, long])).toEqual(packed([ASK, long]));
  });
});

describe('a template that refuses conversations without a system prompt', async () => {
  const strict = await openModelText(folder, {
    ...manifest,
    chatTemplate: `{% if messages[0]['role'] != 'system' %}{{ raise_exception('Begin with the rules.') }}{% endif %}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}{{ '<|im_start|>assistant\\n' }}`,
  });
  const RULES = { role: 'system', content: 'Say it in one word.' };
  const strictSampler = createSampler(strict, eos, { tokensMax: 128, contextTokens: 2048 });

  it('is no hindrance to rows that have one', () => {
    const { tokenIds, scoreFrom } = strictSampler(row({ messages: [RULES, ASK, ANSWER] }))!;
    const context = text.tokenizer.decode([...tokenIds.slice(0, scoreFrom)]);
    expect(context).toMatch(/one word\.<\|im_end\|>\n<\|im_start\|>user\n$/);
  });

  it('is no hindrance to surrogates, which learn from the rest of a row', () => {
    const { tokenIds } = packRows([row({ messages: [RULES, ASK, ANSWER] })], strict, eos, {
      ...{ length: 24, sequencesMax: 1, seed: 1 },
    });
    const packed = text.tokenizer.decode([...tokenIds]);
    expect(packed).toContain(ASK.content);
    expect(packed).not.toContain('one word');
  });

  it('is quoted of a row without one', () => {
    expect(() => tryTemplate([row({ messages: [ASK, ANSWER] })], strict)).toThrow(
      /The row of kind chats that begins with "How warm is it in Ulm\?" \(user, assistant\): .*Begin with the rules\./,
    );
  });

  it('is not asked for plain texts', async () => {
    const refusing = await openModelText(folder, {
      ...manifest,
      chatTemplate: "{{ raise_exception('no') }}",
    });
    const { tokenIds } = createSampler(refusing, eos, { tokensMax: 128, contextTokens: 2048 })(
      row({ text: 'It is warm.' }),
    )!;
    expect(text.tokenizer.decode([...tokenIds])).toBe('It is warm.');
  });
});
