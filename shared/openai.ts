/**
 * The OpenAI wire format, as far as Maskroute speaks it: request schemas (used by the edge and the backend)
 * and response types. Fields that we do not know are ignored, as OpenAI-compatible servers do; fields that
 * we know but cannot honour are refused, never dropped in silence.
 */
import { z } from 'zod';
import { BLOCK_COUNT_MAX, MASK_ID_PATTERN } from './mask.ts';
import { routeEchoSchema } from './protocol.ts';

/** Bodies over this size are refused with 413 before they are parsed. */
export const BODY_BYTES_MAX = 4 * 1024 * 1024;
export const STOP_COUNT_MAX = 16;
export const CHOICE_COUNT_MAX = 16;
export const TOP_LOGPROBS_MAX = 20;

const finite = z.number();
const tokenIds = z.array(z.int().min(0)).max(1_000_000);
const layers = z.array(z.int().min(0).max(BLOCK_COUNT_MAX)).max(BLOCK_COUNT_MAX);

/** `dense`, a mask id, or the layers to skip. */
export const maskFieldSchema = z.union([
  z.string().regex(MASK_ID_PATTERN, 'expected "dense" or a mask id'),
  z.strictObject({
    skipAttention: layers.default([]),
    skipFfn: layers.default([]),
    surrogate: z.boolean().default(false),
  }),
]);
export type MaskField = z.infer<typeof maskFieldSchema>;

const samplingFields = {
  model: z.string().min(1).max(300),
  stream: z.boolean().nullish(),
  stream_options: z.looseObject({ include_usage: z.boolean().nullish() }).nullish(),
  temperature: finite.min(0).max(2).nullish(),
  top_p: finite.gt(0).max(1).nullish(),
  presence_penalty: finite.min(-2).max(2).nullish(),
  frequency_penalty: finite.min(-2).max(2).nullish(),
  logit_bias: z.record(z.string().regex(/^\d+$/), finite.min(-100).max(100)).nullish(),
  seed: z.int().nullish(),
  stop: z
    .union([z.string().min(1).max(1000), z.array(z.string().min(1).max(1000)).max(STOP_COUNT_MAX)])
    .nullish(),
  n: z.int().min(1).max(CHOICE_COUNT_MAX).nullish(),
  user: z.string().max(512).nullish(),
  // vLLM's extras that clients send.
  top_k: z.int().min(-1).nullish(),
  min_p: finite.min(0).max(1).nullish(),
  repetition_penalty: finite.gt(0).max(10).nullish(),
  min_tokens: z.int().min(0).nullish(),
  ignore_eos: z.boolean().nullish(),
  stop_token_ids: z.array(z.int().min(0)).max(STOP_COUNT_MAX).nullish(),
  // Maskroute's own.
  mask: maskFieldSchema.nullish(),
  kv: z.enum(['preserve', 'elide']).nullish(),
  maskroute: routeEchoSchema.nullish(),
};

const textPart = z.looseObject({ type: z.literal('text'), text: z.string() });
const messageSchema = z.looseObject({
  role: z.enum(['system', 'developer', 'user', 'assistant', 'tool']),
  content: z.union([z.string(), z.array(textPart)]).nullish(),
  name: z.string().max(200).nullish(),
});
export type ChatMessage = z.infer<typeof messageSchema>;

/** Known to OpenAI's clients, but this server cannot honour them: refused when they ask for something. */
const refused = (what: string) =>
  z.unknown().refine((value) => value == null || (Array.isArray(value) && value.length === 0), {
    message: `${what} is not supported by this server`,
  });

/** What asks for no call, as clients say it that always say something. */
const noCall = z.enum(['none', 'auto'], 'tools are not supported by this server').nullish();

export const chatRequestSchema = z.looseObject({
  ...samplingFields,
  messages: z.array(messageSchema).min(1).max(2048),
  max_tokens: z.int().min(1).nullish(),
  max_completion_tokens: z.int().min(1).nullish(),
  logprobs: z.boolean().nullish(),
  top_logprobs: z.int().min(0).max(TOP_LOGPROBS_MAX).nullish(),
  response_format: z.looseObject({ type: z.literal('text') }).nullish(),
  tools: refused('tools').optional(),
  tool_choice: noCall,
  functions: refused('functions').optional(),
  function_call: noCall,
  modalities: z.array(z.literal('text')).nullish(),
  audio: refused('audio').optional(),
  web_search_options: refused('web search').optional(),
});
export type ChatRequest = z.infer<typeof chatRequestSchema>;

export const completionRequestSchema = z.looseObject({
  ...samplingFields,
  prompt: z.union([
    z.string(),
    z.array(z.string()).min(1).max(2048),
    tokenIds.min(1),
    z.array(tokenIds).min(1).max(2048),
  ]),
  max_tokens: z.int().min(0).nullish(),
  echo: z.boolean().nullish(),
  logprobs: z.int().min(0).max(TOP_LOGPROBS_MAX).nullish(),
  suffix: refused('suffix').optional(),
  best_of: z.int().min(1).nullish(),
  /** vLLM's: false leaves out the BOS that the model wants. */
  add_special_tokens: z.boolean().nullish(),
  /** llama.cpp's name: special tokens that a prompt's text spells out are these tokens. Otherwise they are text. */
  parse_special: z.boolean().nullish(),
});
export type CompletionRequest = z.infer<typeof completionRequestSchema>;

/** The text of a message, parts joined. */
export const messageText = (message: ChatMessage): string =>
  typeof message.content === 'string'
    ? message.content
    : (message.content ?? []).map((part) => part.text).join('');

export type FinishReason = 'stop' | 'length';
export type Usage = {
  prompt_tokens: number;
  completion_tokens: number;
  total_tokens: number;
  prompt_tokens_details: { cached_tokens: number };
};
export type TopLogprob = { token: string; logprob: number; bytes: number[] };
export type ChatLogprobs = { content: (TopLogprob & { top_logprobs: TopLogprob[] })[] };
/** The legacy format: parallel arrays, one entry a token. */
export type CompletionLogprobs = {
  tokens: string[];
  token_logprobs: (number | null)[];
  top_logprobs: (Record<string, number> | null)[];
  text_offset: number[];
};
