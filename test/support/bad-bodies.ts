/** Bodies that are refused, with the words for it: the same at the edge and at a backend. */
import { z } from 'zod';
import { drawnFrom } from '../../shared/wire/fields.ts';

type BadBody = {
  readonly path: '/v1/chat/completions' | '/v1/completions' | '/v1/responses';
  readonly body: unknown;
  readonly param: string | null;
  readonly message: string | RegExp;
};

const hello = { role: 'user', content: 'hi' };
const chat = (fields: object, param: string | null, message: string | RegExp): BadBody => ({
  path: '/v1/chat/completions',
  body: { model: 'MODEL', messages: [hello], ...fields },
  param,
  message,
});
const legacy = (fields: object, param: string | null, message: string | RegExp): BadBody => ({
  path: '/v1/completions',
  body: { model: 'MODEL', prompt: 'hi', ...fields },
  param,
  message,
});
const newer = (fields: object, param: string | null, message: string | RegExp): BadBody => ({
  path: '/v1/responses',
  body: { model: 'MODEL', input: 'hi', ...fields },
  param,
  message,
});
const TEXT_ONLY = 'this model takes and gives text only';
const MASK = 'expected "dense", a mask id, or an object with skipAttention, skipFfn and surrogate';

const TOOL = { type: 'function', function: { name: 'f' } };

export const BAD_BODIES: readonly BadBody[] = [
  chat({ max_token: 5 }, 'max_token', 'max_token: there is no such field here; did you mean `max_tokens`?'),
  chat({ topP: 1 }, 'topP', 'topP: there is no such field here; did you mean `top_p`?'),
  chat({ prompt: 'hi' }, 'prompt', 'prompt: there is no such field here.'),
  chat({ __proto: {}, constructor: 1 }, '__proto', /__proto: there is no .*constructor: there is no/),
  legacy({ max_completion_tokens: 5 }, 'max_completion_tokens', /there is no such field here/),
  chat(
    { temperature: 3, top_p: 'hot', n: 1.5, stream: 'yes' },
    'temperature',
    'temperature: expected at most 2; top_p: expected a number, got "hot"; ' +
      'n: expected a whole number, got 1.5; stream: expected true or false, got "yes".',
  ),
  {
    ...chat({}, 'model', ''),
    body: {},
    message: /^model: it is missing, .*; messages: it is missing, expected a list\.$/,
  },
  { ...chat({}, null, ''), body: [], message: 'the body: expected an object, got a list.' },
  { ...legacy({}, null, ''), body: 'null', message: 'the body: expected an object, got null.' },
  { ...chat({}, 'top_p', 'top_p: Infinity is not a JSON number.'), body: '{"top_p": Infinity}' },
  { ...chat({}, null, 'The body is not valid JSON: it is empty.'), body: '' },
  { ...chat({}, null, /^The body is not valid JSON: it breaks off/), body: '{"model": "m' },

  chat(
    { messages: [{ role: 'user', content: [{ type: 'image_url', image_url: { url: 'data:' } }] }] },
    'messages[0].content[0].type',
    `messages[0].content[0].type: ${TEXT_ONLY}, so a part has the type "text".`,
  ),
  chat(
    { messages: [hello, { role: 'user', content: [{ type: 'text', text: 'a' }, { type: 'input_audio' }] }] },
    'messages[1].content[1].type',
    /text only/,
  ),
  chat(
    { messages: [{ role: 'user', content: 5 }] },
    'messages[0].content',
    'messages[0].content: expected a string, or a list of text parts, got 5.',
  ),
  chat(
    { messages: [{ role: 'function', content: 'x', name: 'f' }] },
    'messages[0].role',
    'messages[0].role: send the role "tool" instead.',
  ),
  chat(
    { messages: [{ role: 'tool', content: 'x' }] },
    'messages[0].tool_call_id',
    'messages[0].tool_call_id: a message of a tool says which call it answers.',
  ),
  chat(
    { messages: [hello, { role: 'assistant', content: null, tool_calls: [{ id: '1' }] }] },
    'messages[1].tool_calls[0].function',
    /^messages\[1\]\.tool_calls\[0\]\.function: it is missing/,
  ),
  chat(
    { messages: [{ ...hello, tool_calls: [{ id: '1', function: { name: 'f', arguments: '{}' } }] }] },
    'messages[0].tool_calls',
    'messages[0].tool_calls: only an assistant calls tools.',
  ),
  chat(
    { messages: [{ ...hello, role: 'king', content_: 'x' }] },
    'messages[0].role',
    'messages[0].role: expected one of "system", "developer", "user", "assistant", "tool", got "king"; ' +
      'messages[0].content_: there is no such field here; did you mean `content`?',
  ),
  chat({ messages: [{ ...hello, audio: { id: 'a' } }] }, 'messages[0].audio', /text only/),
  chat({ messages: [{ ...hello, refusal: 'no' }] }, 'messages[0].refusal', /no refusals/),
  chat({ messages: 'hi' }, 'messages', 'messages: expected a list, got "hi".'),
  chat({ messages: [] }, 'messages', 'messages: expected at least 1 item.'),

  chat({ mask: 5 }, 'mask', `mask: ${MASK}, got 5.`),
  chat({ mask: 'm_zz' }, 'mask', 'mask: expected "dense" or a mask id.'),
  chat({ mask: { skipFfn: ['1'] } }, 'mask.skipFfn[0]', 'mask.skipFfn[0]: expected a whole number, got "1".'),
  chat({ mask: { skip: 1 } }, 'mask.skip', /only skipAttention, skipFfn, surrogate/),
  chat({ stop: 5 }, 'stop', /^stop: expected a string, or a list of at most 16, got 5/),
  chat({ stop: Array(17).fill('x') }, 'stop', 'stop: expected at most 16 items.'),
  chat({ stop: ['a', 1] }, 'stop[1]', 'stop[1]: expected a string, got 1.'),
  chat({ logit_bias: { one: 1 } }, 'logit_bias.one', 'logit_bias.one: expected token ids as names.'),
  chat({ stream_options: { include_usages: true } }, 'stream_options.include_usages', /`include_usage`/),
  chat({ stream_options: [] }, 'stream_options', 'stream_options: expected an object, got a list.'),
  chat({ response_format: { type: 'xml' } }, 'response_format.type', /one of "text", "json_object"/),
  chat(
    { response_format: { type: 'json_schema' } },
    'response_format.json_schema',
    'response_format.json_schema: it is missing, expected an object.',
  ),
  chat(
    { response_format: { type: 'json_object', json_schema: { name: 'a' } } },
    'response_format.json_schema',
    'response_format.json_schema: it belongs to the type "json_schema", and to no other.',
  ),
  chat(
    { response_format: { type: 'json_schema', json_schema: {} } },
    'response_format.json_schema.name',
    /it is missing/,
  ),
  chat({ guided_json: {} }, 'guided_json', /send `response_format` instead/),
  chat({ reasoning_effort: 'high' }, 'reasoning_effort', /does not reason.*only "none"/),
  chat({ prompt_logprobs: 0 }, 'prompt_logprobs', /`echo` with `logprobs`/),
  chat({ best_of: 2 }, 'best_of', /every choice/),
  chat({ chat_template_kwargs: { enable_thinking: false } }, 'chat_template_kwargs', /template/),
  chat({ modalities: ['text', 'audio'] }, 'modalities[1]', /text only/),
  chat({ prediction: 'hi' }, 'prediction', 'prediction: expected an object, got "hi".'),
  chat(
    { prediction: { type: 'content' } },
    'prediction.content',
    'prediction.content: expected a string, or a list of text parts.',
  ),
  chat(
    { prediction: { type: 'content', content: [{ type: 'image_url' }] } },
    'prediction.content[0].type',
    /^prediction\.content\[0\]\.type: /,
  ),
  chat({ tools: [{}] }, 'tools[0].type', 'tools[0].type: expected "function", got nothing.'),
  chat({ tools: [{ type: 'web_search' }] }, 'tools[0].type', /of the type "function"/),
  chat({ tools: [TOOL, TOOL] }, 'tools', 'tools: two of them are called f.'),
  // The Responses API's form.
  chat(
    { tools: [TOOL], tool_choice: { type: 'function', name: 'f' } },
    'tool_choice',
    /^tool_choice: expected "auto", .*\{"type": "function", "function": \{"name": …\}\}/,
  ),
  chat({ tool_choice: 'required' }, 'tool_choice', 'tool_choice: it needs `tools`.'),
  chat(
    { tools: [TOOL], tool_choice: { type: 'function', function: { name: 'g' } } },
    'tool_choice',
    'tool_choice: none of the tools is called g.',
  ),
  chat(
    {
      tools: [TOOL],
      tool_choice: {
        type: 'allowed_tools',
        allowed_tools: { mode: 'auto', tools: [{ type: 'function', function: { name: 'g' } }] },
      },
    },
    'tool_choice',
    'tool_choice: none of the tools is called g.',
  ),
  chat(
    { tools: [TOOL], tool_choice: { type: 'allowed_tools', allowed_tools: { mode: 'none', tools: [TOOL] } } },
    'tool_choice.allowed_tools.mode',
    'tool_choice.allowed_tools.mode: expected one of "auto", "required", got "none".',
  ),
  chat({ seed: 2 ** 65 }, 'seed', /^seed: expected at most 1844/),
  chat({ seed: 0.5 }, 'seed', 'seed: expected a whole number.'),
  chat({ functions: [{}] }, 'functions', /send `tools` and `tool_choice` instead/),
  chat({ web_search_options: {} }, 'web_search_options', /web search/),
  chat({ top_logprobs: 2 }, 'top_logprobs', 'top_logprobs: it needs `logprobs: true`.'),

  legacy({ prompt: ['a', 1] }, 'prompt[1]', 'prompt[1]: expected a string, got 1.'),
  legacy({ prompt: [1, -1] }, 'prompt[1]', 'prompt[1]: expected at least 0.'),
  legacy({ prompt: [[1], [2, -3]] }, 'prompt[1][1]', 'prompt[1][1]: expected at least 0.'),
  legacy(
    { prompt: { text: 'a' } },
    'prompt',
    /^prompt: expected a string, a list of strings, .*, got an object/,
  ),
  legacy({ prompt: null }, 'prompt', /got null/),
  legacy({ best_of: 3, n: 2 }, 'best_of', /must equal `n`/),
  legacy({ suffix: 'x' }, 'suffix', /only "" can be sent/),
  legacy({ response_format: { type: 'json_object' } }, 'response_format', /prescribed form/),

  newer({ reasoning: { effort: 'low' } }, 'reasoning.effort', /does not reason.*only "none"/),
  newer(
    { input: [{ type: 'item_reference', id: 'x' }] },
    'input[0].type',
    /send the item itself.*`store: false`/,
  ),
];

/** What widespread clients send: with it a request is answered as without. */
export const CLIENT_BODIES: readonly {
  readonly client: string;
  readonly path: BadBody['path'];
  readonly body: Record<string, unknown>;
  readonly ignored: string | null;
}[] = [
  {
    client: 'lm-evaluation-harness, local-completions, scoring',
    path: '/v1/completions',
    body: { prompt: [[65, 66]], temperature: 0, max_tokens: 1, logprobs: 1, seed: 1234, echo: true },
    ignored: null,
  },
  {
    client: 'lm-evaluation-harness, local-chat-completions',
    path: '/v1/chat/completions',
    body: { messages: [{ ...hello, type: 'text' }], max_tokens: 4, temperature: 0, stop: [], seed: 1234 },
    ignored: null,
  },
  {
    client: "vLLM's benchmark",
    path: '/v1/completions',
    body: {
      prompt: 'hi',
      temperature: 0,
      repetition_penalty: 1,
      max_tokens: 4,
      logprobs: null,
      ignore_eos: true,
      best_of: 1,
      min_tokens: 1,
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
    },
    ignored: 'stream_options.continuous_usage_stats',
  },
  {
    client: 'the openai package, with its own answer sent back',
    path: '/v1/chat/completions',
    body: {
      messages: [
        { ...hello, name: 'ann' },
        { role: 'assistant', content: 'ok', refusal: null, annotations: [], tool_calls: [], audio: null },
        { role: 'user', content: [{ type: 'text', text: 'on', cache_control: { type: 'ephemeral' } }] },
      ],
      max_completion_tokens: 4,
      tools: [],
      tool_choice: 'auto',
      response_format: { type: 'text' },
      modalities: ['text'],
      store: false,
      user: 'ann',
      reasoning_effort: 'none',
      metadata: {},
    },
    ignored: 'messages.content.cache_control',
  },
  {
    client: 'LangChain, LiteLLM and others',
    path: '/v1/chat/completions',
    body: {
      messages: [hello],
      stream: true,
      stream_options: { include_usage: true, include_obfuscation: true },
      n: 1,
      max_tokens: 4,
      metadata: { a: 'b' },
      store: true,
      service_tier: 'auto',
      frequency_penalty: 0,
      parallel_tool_calls: false,
      prompt_cache_key: 'k',
      safety_identifier: 's',
      logit_bias: null,
      prediction: { type: 'content', content: 'ok' },
      temperature: 0,
      top_p: 0,
    },
    ignored:
      'stream_options.include_obfuscation, metadata, store, service_tier, prompt_cache_key, ' +
      'safety_identifier',
  },
  {
    client: "OpenAI's Agents SDK for JavaScript, with its own answer sent back",
    path: '/v1/chat/completions',
    body: {
      messages: [
        hello,
        { role: 'assistant', content: [{ type: 'text', text: 'ok', role: 'assistant', refusal: null }] },
        hello,
      ],
      max_tokens: 4,
    },
    ignored: null,
  },
  {
    client: "LiteLLM and Vercel's AI SDK, with answers of Claude and Gemini sent back",
    path: '/v1/chat/completions',
    body: {
      messages: [
        hello,
        {
          role: 'assistant',
          content: 'ok',
          reasoning_content: 'hm',
          reasoning_details: [{ type: 'reasoning.text', text: 'hm' }],
          thinking_blocks: [{ type: 'thinking', thinking: 'hm', signature: 's' }],
          provider_specific_fields: { citations: null },
          tool_calls: [
            {
              id: 'c',
              type: 'function',
              function: { name: 'f', arguments: '{}' },
              extra_content: { google: { thought_signature: 's' } },
              provider_specific_fields: { thought_signature: 's' },
            },
          ],
        },
        { role: 'tool', tool_call_id: 'c', content: '1' },
      ],
      max_tokens: 4,
    },
    ignored:
      'messages.reasoning_content, messages.reasoning_details, messages.thinking_blocks, ' +
      'messages.provider_specific_fields, messages.tool_calls.extra_content, ' +
      'messages.tool_calls.provider_specific_fields',
  },
  {
    client: 'the openai package, with its own response sent back',
    path: '/v1/responses',
    body: {
      input: [
        { role: 'developer', content: 'Be brief.' },
        { role: 'user', content: [{ type: 'input_text', text: 'hi' }] },
        {
          id: 'msg_1',
          type: 'message',
          role: 'assistant',
          status: 'completed',
          content: [{ type: 'output_text', text: 'ok', annotations: [], logprobs: [] }],
        },
        // The client of a later day knows more fields, and writes null for what is not set.
        { type: 'function_call', call_id: 'c', name: 'f', arguments: '{}', namespace: null, caller: null },
        { type: 'function_call_output', call_id: 'c', output: '1' },
        { role: 'user', content: 'on' },
      ],
      store: false,
      include: ['reasoning.encrypted_content'],
      truncation: 'disabled',
      stream: true,
      reasoning: { effort: null, summary: 'auto' },
    },
    ignored: 'input.id, input.status, include, reasoning.summary',
  },
];

/* Bodies that are wrong all over. */

/** The fields of a body, by their schemas. */
export function fieldsOf(body: z.ZodType): [name: string, schema: z.ZodType][] {
  const drawn = drawnFrom(body);
  if (drawn?.kind === 'table') {
    return Object.entries(drawn.table).flatMap(([name, rule]) =>
      rule.kind === 'honoured' ? [[name, rule.schema] as [string, z.ZodType]] : [],
    );
  }
  if (body instanceof z.ZodUnion) return fieldsOf(body.options.at(-1) as z.ZodType);
  return Object.entries((body as z.ZodObject).shape) as [string, z.ZodType][];
}

/** With something in each field that may not be there, and a field that nobody knows. `names`: of the known ones. */
export function wrongAllOver(body: z.ZodType): { readonly names: string[]; readonly sent: object } {
  // What nearly no field may be.
  const wrong = [[]];
  const names = fieldsOf(body)
    .filter(([, schema]) => !schema.safeParse(wrong).success)
    .map(([name]) => name);
  return { names, sent: { ...Object.fromEntries(names.map((name) => [name, wrong])), nobody: 1 } };
}
