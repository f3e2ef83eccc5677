/** The one interface behind which every encoder stands, at the edge and in calibration, and which text of a request it embeds. */
import type { EncoderSpec } from '../mask/mask-set.ts';
import { type ChatRequest, type CompletionRequest, messageText } from '../wire/openai.ts';

export interface Encoder {
  readonly spec: EncoderSpec;
  /** It computes where it is called and waits for nobody: no clock could stop it, so none is set. */
  readonly isLocal?: true;
  /**
   * One L2-normalised vector of `spec.dimensions` a text; an empty or unknown text gives the zero vector.
   * Rejects when the encoder fails or `signal` aborts. `region` is where the texts come from, for an encoder that runs
   * in several places.
   */
  embed(texts: readonly string[], signal?: AbortSignal, region?: string): Promise<Float32Array[]>;
}

/** Longer prompts are cut before they are embedded: enough to tell the kind, bounded for the edge's CPU. */
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
 * Which text of a request is embedded. It is always one of the conversation's opening, which stays the same while
 * the conversation grows, so the mask (and the prefix cache that depends on it) stays too: a policy says which part
 * of the opening counts, not that a later message may move a conversation to another mask.
 */

/* How a conversation opened: the part of it that every later request of the conversation repeats. */

/**
 * Everything before the first answer to a user; a greeting that comes before anybody asked is part of it. It is the
 * same however long the conversation gets, so what is decided by it alone stays decided, in every isolate and with
 * nothing remembered.
 */
export function opening<M extends { readonly role: string }>(messages: readonly M[]): readonly M[] {
  const firstUser = messages.findIndex(({ role }) => role === 'user');
  const firstAnswer = messages.findIndex(({ role }, index) => role === 'assistant' && index > firstUser);
  return firstUser === -1 || firstAnswer === -1 ? messages : messages.slice(0, firstAnswer);
}

/**
 * `first_user`: the first question, `last_user`: the last one before the first answer (for clients that put
 * instructions into a user message of their own), `conversation`: all of the opening, the system's part included.
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
