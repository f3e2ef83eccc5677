/** Forms, tools and the newer wire, with the official client's own helpers against the edge: client → edge → backend → model. */
import { zodFunction, zodResponseFormat, zodTextFormat } from 'openai/helpers/zod';
import type { ChatCompletionMessageParam } from 'openai/resources';
import { describe, expect, test, vi } from 'vitest';
import { z } from 'zod';
import { HEADERS } from '../../../shared/wire/protocol.ts';
import { infoOf, product } from './running.ts';

const city = z.object({ name: z.enum(['Paris', 'Rome']), people: z.number().int().min(1).max(9) });
const chat = (messages: ChatCompletionMessageParam[]) => ({
  model: product.dev.model,
  messages,
  temperature: 0,
  max_completion_tokens: 80,
});
const question: ChatCompletionMessageParam = { role: 'user', content: 'Where is the Eiffel Tower? As JSON.' };

describe('zodResponseFormat', () => {
  test('is parsed from a whole answer, under the mask that the edge chose', async () => {
    const { data, response } = await product.client.chat.completions
      .create({ ...chat([question]), response_format: zodResponseFormat(city, 'city') })
      .withResponse();
    expect(city.parse(JSON.parse(data.choices[0]!.message.content!))).toBeTruthy();
    expect(response.headers.get(HEADERS.mask)).toBe(infoOf(data).mask);
    const parsed = await product.client.chat.completions.parse({
      ...chat([question]),
      response_format: zodResponseFormat(city, 'city'),
    });
    expect(city.parse(parsed.choices[0]!.message.parsed)).toBeTruthy();
  });

  test('is parsed from a stream, whose last chunk says how it was routed', async () => {
    const stream = product.client.chat.completions.stream({
      ...chat([question]),
      response_format: zodResponseFormat(city, 'city'),
    });
    let last: unknown;
    stream.on('chunk', (chunk) => {
      last = chunk;
    });
    const answer = await stream.finalChatCompletion();
    expect(city.parse(answer.choices[0]!.message.parsed)).toBeTruthy();
    expect(infoOf(last)).toMatchObject({ mask: expect.any(String), completion_tokens: expect.any(Number) });
  });
});

describe('runTools', () => {
  const called: unknown[] = [];
  const tools = () => [
    zodFunction({
      name: 'get_people',
      description: 'How many people live in a city',
      parameters: z.object({ city: z.enum(['Paris', 'Rome']) }),
      function: (given) => {
        called.push(given);
        return { millions: 2 };
      },
    }),
  ];
  const asked: ChatCompletionMessageParam = { role: 'user', content: 'How many people live in Rome?' };
  const named = { type: 'function', function: { name: 'get_people' } } as const;

  test('calls a named function once', async () => {
    const runner = product.client.chat.completions.runTools({
      ...chat([asked]),
      tools: tools(),
      tool_choice: named,
    });
    await runner.done();
    expect(called.splice(0)).toEqual([{ city: expect.stringMatching(/^(Paris|Rome)$/) }]);
  });

  test('goes on until the model has answered, streamed', async () => {
    // What the model has seen some times it does again.
    const round = (id: string, name: string): ChatCompletionMessageParam[] => [
      { role: 'user', content: `How many people live in ${name}?` },
      {
        role: 'assistant',
        content: null,
        tool_calls: [
          { id, type: 'function', function: { name: 'get_people', arguments: `{"city": "${name}"}` } },
        ],
      },
      { role: 'tool', tool_call_id: id, content: '{"millions": 2}' },
      { role: 'assistant', content: `2 million people live in ${name}.` },
    ];
    const before = ['Paris', 'Rome', 'Oslo', 'Berlin'].flatMap((name) => round(`id_${name}`, name));
    const runner = product.client.chat.completions.runTools({
      ...chat([...before, { role: 'user', content: 'How many people live in Paris?' }]),
      model: `${product.dev.model}:dense`,
      tools: tools(),
      stream: true as const,
    });
    const answer = await runner.finalContent();
    expect(called.splice(0)).toEqual([{ city: 'Paris' }]);
    expect(answer).toContain('million');
    expect(runner.messages.filter(({ role }) => role === 'tool')).toHaveLength(5);
  });
});

describe('responses', () => {
  const request = (input: string) => ({
    model: product.dev.model,
    input,
    temperature: 0,
    max_output_tokens: 60,
  });

  test('are answered whole, with headers, usage and the decision', async () => {
    const { data, response } = await product.client.responses
      .create({ ...request('What is the capital of France?'), instructions: 'Be brief.', store: false })
      .withResponse();
    expect(data).toMatchObject({ object: 'response', store: false, id: expect.stringMatching(/^resp_/) });
    expect(data.output_text).toContain('Paris');
    expect(data.usage!.total_tokens).toBe(data.usage!.input_tokens + data.usage!.output_tokens);
    expect(response.headers.get(HEADERS.mask)).toBe(infoOf(data).mask);
    const rated = await fetch(`${product.dev.edge}/v1/feedback`, {
      method: 'POST',
      headers: { authorization: `Bearer ${product.dev.apiKey}`, 'content-type': 'application/json' },
      body: JSON.stringify({ id: data.id, rating: 1 }),
    });
    expect(rated.status).toBe(201);
  });

  test('are streamed in the order of the official client', async () => {
    const stream = product.client.responses.stream(request('Say hello.'));
    const types: string[] = [];
    for await (const event of stream) types.push(event.type);
    expect(types.filter((type, i) => type !== types[i - 1])).toEqual([
      ...['response.created', 'response.in_progress', 'response.output_item.added'],
      ...['response.content_part.added', 'response.output_text.delta', 'response.output_text.done'],
      ...['response.content_part.done', 'response.output_item.done'],
      expect.stringMatching(/^response\.(completed|incomplete)$/),
    ]);
    const answer = await stream.finalResponse();
    expect(answer.output_text.length).toBeGreaterThan(0);
    expect(infoOf(answer).completion_tokens).toBe(answer.usage!.output_tokens);
  });

  test('are kept with their prompt where the tenant has its texts kept, whole and streamed', async () => {
    const admin = async (method: string, path: string, body?: object) => {
      const response = await fetch(`${product.dev.edge}/admin/v1${path}`, {
        method,
        headers: { authorization: `Bearer ${product.dev.adminKey}`, 'content-type': 'application/json' },
        ...(body && { body: JSON.stringify(body) }),
      });
      return (await response.json()) as { data: { id: string }[]; texts: { prompt: string; answer: string } };
    };
    const textsOf = async (requestId: string) => {
      const [seen] = (await admin('GET', `/requests?q=${requestId}`)).data;
      return seen && (await admin('GET', `/requests/${seen.id}`)).texts;
    };
    await admin('PATCH', '/tenants/local', { texts_kept_days: 1 });
    const ask = { ...request('Name a colour.'), max_output_tokens: 16 };
    // A change of terms holds within 5 s.
    const whole = await vi.waitFor(
      async () => {
        const { data, response } = await product.client.responses.create(ask).withResponse();
        const id = response.headers.get(HEADERS.requestId)!;
        const texts = await vi.waitFor(
          async () => {
            const found = await textsOf(id);
            expect(found).toBeDefined();
            return found;
          },
          { timeout: 10_000, interval: 250 },
        );
        expect(texts).toMatchObject({ prompt: 'user: Name a colour.', answer: data.output_text });
        return data.output_text;
      },
      { timeout: 60_000, interval: 500 },
    );
    const requestId = crypto.randomUUID();
    const headers = { [HEADERS.requestId]: requestId };
    for await (const _ of await product.client.responses.create({ ...ask, stream: true }, { headers }));
    await vi.waitFor(async () => expect((await textsOf(requestId))?.answer).toBe(whole), 10_000);
    await admin('PATCH', '/tenants/local', { texts_kept_days: null });
  }, 90_000);

  test('are parsed by a schema', async () => {
    const answer = await product.client.responses.parse({
      ...request('Where is the Eiffel Tower? As JSON.'),
      text: { format: zodTextFormat(city, 'city') },
    });
    expect(city.parse(answer.output_parsed)).toBeTruthy();
  });

  test('call a function and take its result, streamed', async () => {
    const tools = [
      {
        type: 'function' as const,
        name: 'get_people',
        strict: true,
        parameters: {
          type: 'object',
          properties: { city: { enum: ['Paris', 'Rome'] } },
          required: ['city'],
          additionalProperties: false,
        },
      },
    ];
    const input = [{ role: 'user' as const, content: 'How many people live in Rome?' }];
    const stream = product.client.responses.stream({
      model: product.dev.model,
      temperature: 0,
      input,
      tools,
      tool_choice: { type: 'function', name: 'get_people' },
    });
    const types: string[] = [];
    for await (const event of stream) types.push(event.type);
    expect(types).toContain('response.function_call_arguments.done');
    const [call] = (await stream.finalResponse()).output;
    if (call?.type !== 'function_call') throw new Error('no call');
    expect(['Paris', 'Rome']).toContain(JSON.parse(call.arguments).city);
    const answer = await product.client.responses.create({
      model: product.dev.model,
      temperature: 0,
      max_output_tokens: 40,
      tools,
      input: [...input, call, { type: 'function_call_output', call_id: call.call_id, output: '3 million' }],
    });
    expect(answer.output.length).toBeGreaterThan(0);
  });

  test.each([
    [{ previous_response_id: 'resp_1' }, 'previous_response_id', /nothing is stored here/],
    [{ background: true }, 'background', /while its client waits/],
    [{ tools: [{ type: 'web_search' }] }, 'tools[0].type', /built-in tools/],
    [{ input: [{ type: 'item_reference', id: 'x' }] }, 'input[0].type', /nothing is stored here/],
    [
      { text: { format: { type: 'json_schema', name: 'a', strict: true, schema: { $ref: '#' } } } },
      'text.format.schema',
      /leads back to itself/,
    ],
  ])('refuse %j by name', async (more, param, message) => {
    const refused = product.client.responses.create({ ...request('x'), ...more } as never);
    await expect(refused).rejects.toMatchObject({
      status: 400,
      param,
      message: expect.stringMatching(message),
    });
  });
});

test('a dry run takes the same bodies, and a conversation keeps its mask through rounds of tools', async () => {
  const route = async (body: object) => {
    const response = await fetch(`${product.dev.edge}/v1/route`, {
      method: 'POST',
      headers: { authorization: `Bearer ${product.dev.apiKey}`, 'content-type': 'application/json' },
      body: JSON.stringify({ model: product.dev.model, ...body }),
    });
    return (await response.json()) as { mask: unknown; maskroute: { cluster: number } };
  };
  const user = { role: 'user', content: 'Write a Python function that sorts a list.' };
  const tool = { type: 'function', function: { name: 'f', parameters: { type: 'object' } } };
  const call = { id: 'a', type: 'function', function: { name: 'f', arguments: '{}' } };
  const first = await route({ messages: [user] });
  const later = await route({
    messages: [
      user,
      { role: 'assistant', tool_calls: [call] },
      { role: 'tool', tool_call_id: 'a', content: 'x' },
    ],
    tools: [tool],
  });
  const newer = await route({ input: user.content });
  expect([later.mask, newer.mask]).toEqual([first.mask, first.mask]);
});
