/** The interface of every encoder, at the edge and in calibration, and the choice of the text that is embedded. */
import type { EncoderSpec } from '../mask/mask-set.ts';
import { type ChatRequest, type CompletionRequest, messageText } from '../wire/openai.ts';

export interface Encoder {
  readonly spec: EncoderSpec;
  /**
   * For each text an L2-normalised vector of `spec.dimensions`; the zero vector for a text that is empty or has no
   * known token. Rejects when the encoder fails or `signal` aborts.
   */
  embed(texts: readonly string[], signal?: AbortSignal): Promise<Float32Array[]>;
}

/** Longer texts are cut before they are embedded: this is enough to tell the kind, and bounds the edge's CPU time. */
export const EMBED_CHARS_MAX = 4000;

/* Vector arithmetic that every encoder shares. */

/** Scales to length 1 in place and returns it; the zero vector stays as it is. */
export function normalise(vector: Float32Array): Float32Array {
  let squares = 0;
  for (const value of vector) squares += value * value;
  if (squares === 0) return vector;
  const factor = 1 / Math.sqrt(squares);
  for (let i = 0; i < vector.length; i++) vector[i] = vector[i]! * factor;
  return vector;
}

/*
 * The choice of the text that is embedded. It is always part of the conversation's opening, which stays the same while
 * the conversation grows, so the mask (and the prefix cache, which depends on it) stays, too. A routing policy says
 * which part of the opening is used; later messages never change the mask.
 */

/**
 * The opening of a conversation: everything before the first answer to a user, including a greeting before the first
 * question. Every later request of the conversation repeats it, so decisions that depend only on it stay the same in
 * every isolate without any state.
 */
export function opening<M extends { readonly role: string }>(messages: readonly M[]): readonly M[] {
  const firstUser = messages.findIndex(({ role }) => role === 'user');
  const firstAnswer = messages.findIndex(({ role }, index) => role === 'assistant' && index > firstUser);
  return firstUser === -1 || firstAnswer === -1 ? messages : messages.slice(0, firstAnswer);
}

/**
 * Routing policies: which part of the opening is embedded. `first_user`: the first user message. `last_user`: the last
 * user message before the first answer (for clients that put instructions into a separate user message).
 * `conversation`: the whole opening, including system messages.
 */
export const ROUTING_POLICIES = ['first_user', 'last_user', 'conversation'] as const;
export type RoutingPolicy = (typeof ROUTING_POLICIES)[number];

export function chatRouteText(
  request: Pick<ChatRequest, 'messages'>,
  policy: RoutingPolicy = 'first_user',
): string {
  const messages = opening(request.messages);
  const users = messages.filter((message) => message.role === 'user');
  switch (policy) {
    case 'first_user':
      return cut(users[0] === undefined ? '' : messageText(users[0]));
    case 'last_user':
      return cut(users.length === 0 ? '' : messageText(users.at(-1)!));
    case 'conversation':
      return cut(messages.map(messageText).join('\n'));
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
