/**
 * The body that a backend gets: the client's own, and what was decided about it. The client's text stays as it is, and
 * the rest is put at its end: to write a prompt as JSON again would cost more than it costs to parse it. Only where the
 * client says something itself of what is put there is all of it written anew.
 */

/** A JSON object, and the text that it was parsed from. */
export type ClientBody = { readonly value: object; readonly text: string };

/** @param value not empty, nor is `added`, whose fields win. */
export function forwardedBody({ value, text }: ClientBody, added: Record<string, unknown>): string {
  if (Object.keys(added).some((name) => Object.hasOwn(value, name))) {
    return JSON.stringify({ ...value, ...added });
  }
  return `${text.slice(0, text.lastIndexOf('}'))},${JSON.stringify(added).slice(1)}`;
}
