/**
 * OpenAI's Responses API, `POST /v1/responses`, without stored state: its fields, and the conversion of a request to a
 * chat completion. Edge and backend share this; the backend formats the answer.
 */
import { z } from 'zod';
import { MaskrouteError, type WireError } from './errors.ts';
import { checkedObject, type FieldTable, honoured, ignored, listOf, refused } from './fields.ts';
import {
  CHAT_FIELDS,
  type ChatMessage,
  type ChatRequest,
  chatOfItems,
  MESSAGES_MAX,
  TOOLS_MAX,
} from './openai.ts';
import { parse } from './parse-body.ts';

const STATELESS = 'nothing is stored here; send the whole conversation as `input`';
const UNKNOWN_ITEM = 'nothing is stored here; send the item itself, as clients do with `store: false`';
const BUILT_IN = 'the only tools here are of the type "function"; built-in tools are not supported';
const TEXT_ONLY = 'this model takes and gives text only';

const part = checkedObject(
  {
    type: honoured(
      z.enum(['input_text', 'output_text', 'text'], {
        error: ({ input }) =>
          input === undefined
            ? undefined
            : `${TEXT_ONLY}, so a part has the type "input_text" or "output_text"`,
      }),
    ),
    text: honoured(z.string()),
    annotations: ignored([]),
    logprobs: ignored([]),
    /** Added by the `openai` client to an answer that it has parsed. */
    parsed: ignored(),
    prompt_cache_breakpoint: ignored(),
  },
  { tag: 'type' },
);
const texts = z
  .union([z.string(), listOf(part.schema, { max: 4096 })], 'expected a string, or a list of text parts')
  .nullish();

/** Items: a message, a function call, or its output; earlier reasoning is not shown to the model again. */
const ITEM_FIELDS = {
  type: honoured(
    z
      .enum(['message', 'function_call', 'function_call_output', 'reasoning'], {
        error: ({ input }) => (input === 'item_reference' ? UNKNOWN_ITEM : undefined),
      })
      .nullish(),
  ),
  role: honoured(z.enum(['system', 'developer', 'user', 'assistant']).nullish()),
  content: honoured(texts, part),
  call_id: honoured(z.string().min(1).max(200).nullish()),
  name: honoured(z.string().max(64).nullish()),
  arguments: honoured(z.string().nullish()),
  output: honoured(texts, part),
  parsed_arguments: ignored(),
  id: ignored(),
  status: ignored(),
  phase: ignored(),
  summary: ignored([]),
  encrypted_content: ignored(),
} as const satisfies FieldTable;
const item = checkedObject(ITEM_FIELDS, {
  tag: 'type',
  refine: ({ type, role, content, call_id, name, arguments: json, output }) => {
    const missing = (path: string) => ({
      path,
      message: `it is missing, and belongs to ${type ?? 'a message'}`,
    });
    switch (type) {
      case undefined:
      case null:
      case 'message':
        return role == null ? missing('role') : content == null ? missing('content') : undefined;
      case 'function_call':
        if (call_id == null) return missing('call_id');
        return name == null ? missing('name') : json == null ? missing('arguments') : undefined;
      case 'function_call_output':
        return call_id == null ? missing('call_id') : output == null ? missing('output') : undefined;
      case 'reasoning':
        return undefined;
    }
  },
});
type Item = z.infer<typeof item.schema>;

const functionTool = checkedObject(
  {
    type: honoured(
      z.literal('function', { error: ({ input }) => (input === undefined ? undefined : BUILT_IN) }),
    ),
    name: honoured(z.string().max(64)),
    description: honoured(z.string().nullish()),
    parameters: honoured(z.record(z.string(), z.unknown()).nullish()),
    strict: honoured(z.boolean().nullish()),
    defer_loading: refused('tools are all shown at once', false),
  },
  { tag: 'type' },
);

const format = checkedObject({
  type: honoured(z.enum(['text', 'json_object', 'json_schema'])),
  name: honoured(z.string().nullish()),
  description: ignored(),
  schema: honoured(z.record(z.string(), z.unknown()).nullish()),
  strict: honoured(z.boolean().nullish()),
});
const text = checkedObject({
  format: honoured(format.schema.nullish(), format),
  verbosity: refused('this model cannot be told how much to say', 'medium'),
});

const NO_REASONING = 'this model does not reason before it answers';
const reasoning = checkedObject({
  effort: refused(NO_REASONING, 'none'),
  mode: refused(NO_REASONING, 'standard'),
  // There is no reasoning that could be told, summed up or kept.
  summary: ignored(),
  generate_summary: ignored(),
  context: ignored(),
});

const streamOptions = checkedObject({ include_obfuscation: ignored(false) });

const namedFunction = z.strictObject({ type: z.literal('function'), name: z.string() });
const toolChoice = z
  .union(
    [
      z.enum(['auto', 'none', 'required']),
      namedFunction,
      z.strictObject({
        type: z.literal('allowed_tools'),
        mode: z.enum(['auto', 'required']),
        tools: z.array(namedFunction).min(1).max(TOOLS_MAX),
      }),
    ],
    'expected "auto", "none", "required", {"type": "function", "name": …}, or ' +
      '{"type": "allowed_tools", "mode": …, "tools": […]}',
  )
  .nullish();

export const RESPONSE_FIELDS = {
  model: CHAT_FIELDS.model,
  input: honoured(
    z.union(
      [z.string(), listOf(item.schema, { min: 1, max: MESSAGES_MAX })],
      'expected a string, or a list of items',
    ),
    item,
  ),
  instructions: honoured(z.string().nullish()),
  max_output_tokens: honoured(z.int().min(1).nullish()),
  temperature: CHAT_FIELDS.temperature,
  top_p: CHAT_FIELDS.top_p,
  parallel_tool_calls: CHAT_FIELDS.parallel_tool_calls,
  tools: honoured(listOf(functionTool.schema, { max: TOOLS_MAX }).nullish(), functionTool),
  tool_choice: honoured(toolChoice),
  text: honoured(text.schema.nullish(), text),
  stream: CHAT_FIELDS.stream,
  stream_options: honoured(streamOptions.schema.nullish(), streamOptions),
  user: CHAT_FIELDS.user,

  previous_response_id: refused(STATELESS),
  conversation: refused(STATELESS),
  prompt: refused('templates of prompts are not stored here; send `instructions` and `input`'),
  background: refused('an answer is computed while its client waits', false),
  background_options: ignored(),
  context_management: refused('prompts are not cut', []),
  truncation: refused('prompts are not cut', 'disabled'),
  top_logprobs: refused('log-probabilities come from /v1/chat/completions', 0),
  reasoning: honoured(reasoning.schema.nullish(), reasoning),
  max_tool_calls: refused('it is for built-in tools, which are not supported'),
  moderation: refused('moderation is not supported'),

  // These do not change the answer.
  include: ignored([]),
  store: ignored(false),
  metadata: ignored({}),
  service_tier: ignored(),
  prompt_cache_key: ignored(),
  prompt_cache_options: ignored(),
  prompt_cache_retention: ignored(),
  access_programs: ignored(),
  image: ignored(),
  safety_identifier: ignored(),

  mask: CHAT_FIELDS.mask,
  kv: CHAT_FIELDS.kv,
  maskroute: CHAT_FIELDS.maskroute,
} as const satisfies FieldTable;
export const responsesRequest = checkedObject(RESPONSE_FIELDS);
export type ResponsesRequest = z.infer<typeof responsesRequest.schema>;

/**
 * Converts a request to a chat completion. @throws MaskrouteError `invalid_request`, with the Responses API's field
 * names.
 */
export function chatOfResponse(request: ResponsesRequest): ChatRequest {
  const { model, stream, temperature, top_p, user, mask, kv, maskroute } = request;
  const { tools, tool_choice, parallel_tool_calls, max_output_tokens } = request;
  return inItsWords(() =>
    parse(chatOfItems.schema, {
      model,
      stream,
      temperature,
      top_p,
      user,
      mask,
      kv,
      maskroute,
      parallel_tool_calls,
      messages: messagesOf(request),
      max_completion_tokens: max_output_tokens,
      response_format: formatOf(request.text?.format),
      tools: tools?.map(({ type, ...described }) => ({ type, function: described })),
      tool_choice: toolChoiceOf(tool_choice),
    }),
  );
}

function toolChoiceOf(choice: ResponsesRequest['tool_choice']): ChatRequest['tool_choice'] {
  if (typeof choice !== 'object' || choice === null) return choice;
  const named = ({ name }: z.infer<typeof namedFunction>) => ({
    type: 'function' as const,
    function: { name },
  });
  if (choice.type === 'function') return named(choice);
  const { type, mode, tools } = choice;
  return { type, allowed_tools: { mode, tools: tools.map(named) } };
}

function formatOf(wanted: z.infer<typeof format.schema> | null | undefined): unknown {
  if (wanted?.type !== 'json_schema') return wanted == null ? wanted : { type: wanted.type };
  const { type, name, schema, strict } = wanted;
  return { type, json_schema: { name, schema, strict } };
}

function messagesOf({ input, instructions }: ResponsesRequest): ChatMessage[] {
  const messages: ChatMessage[] = instructions == null ? [] : [{ role: 'system', content: instructions }];
  if (typeof input === 'string') return [...messages, { role: 'user', content: input }];
  for (const one of input) addItem(messages, one);
  return messages;
}

/** Consecutive calls and the text before them become one assistant message. */
function addItem(messages: ChatMessage[], { type, role, content, call_id, name, ...one }: Item): void {
  switch (type) {
    case undefined:
    case null:
    case 'message':
      messages.push({ role: role!, content: textOf(content) });
      return;
    case 'function_call': {
      const call = {
        id: call_id!,
        type: 'function',
        function: { name: name!, arguments: one.arguments! },
      } as const;
      const last = messages.at(-1);
      if (last?.role === 'assistant') last.tool_calls = [...(last.tool_calls ?? []), call];
      else messages.push({ role: 'assistant', content: null, tool_calls: [call] });
      return;
    }
    case 'function_call_output':
      messages.push({ role: 'tool', tool_call_id: call_id!, content: textOf(one.output) });
      return;
    case 'reasoning':
      return;
  }
}

const textOf = (content: Item['content']): string =>
  typeof content === 'string' ? content : (content ?? []).map((one) => one.text).join('');

/**
 * The data of an `error` event: the fields of OpenAI's type, and the `error` object of all other errors here, since some
 * clients read the former and some the latter. `sequence_number`: of this event.
 */
export const errorEventOf = ({ error }: WireError, sequence_number: number) => {
  const { code, message, param } = error;
  return { type: 'error', sequence_number, code, message, param, error };
};

/** Field names of a chat completion, and their names in the Responses API. */
const NAMES: readonly (readonly [RegExp, string])[] = [
  [/^response_format(\.json_schema)?/, 'text.format'],
  [/^(tools\[\d+\])\.function/, '$1'],
  [/^max_completion_tokens/, 'max_output_tokens'],
  [/^messages(\[\d+\])?/, 'input'],
];

/** Translates the field names of errors about the chat to those of the request. */
function inItsWords<Result>(work: () => Result): Result {
  try {
    return work();
  } catch (error) {
    throw translated(error);
  }
}

export function translated(error: unknown): unknown {
  if (!(error instanceof MaskrouteError) || error.param === null) return error;
  const { code, message, param } = error;
  const [pattern, name] = NAMES.find(([one]) => one.test(param)) ?? [];
  if (pattern === undefined) return error;
  const renamed = param.replace(pattern, name!);
  const words = message.startsWith(param) ? renamed + message.slice(param.length) : message;
  return new MaskrouteError(code, words, { param: renamed, cause: error });
}
