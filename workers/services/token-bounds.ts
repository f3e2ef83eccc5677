/**
 * How many tokens a request can cost at most, told before it runs. The edge has no tokenizer of the model, but a
 * byte-level tokenizer never makes more tokens than there are bytes, and no sequence is longer than the context.
 */
import { type ChatMessage, messageText } from '../../shared/openai.ts';
import type { RoutableBody } from './routing.ts';

export type TokenBounds = {
  readonly prompt_tokens: number;
  /** With the longest answer that the request allows. */
  readonly wanted_tokens: number;
  /** What must be granted; fewer than wanted when the client left the length open. */
  readonly least_tokens: number;
  readonly choices: number;
  /** Whether the client said how long the answer may get. */
  readonly isOpen: boolean;
};

/** What a chat template adds: markers a message, and a system prompt of its own. */
const TEMPLATE_TOKENS = 32;
const MESSAGE_TOKENS = 8;
/** Of an answer whose length the client left open, at least this much has to be possible. */
const OPEN_ANSWER_LEAST_TOKENS = 16;
/** OpenAI's default for the legacy endpoint. */
const COMPLETION_DEFAULT_TOKENS = 16;
/** While no backend says what its context is. */
export const CONTEXT_UNKNOWN_TOKENS = 32_768;

export function tokenBounds(request: RoutableBody, context_tokens: number): TokenBounds {
  const prompts = promptBounds(request).map((tokens) => Math.min(tokens, context_tokens));
  const prompt_tokens = prompts.reduce((sum, tokens) => sum + tokens, 0);
  const choices = prompts.length * (request.body.n ?? 1);
  const asked = answerTokens(request);
  const longest = Math.min(asked ?? context_tokens, context_tokens);
  const wanted_tokens = prompt_tokens + choices * longest;
  const isOpen = asked === undefined;
  const least = Math.min(longest, OPEN_ANSWER_LEAST_TOKENS);
  return {
    prompt_tokens,
    wanted_tokens,
    least_tokens: isOpen ? prompt_tokens + choices * least : wanted_tokens,
    choices,
    isOpen,
  };
}

export const choicesOf = (request: RoutableBody): number =>
  promptBounds(request).length * (request.body.n ?? 1);

/** Undefined: until the context is full. */
const answerTokens = (request: RoutableBody): number | undefined =>
  request.kind === 'chat'
    ? (request.body.max_completion_tokens ?? request.body.max_tokens ?? undefined)
    : (request.body.max_tokens ?? COMPLETION_DEFAULT_TOKENS);

/** One number a prompt. */
function promptBounds(request: RoutableBody): number[] {
  if (request.kind === 'chat') {
    const { messages } = request.body;
    const bytes = messages.reduce((sum, message) => sum + messageBytes(message), 0);
    return [bytes + TEMPLATE_TOKENS + MESSAGE_TOKENS * messages.length];
  }
  const { prompt } = request.body;
  if (typeof prompt === 'string') return [byteLength(prompt) + 1];
  if (typeof prompt[0] === 'number') return [prompt.length];
  return (prompt as (string | number[])[]).map((one) =>
    typeof one === 'string' ? byteLength(one) + 1 : one.length,
  );
}

const messageBytes = (message: ChatMessage): number => byteLength(messageText(message));

/** Of its UTF-8, without making it: 3 a unit at most, exact for ASCII. */
function byteLength(text: string): number {
  let bytes = text.length;
  for (let i = 0; i < text.length; i++) {
    const code = text.charCodeAt(i);
    if (code > 0x7f) bytes += code > 0x7ff ? 2 : 1;
  }
  return bytes;
}
