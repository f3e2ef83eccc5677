/**
 * What a request is recognised by, so that the next one like it gets the same variant and the same version.
 * Nothing is remembered: the key is read off the request.
 */
import { type ChatRequest, type CompletionRequest, messageText } from './openai.ts';
import { opening } from './opening.ts';

/** The start of the conversation, the body's `user` field, or the API key. */
export const STICKY_KINDS = ['conversation', 'user', 'api_key'] as const;
export type StickyKind = (typeof STICKY_KINDS)[number];

/** A completion's prompt grows at its end while a conversation goes on, so only its beginning names it. */
const PROMPT_CHARS = 200;
const PROMPT_TOKENS = 50;
/** Enough to tell conversations apart; all of a long prompt would be hashed at every request. */
const MESSAGES = 8;
const MESSAGE_CHARS = 2000;

export type StickySource =
  | { readonly kind: 'chat'; readonly body: Pick<ChatRequest, 'messages' | 'user'> }
  | { readonly kind: 'completion'; readonly body: Pick<CompletionRequest, 'prompt' | 'user'> };

export type StickyCaller = { readonly tenant: string; readonly keyId: string };

/**
 * The key of `kind`, unlike that of any other tenant. A user and a conversation stay what they are when the
 * tenant changes its API key; a request without a `user` field is recognised by its conversation instead.
 */
export function stickyKey(kind: StickyKind, caller: StickyCaller, request: StickySource): string {
  switch (kind) {
    case 'api_key':
      return JSON.stringify(['api_key', caller.keyId]);
    case 'user':
      if (request.body.user == null) return stickyKey('conversation', caller, request);
      return JSON.stringify(['user', caller.tenant, request.body.user]);
    case 'conversation':
      return JSON.stringify(['conversation', caller.tenant, ...conversationStart(request)]);
  }
}

/** Everything up to the first answer, which stays as it is while the conversation grows. */
function conversationStart(request: StickySource): readonly unknown[] {
  if (request.kind === 'chat') {
    const start = opening(request.body.messages).slice(0, MESSAGES);
    return start.map((message) => [message.role, messageText(message).slice(0, MESSAGE_CHARS)]);
  }
  const { prompt } = request.body;
  if (typeof prompt === 'string') return [prompt.slice(0, PROMPT_CHARS)];
  const [first] = prompt;
  if (typeof first === 'number') return prompt.slice(0, PROMPT_TOKENS);
  return [typeof first === 'string' ? first.slice(0, PROMPT_CHARS) : first!.slice(0, PROMPT_TOKENS)];
}
