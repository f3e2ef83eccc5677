/**
 * The OpenAI wire format as Maskroute supports it: which request fields the edge and the backend honour, and the types
 * of answers. A field that would change the answer and is not honoured is refused by name; an ignored field is named in
 * the header `x-maskroute-ignored`; an unknown field is refused unless it is null, as OpenAI does.
 */
import { z } from 'zod';
import { BLOCK_COUNT_MAX, MASK_ID_PATTERN } from '../mask/mask.ts';
import { encoderSpecSchema } from '../mask/mask-set.ts';
import {
  checkedObject,
  type FieldTable,
  honoured,
  ignored,
  listOf,
  type ObjectOf,
  refused,
} from './fields.ts';
import { routeEchoSchema } from './protocol.ts';

/** Bodies over this size are refused with 413 before they are parsed. */
export const BODY_BYTES_MAX = 4 * 1024 * 1024;
const STOP_COUNT_MAX = 16;
const CHOICE_COUNT_MAX = 16;
const TOP_LOGPROBS_MAX = 20;

const flag = z.boolean().nullish();
const tokenId = z.int().min(0);
const TOKEN_IDS_MAX = 1_000_000;
const BIASES_MAX = 4096;
const PARTS_MAX = 4096;
const MODALITIES_MAX = 8;
/** Most tools of a request, and most calls of a message. */
export const TOOLS_MAX = 128;
/** 64 bits, signed or not. Only the first 53 count, as many as a JavaScript number has. */
const seed = z
  .number()
  .min(-(2 ** 63))
  .max(2 ** 64)
  .refine(Number.isInteger, 'expected a whole number')
  .meta({ type: 'integer' });
const layers = z.array(z.int().min(0).max(BLOCK_COUNT_MAX)).max(BLOCK_COUNT_MAX);

/** `dense`, a mask id, or the layers to skip. */
const maskFieldSchema = z.union(
  [
    z.string().regex(MASK_ID_PATTERN, 'expected "dense" or a mask id'),
    z.strictObject({
      skipAttention: layers.default([]),
      skipFfn: layers.default([]),
      surrogate: z.boolean().default(false),
    }),
  ],
  'expected "dense", a mask id, or an object with skipAttention, skipFfn and surrogate',
);
export type MaskField = z.infer<typeof maskFieldSchema>;

const FUNCTIONS = 'send `tools` and `tool_choice` instead';
const FORM = 'send `response_format` instead';
const CHAT_FORM = 'answers of a prescribed form are for /v1/chat/completions and /v1/responses';
const TEXT_ONLY = 'this model takes and gives text only';
const TEMPLATE = 'the prompt is written with the template of the model, which cannot be changed';
const NOT_HERE = 'this server does not support it';

const streamOptions = checkedObject({
  include_usage: honoured(flag),
  include_obfuscation: ignored(false),
  continuous_usage_stats: ignored(false),
});

/** Fields of both completions endpoints: OpenAI's, vLLM's, and Maskroute's own. */
const commonFields = {
  model: honoured(z.string().min(1).max(300)),
  stream: honoured(flag),
  stream_options: honoured(streamOptions.schema.nullish(), streamOptions),
  temperature: honoured(z.number().min(0).max(2).nullish()),
  /** With 0 the likeliest token is left. */
  top_p: honoured(z.number().min(0).max(1).nullish()),
  presence_penalty: honoured(z.number().min(-2).max(2).nullish()),
  frequency_penalty: honoured(z.number().min(-2).max(2).nullish()),
  logit_bias: honoured(
    z
      .custom<Record<string, number>>(
        (value) => typeof value !== 'object' || value === null || Object.keys(value).length <= BIASES_MAX,
        `expected at most ${BIASES_MAX} token ids`,
      )
      .pipe(z.record(z.string().regex(/^\d+$/, 'expected token ids as names'), z.number().min(-100).max(100)))
      .nullish(),
  ),
  seed: honoured(seed.nullish()),
  /** An empty string stops nothing, as at OpenAI. */
  stop: honoured(
    z
      .union(
        [z.string().max(1000), z.array(z.string().max(1000)).max(STOP_COUNT_MAX)],
        `expected a string, or a list of at most ${STOP_COUNT_MAX}`,
      )
      .nullish(),
  ),
  n: honoured(z.int().min(1).max(CHOICE_COUNT_MAX).nullish()),
  /** Experiments with `sticky: user` assign by it. */
  user: honoured(z.string().max(512).nullish()),

  top_k: honoured(z.int().min(-1).nullish()),
  min_p: honoured(z.number().min(0).max(1).nullish()),
  repetition_penalty: honoured(z.number().gt(0).max(10).nullish()),
  min_tokens: honoured(z.int().min(0).nullish()),
  ignore_eos: honoured(flag),
  stop_token_ids: honoured(z.array(z.int().min(0)).max(STOP_COUNT_MAX).nullish()),
  use_beam_search: refused('beam search is not supported', false),
  length_penalty: refused('it is for beam search, which is not supported', 1),
  early_stopping: refused('it is for beam search, which is not supported', false),
  include_stop_str_in_output: refused('answers end before the stop string', false),
  skip_special_tokens: refused('answers are without special tokens', true),
  /** It only concerns visible special tokens, and answers have none. */
  spaces_between_special_tokens: ignored(true),
  truncate_prompt_tokens: refused('prompts are not cut'),
  truncation_side: refused('prompts are not cut'),
  prompt_logprobs: refused('`echo` with `logprobs` at /v1/completions gives them'),
  logprob_token_ids: refused(NOT_HERE),
  allowed_token_ids: refused(NOT_HERE),
  bad_words: refused(NOT_HERE, []),
  logits_processors: refused(NOT_HERE, []),
  repetition_detection: refused(NOT_HERE),
  watermarking: refused(NOT_HERE, false),
  guided_json: refused(FORM),
  guided_regex: refused(FORM),
  guided_choice: refused(FORM, []),
  guided_grammar: refused(FORM),
  guided_decoding_backend: ignored(),
  guided_whitespace_pattern: refused(FORM),
  structural_tag: refused(FORM),
  structured_outputs: refused(FORM, {}),
  return_tokens_as_token_ids: refused(NOT_HERE, false),
  return_token_ids: refused(NOT_HERE, false),
  return_prompt_text: refused(NOT_HERE, false),
  prompt_embeds: refused(TEXT_ONLY),
  cache_salt: refused('prefix caches are separated by tenant only'),
  kv_transfer_params: refused(NOT_HERE),
  ec_transfer_params: refused(NOT_HERE),
  vllm_xargs: refused(NOT_HERE, {}),
  priority: ignored(0),
  request_id: ignored(),
  session_id: ignored(),

  mask: honoured(maskFieldSchema.nullish()),
  kv: honoured(z.enum(['preserve', 'elide']).nullish()),
  maskroute: honoured(routeEchoSchema.nullish()),
} as const satisfies FieldTable;

const textPart = checkedObject(
  {
    type: honoured(
      z.literal('text', {
        error: ({ input }) =>
          input === undefined ? undefined : `${TEXT_ONLY}, so a part has the type "text"`,
      }),
    ),
    text: honoured(z.string()),
    /** OpenAI's Agents SDK for JavaScript repeats the role of an answer in its parts. */
    role: ignored('assistant'),
    cache_control: ignored(),
    prompt_cache_breakpoint: ignored(),
  },
  { tag: 'type' },
);

const NAME = /^[A-Za-z0-9_.-]{1,64}$/;
const NAME_WORDS = 'expected 1 to 64 letters, digits, points, dashes and underscores';
const functionName = z.string().regex(NAME, NAME_WORDS);
const toolId = z.string().min(1).max(200);
/** JSON schemas are checked where grammars are made from them. */
const schemaField = z.record(z.string(), z.unknown());

const calledFunction = checkedObject({
  name: honoured(functionName),
  /** JSON as the model wrote it. */
  arguments: honoured(z.string()),
  /** Added by the `openai` client. */
  parsed_arguments: ignored(),
});
const toolCall = checkedObject({
  id: honoured(toolId),
  type: honoured(z.literal('function').nullish()),
  function: honoured(calledFunction.schema, calledFunction),
  index: ignored(),
  // Gemini's, as its own endpoint and LiteLLM pass them on.
  extra_content: ignored(),
  provider_specific_fields: ignored(),
});
export const toolCallSchema = toolCall.schema;
export type ToolCall = z.infer<typeof toolCallSchema>;

/** A text, whole or in parts; the parts are joined. */
const text = z.union(
  [z.string(), listOf(textPart.schema, { max: PARTS_MAX })],
  'expected a string, or a list of text parts',
);

export const MESSAGE_FIELDS = {
  role: honoured(
    z.enum(['system', 'developer', 'user', 'assistant', 'tool'], {
      error: ({ input }) => (input === 'function' ? 'send the role "tool" instead' : undefined),
    }),
  ),
  content: honoured(text.nullish(), textPart),
  /** Some chat templates use it. */
  name: honoured(z.string().max(200).nullish()),
  tool_calls: honoured(listOf(toolCall.schema, { max: TOOLS_MAX }).nullish(), toolCall),
  tool_call_id: honoured(toolId.nullish()),
  function_call: refused(FUNCTIONS),
  audio: refused(TEXT_ONLY),
  refusal: refused('this model gives no refusals apart from its text', ''),
  // Clients send these fields of an answer back, also of other servers' answers; earlier reasoning is not shown to the
  // model again.
  reasoning: ignored(''),
  reasoning_content: ignored(''),
  reasoning_details: ignored([]),
  thinking_blocks: ignored([]),
  provider_specific_fields: ignored({}),
  annotations: ignored([]),
  /** Added by the `openai` client to an answer that it has parsed. */
  parsed: ignored(),
  // lm-evaluation-harness gives whole messages the `type` of a part.
  type: ignored('text'),
  cache_control: ignored(),
} as const satisfies FieldTable;
const message = checkedObject(MESSAGE_FIELDS, {
  refine: ({ role, tool_call_id, tool_calls }) => {
    if (role === 'tool' && tool_call_id == null)
      return { path: 'tool_call_id', message: 'a message of a tool says which call it answers' };
    return role !== 'assistant' && (tool_calls?.length ?? 0) > 0
      ? { path: 'tool_calls', message: 'only an assistant calls tools' }
      : undefined;
  },
});
export type ChatMessage = z.infer<typeof message.schema>;

/** A function that the model may call. `strict`: schemas that a grammar cannot enforce are refused. */
const toolFunction = checkedObject({
  name: honoured(functionName),
  description: honoured(z.string().max(16_384).nullish()),
  parameters: honoured(schemaField.nullish()),
  strict: honoured(flag),
});
const tool = checkedObject(
  {
    type: honoured(
      z.literal('function', {
        error: ({ input }) =>
          input === undefined ? undefined : 'the only tools here are of the type "function"',
      }),
    ),
    function: honoured(toolFunction.schema, toolFunction),
    cache_control: ignored(),
  },
  { tag: 'type' },
);
export type Tool = z.infer<typeof tool.schema>;

const namedFunction = z.object({
  type: z.literal('function'),
  function: z.object({ name: functionName }),
});
/** Which of the tools an answer may call; the model is told of all of them. */
const allowedTools = z.object({
  mode: z.enum(['auto', 'required']),
  tools: z.array(namedFunction).min(1).max(TOOLS_MAX),
});
const toolChoice = z
  .union(
    [
      z.enum(['auto', 'none', 'required']),
      namedFunction,
      z.object({ type: z.literal('allowed_tools'), allowed_tools: allowedTools }),
    ],
    'expected "auto", "none", "required", {"type": "function", "function": {"name": …}}, or ' +
      '{"type": "allowed_tools", "allowed_tools": {"mode": …, "tools": […]}}',
  )
  .nullish();

/** A `tool_choice` in plain words. `names`: the only functions that may be called; undefined: all. */
export function readToolChoice(choice: z.infer<typeof toolChoice>): {
  readonly mode: 'auto' | 'none' | 'required';
  readonly names: readonly string[] | undefined;
  /** A named function is called once. */
  readonly isSingle: boolean;
} {
  if (typeof choice !== 'object' || choice === null)
    return { mode: choice ?? 'auto', names: undefined, isSingle: false };
  if (choice.type === 'function') return { mode: 'required', names: [choice.function.name], isSingle: true };
  const { mode, tools } = choice.allowed_tools;
  return { mode, names: tools.map((one) => one.function.name), isSingle: false };
}

const jsonSchemaFormat = checkedObject({
  name: honoured(functionName),
  description: ignored(),
  schema: honoured(schemaField.nullish()),
  strict: honoured(flag),
});
const responseFormat = checkedObject(
  {
    type: honoured(z.enum(['text', 'json_object', 'json_schema'])),
    json_schema: honoured(jsonSchemaFormat.schema.nullish(), jsonSchemaFormat),
  },
  {
    refine: ({ type, json_schema }) => {
      const isDue = type === 'json_schema';
      if (isDue === (json_schema != null)) return undefined;
      const wrong = 'it belongs to the type "json_schema", and to no other';
      return { path: 'json_schema', message: isDue ? 'it is missing, expected an object' : wrong };
    },
  },
);

/** What the answer probably repeats in large part: it comes sooner where it does. */
const prediction = checkedObject(
  { type: honoured(z.literal('content')), content: honoured(text, textPart) },
  { tag: 'type' },
);

/** Most messages of a chat, and most input items of the Responses API. */
export const MESSAGES_MAX = 2048;
const messages = (max: number) => honoured(listOf(message.schema, { min: 1, max }), message);

export const CHAT_FIELDS = {
  ...commonFields,
  messages: messages(MESSAGES_MAX),
  max_tokens: honoured(z.int().min(1).nullish()),
  max_completion_tokens: honoured(z.int().min(1).nullish()),
  logprobs: honoured(flag),
  top_logprobs: honoured(z.int().min(0).max(TOP_LOGPROBS_MAX).nullish()),
  best_of: refused('every choice that is sampled is returned', 1),

  response_format: honoured(responseFormat.schema.nullish(), responseFormat),
  tools: honoured(listOf(tool.schema, { max: TOOLS_MAX }).nullish(), tool),
  tool_choice: honoured(toolChoice),
  parallel_tool_calls: honoured(flag),
  prediction: honoured(prediction.schema.nullish(), prediction),
  functions: refused(FUNCTIONS, []),
  function_call: refused(FUNCTIONS, 'none', 'auto'),
  modalities: honoured(
    z
      .array(z.literal('text', `${TEXT_ONLY}, so only "text" can stand here`))
      .max(MODALITIES_MAX)
      .nullish(),
  ),
  audio: refused(TEXT_ONLY),
  mm_processor_kwargs: refused(TEXT_ONLY, {}),
  media_io_kwargs: refused(TEXT_ONLY, {}),
  web_search_options: refused('web search is not supported'),
  moderation: refused('moderation is not supported'),
  reasoning_effort: refused('this model does not reason before it answers', 'none'),
  thinking_token_budget: refused('this model does not reason before it answers', 0),
  include_reasoning: ignored(),
  verbosity: refused('this model cannot be told how much to say', 'medium'),
  documents: refused(TEMPLATE, []),
  chat_template: refused(TEMPLATE),
  chat_template_kwargs: refused(TEMPLATE, {}),
  add_generation_prompt: refused(TEMPLATE, true),
  continue_final_message: refused(TEMPLATE, false),
  add_special_tokens: refused(TEMPLATE, false),
  echo: refused('an answer does not repeat the last message', false),

  // These do not change the answer, only how it is stored, billed, found again, or how fast it comes.
  metadata: ignored({}),
  store: ignored(false),
  service_tier: ignored(),
  prompt_cache_key: ignored(),
  prompt_cache_options: ignored(),
  prompt_cache_retention: ignored(),
  safety_identifier: ignored(),
} as const satisfies FieldTable;

const chatOf = (fields: typeof CHAT_FIELDS) =>
  checkedObject(fields, {
    refine: ({ top_logprobs, logprobs, tools, tool_choice }) => {
      if (top_logprobs != null && logprobs !== true)
        return { path: 'top_logprobs', message: 'it needs `logprobs: true`' };
      const names = (tools ?? []).map((one) => one.function.name);
      const twice = names.find((name, i) => names.indexOf(name) !== i);
      if (twice !== undefined) return { path: 'tools', message: `two of them are called ${twice}` };
      const choice = readToolChoice(tool_choice);
      const unknown = choice.names?.find((name) => !names.includes(name));
      if (unknown !== undefined)
        return { path: 'tool_choice', message: `none of the tools is called ${unknown}` };
      return choice.mode === 'required' && names.length === 0
        ? { path: 'tool_choice', message: 'it needs `tools`' }
        : undefined;
    },
  });
export const chatRequest = chatOf(CHAT_FIELDS);
/** The chat that a Responses API request becomes: its instructions are one more message. */
export const chatOfItems = chatOf({ ...CHAT_FIELDS, messages: messages(MESSAGES_MAX + 1) });
export type ChatRequest = ObjectOf<typeof CHAT_FIELDS>;

export const COMPLETION_FIELDS = {
  ...commonFields,
  prompt: honoured(
    z.union(
      [
        z.string(),
        z.array(z.string()).min(1).max(2048),
        listOf(tokenId, { min: 1, max: TOKEN_IDS_MAX }),
        listOf(listOf(tokenId, { max: TOKEN_IDS_MAX }), { min: 1, max: 2048 }),
      ],
      'expected a string, a list of strings, token ids, or a list of lists of token ids',
    ),
  ),
  max_tokens: honoured(z.int().min(0).nullish()),
  echo: honoured(flag),
  logprobs: honoured(z.int().min(0).max(TOP_LOGPROBS_MAX).nullish()),
  best_of: honoured(z.int().min(1).nullish()),
  suffix: refused('a completion has nothing behind it', ''),
  response_format: refused(CHAT_FORM, { type: 'text' }),
  /** vLLM's field: false leaves out the model's BOS token. */
  add_special_tokens: honoured(flag),
  /**
   * llama.cpp's field: true reads special tokens that are spelled out in a prompt as tokens; otherwise they are text.
   */
  parse_special: honoured(flag),
} as const satisfies FieldTable;

export const completionRequest = checkedObject(COMPLETION_FIELDS, {
  refine: ({ best_of, n }) =>
    best_of != null && best_of !== (n ?? 1)
      ? { path: 'best_of', message: 'this server returns every choice that it samples, so it must equal `n`' }
      : undefined,
});
export type CompletionRequest = ObjectOf<typeof COMPLETION_FIELDS>;

/** A text, with its parts joined. */
export const joinedText = (content: z.infer<typeof text> | null | undefined): string =>
  typeof content === 'string' ? content : (content ?? []).map((part) => part.text).join('');

export const messageText = ({ content }: ChatMessage): string => joinedText(content);

/** All texts of a message that enter the prompt: its content, its name, and its tool calls. */
export const messageTexts = (message: ChatMessage): string[] => [
  messageText(message),
  message.name ?? '',
  ...(message.tool_calls ?? []).flatMap(({ id, function: called }) => [id, called.name, called.arguments]),
  message.tool_call_id ?? '',
];

export type FinishReason = 'stop' | 'length' | 'tool_calls';
export type Usage = {
  prompt_tokens: number;
  completion_tokens: number;
  total_tokens: number;
  prompt_tokens_details: { cached_tokens: number };
  /** With a `prediction`: predicted tokens that the answer has, and those that were computed in vain. */
  completion_tokens_details?: { accepted_prediction_tokens: number; rejected_prediction_tokens: number };
};
export type TopLogprob = { token: string; logprob: number; bytes: number[] };
export type ChatLogprobs = { content: (TopLogprob & { top_logprobs: TopLogprob[] })[]; refusal: null };
/** The legacy format: parallel arrays, one entry a token. */
export type CompletionLogprobs = {
  tokens: string[];
  token_logprobs: (number | null)[];
  top_logprobs: (Record<string, number> | null)[];
  text_offset: number[];
};

/* Embeddings. */

/** OpenAI's limit. */
const EMBEDDING_INPUTS_MAX = 2048;

/** OpenAI also takes token ids. Clients make them with the tokenizers of OpenAI's models, which no encoder here knows. */
const embeddedText = z.string({
  error: ({ input }) =>
    typeof input === 'number' || Array.isArray(input)
      ? 'token ids of another model are not supported; send texts'
      : undefined,
});

/** OpenAI's fields and vLLM's. */
export const EMBEDDING_FIELDS = {
  model: honoured(z.string().min(1).max(300)),
  input: honoured(
    z.union(
      [embeddedText, z.array(embeddedText).min(1).max(EMBEDDING_INPUTS_MAX)],
      `expected a text, or a list of at most ${EMBEDDING_INPUTS_MAX}`,
    ),
  ),
  encoding_format: honoured(z.enum(['float', 'base64']).nullish()),
  /** Only the encoder's own number: its vectors cannot be shortened. */
  dimensions: honoured(z.int().min(1).nullish()),
  user: ignored(),
  truncate_prompt_tokens: refused('texts are cut where the encoder ends, and nowhere else', -1),
  add_special_tokens: refused('a text gets the special tokens that the encoder wants', true),
  embed_dtype: refused('vectors are 32-bit floats', 'float32'),
  normalize: refused('vectors have the length 1', true),
  priority: ignored(0),
  request_id: ignored(),
} as const satisfies FieldTable;
export const embeddingsRequest = checkedObject(EMBEDDING_FIELDS);

/* Maskroute's own endpoints for clients. */

/** The answer of `POST /v1/route`: the whole routing decision and its timings, without generating anything. */
export const dryRunSchema = z.object({
  object: z.literal('maskroute.route'),
  request_id: z.string(),
  model: z.string(),
  /** The mask that the backend would get. */
  mask: maskFieldSchema,
  /** Null when only the backend can know it, for a mask that the client chose and the edge does not have. */
  sparsity: z.number().nullable(),
  /** Skipped layers; null when the edge does not have the mask. */
  skip: z.object({ attention: z.array(z.int()), ffn: z.array(z.int()) }).nullable(),
  /** The cluster's label. */
  label: z.string().nullable(),
  /** Euclidean distance to the centroid. */
  distance: z.number().nullable(),
  maskroute: routeEchoSchema,
  /** The conversation's own backend, which is asked first unless it is busy; null if there is only one backend. */
  backend: z.string().nullable(),
  /** The encoder that embedded the text; null when nothing was embedded. */
  encoder: encoderSpecSchema.nullable(),
  timings_ms: z.object({ assign: z.number(), embed: z.number(), route: z.number() }),
});
export type DryRun = z.infer<typeof dryRunSchema>;

/** The body of `POST /v1/feedback`. */
export const feedbackSchema = z.strictObject({
  /** The `id` of the completion, of the last six days. */
  id: z.string().regex(/^[A-Za-z0-9_.:-]{1,200}$/, 'expected the id of a completion'),
  rating: z.union([z.literal(1), z.literal(-1)]),
  comment: z.string().max(2000).optional(),
});
