/** One JSON object a line: what Workers Logs and `wrangler tail` read. Never a key, never a prompt. */

export function log(
  level: 'info' | 'warn' | 'error',
  event: string,
  fields: Record<string, string | number | boolean | null | undefined> = {},
): void {
  console[level](JSON.stringify({ level, event, ...fields }));
}
