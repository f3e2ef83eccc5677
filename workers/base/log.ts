/** One JSON object a line: what Workers Logs and `wrangler tail` read. Never a key, never a prompt. */

export function log(
  level: 'info' | 'warn' | 'error',
  event: string,
  fields: Record<string, string | number | boolean | null | undefined> = {},
): void {
  console[level](JSON.stringify({ level, event, ...fields }));
}

/** The innermost cause: database layers wrap it in the statement and its parameters, which are not for logs. */
export function reasonOf(error: unknown): string {
  let cause = error;
  while (cause instanceof Error && cause.cause !== undefined) cause = cause.cause;
  return String(cause);
}
