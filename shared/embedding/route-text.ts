/**
 * Which text of a request is embedded. The first user message by default: it stays the same while a
 * conversation grows, so the mask (and the prefix cache that depends on it) stays too.
 */
import type { ChatRequest, CompletionRequest } from '../openai.ts';
import { messageText } from '../openai.ts';
import { EMBED_CHARS_MAX } from './encoder.ts';

export const ROUTING_POLICIES = ['first_user', 'last_user', 'conversation'] as const;
export type RoutingPolicy = (typeof ROUTING_POLICIES)[number];

export function chatRouteText(
  request: Pick<ChatRequest, 'messages'>,
  policy: RoutingPolicy = 'first_user',
): string {
  const users = request.messages.filter((message) => message.role === 'user');
  switch (policy) {
    case 'first_user':
      return cut(users[0] === undefined ? '' : messageText(users[0]));
    case 'last_user':
      return cut(users.length === 0 ? '' : messageText(users.at(-1)!));
    case 'conversation':
      return cut(request.messages.map(messageText).join('\n'));
  }
}

/** `null` for token-id prompts: the edge has no tokenizer of the model, so they cannot be embedded. */
export function completionRouteText(request: Pick<CompletionRequest, 'prompt'>): string | null {
  const { prompt } = request;
  if (typeof prompt === 'string') return cut(prompt);
  const first = prompt[0];
  return typeof first === 'string' ? cut(first) : null;
}

const cut = (text: string): string => text.slice(0, EMBED_CHARS_MAX).trim();
