/** Answers of a prescribed form and calls of tools, with the official client, the real model and real masks. */
import { zodResponseFormat } from 'openai/helpers/zod';
import { describe, expect, test } from 'vitest';
import { z } from 'zod';
import { DEFAULT_MODEL } from '../../../gpu-backend/model/sources/resolve.ts';
import { collect } from './harness.ts';
import { client } from './real-backend.ts';

const ask = (content: string, more: object = {}) => ({
  model: DEFAULT_MODEL,
  messages: [{ role: 'user' as const, content }],
  temperature: 0,
  max_tokens: 120,
  ...more,
});
const person = z.object({
  name: z.string(),
  age: z.number().int().min(0).max(150),
  mood: z.enum(['happy', 'sad']),
});
const MASK = { skipAttention: [20, 21, 22], skipFfn: [8, 9, 24], surrogate: false };

describe('response_format', () => {
  test.each(['dense', MASK])('a schema is kept under the mask %j', { timeout: 120_000 }, async (mask) => {
    const answer = await client.chat.completions.parse(
      ask('Anna is 31 and happy. Write her as JSON.', {
        response_format: zodResponseFormat(person, 'person'),
        temperature: 1,
        seed: 1,
        mask,
      }),
    );
    const { finish_reason, message } = answer.choices[0]!;
    expect(finish_reason).toBe('stop');
    expect(person.parse(message.parsed)).toEqual(JSON.parse(message.content!));
  });

  test('is kept with log-probabilities, several choices, ignore_eos and a minimum that is too great', {
    timeout: 60_000,
  }, async () => {
    const more = {
      n: 2,
      seed: 3,
      temperature: 1.5,
      logprobs: true,
      min_tokens: 100,
      max_tokens: 110,
      ignore_eos: true,
    };
    const { choices } = await client.chat.completions.create(
      ask('A mood?', {
        response_format: zodResponseFormat(z.object({ mood: z.enum(['happy', 'sad']) }), 'mood'),
        ...more,
      }),
    );
    for (const { message, finish_reason, logprobs } of choices) {
      expect(finish_reason).toBe('stop');
      expect(['happy', 'sad']).toContain(JSON.parse(message.content!).mood);
      expect(logprobs!.content!.map(({ token }) => token).join('')).toBe(message.content);
    }
  });

  test('json_object gives an object, streamed, and says when the room ends before it', {
    timeout: 60_000,
  }, async () => {
    const request = ask('A person as JSON, with name and age.', {
      response_format: { type: 'json_object' as const },
    });
    const chunks = await collect(
      await client.chat.completions.create({ ...request, stream: true, max_tokens: 3 }),
    );
    expect(chunks.map((chunk) => chunk.choices[0]!.delta.content ?? '').join('')).toMatch(/^\{/);
    expect(chunks.at(-1)!.choices[0]!.finish_reason).toBe('length');
  });

  test('a schema that cannot be kept is refused with its place', async () => {
    const schema = { type: 'object', properties: { a: { type: 'string', format: 'zzz' } } };
    const refused = client.chat.completions.create(
      ask('x', {
        response_format: { type: 'json_schema', json_schema: { name: 'a', strict: true, schema } },
      }),
    );
    await expect(refused).rejects.toMatchObject({
      status: 400,
      code: 'invalid_schema',
      param: 'response_format.json_schema.schema',
      message: expect.stringContaining('/properties/a/format'),
    });
  });
});

const weather = {
  type: 'function' as const,
  function: {
    name: 'get_weather',
    description: 'The weather in a city',
    strict: true,
    parameters: {
      type: 'object',
      properties: { city: { type: 'string', maxLength: 20 }, unit: { enum: ['C', 'F'] } },
      required: ['city', 'unit'],
      additionalProperties: false,
    },
  },
};
const add = {
  type: 'function' as const,
  function: {
    name: 'add',
    parameters: { type: 'object', properties: { a: { type: 'integer' } }, required: ['a'] },
  },
};

describe('tools', () => {
  test('a named tool is called under a mask', { timeout: 120_000 }, async () => {
    const { choices } = await client.chat.completions.create(
      ask('What is the weather in Paris?', {
        tools: [add, weather],
        tool_choice: { type: 'function', function: { name: 'get_weather' } },
        mask: MASK,
      }),
    );
    const { message, finish_reason } = choices[0]!;
    expect(message.content).toBeNull();
    expect(message.tool_calls).toHaveLength(1);
    const call = message.tool_calls![0]!;
    expect(call).toMatchObject({
      type: 'function',
      id: expect.stringMatching(/^call_\w+$/),
      function: { name: 'get_weather' },
    });
    if (finish_reason === 'tool_calls') {
      const found = JSON.parse((call as { function: { arguments: string } }).function.arguments);
      expect(found.city.length).toBeLessThanOrEqual(20);
      expect(['C', 'F']).toContain(found.unit);
    } else expect(finish_reason).toBe('length');
  });

  test('a required call comes in deltas as the official client collects them', {
    timeout: 60_000,
  }, async () => {
    const stream = client.chat.completions.stream(
      ask('Add something.', { tools: [add], tool_choice: 'required', parallel_tool_calls: false }),
    );
    const deltas: object[] = [];
    stream.on('chunk', ({ choices }) => deltas.push(...(choices[0]?.delta.tool_calls ?? [])));
    const { choices } = await stream.finalChatCompletion();
    expect(deltas[0]).toMatchObject({ index: 0, type: 'function', function: { name: 'add', arguments: '' } });
    expect(deltas.slice(1).every((delta) => !('id' in delta))).toBe(true);
    expect(choices[0]!.finish_reason).toBe('tool_calls');
    expect(
      Object.keys(
        JSON.parse(
          (choices[0]!.message.tool_calls![0] as never as { function: { arguments: string } }).function
            .arguments,
        ),
      ),
    ).toEqual(['a']);
  });

  test('of several tools only those are called that the choice allows', { timeout: 60_000 }, async () => {
    const allowed = { type: 'function', function: { name: 'add' } };
    const request = ask('What is the weather in Paris?', {
      tools: [weather, add],
      tool_choice: { type: 'allowed_tools', allowed_tools: { mode: 'required', tools: [allowed] } },
      parallel_tool_calls: false,
    });
    const { choices, usage } = await client.chat.completions.create(request);
    expect(choices[0]!.message.tool_calls).toMatchObject([{ function: { name: 'add' } }]);
    // The model is told of all of them, so that the beginning of the prompt stays the same.
    const all = await client.chat.completions.create({ ...request, tool_choice: 'auto', max_tokens: 1 });
    expect(usage!.prompt_tokens).toBe(all.usage!.prompt_tokens);
    const newer = await client.responses.create({
      model: DEFAULT_MODEL,
      input: 'What is the weather in Paris?',
      temperature: 0,
      tools: [weather, add].map(({ type, function: one }) => ({ strict: null, type, ...one })),
      tool_choice: {
        type: 'allowed_tools',
        mode: 'required',
        tools: [{ type: 'function', name: 'add' }],
      },
      parallel_tool_calls: false,
      max_output_tokens: 60,
    });
    expect(newer.output).toMatchObject([{ type: 'function_call', name: 'add' }]);
  });

  test('none tells the model of no tool', { timeout: 60_000 }, async () => {
    const plain = await client.chat.completions.create(ask('Hello', { max_tokens: 4 }));
    const none = await client.chat.completions.create(
      ask('Hello', { max_tokens: 4, tools: [weather], tool_choice: 'none' }),
    );
    expect(none.usage!.prompt_tokens).toBe(plain.usage!.prompt_tokens);
    const auto = await client.chat.completions.create(ask('Hello', { max_tokens: 4, tools: [weather] }));
    expect(auto.usage!.prompt_tokens).toBeGreaterThan(plain.usage!.prompt_tokens + 50);
  });
});
