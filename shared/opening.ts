/** How a conversation opened: the part of it that every later request of the conversation repeats. */

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
