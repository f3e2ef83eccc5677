/**
 * The schema of a body, cut to the fields that the body has. The runtime lets no library compile its schemas, and a
 * field that is absent takes as long to look at as one that is there: of thirty, most bodies have four.
 */
import type { z } from 'zod';

/** Clients send the same fields again and again; who does not is checked with the whole schema. */
const CUTS_MAX = 64;

/**
 * Gives for a value a schema that judges it as `schema` does, with the same issues in the same order. Only fields that
 * may be absent, and have no default then, are left out.
 */
export function fittedTo<T extends z.ZodObject>(schema: T): (value: unknown) => T {
  const fields = Object.keys(schema.shape);
  const always = new Set(fields.filter((field) => !mayBeAbsent(schema.shape[field]!)));
  const cuts = new Map<string, T>();
  return (value) => {
    if (typeof value !== 'object' || value === null) return schema;
    const kept = fields.filter((field) => always.has(field) || Object.hasOwn(value, field));
    const name = kept.join();
    const known = cuts.get(name);
    if (known !== undefined) return known;
    if (cuts.size >= CUTS_MAX) return schema;
    // Its output lacks what would have been undefined, so it has the type of the whole schema's.
    const mask = Object.fromEntries(kept.map((field) => [field, true as const]));
    const cut = schema.pick(mask as never) as unknown as T;
    cuts.set(name, cut);
    return cut;
  };
}

function mayBeAbsent(field: z.core.$ZodType): boolean {
  const parsed = (field as z.ZodType).safeParse(undefined);
  return parsed.success && parsed.data === undefined;
}
