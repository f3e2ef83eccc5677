/** A schema cut to the fields of a body judges the body as the whole schema does, to the last issue. */
import { describe, expect, it } from 'vitest';
import type { z } from 'zod';
import { chatRequestSchema, completionRequestSchema } from '../../shared/openai.ts';
import { fittedTo } from '../../workers/middleware/fitted-schema.ts';

const GOOD: Record<string, unknown> = {
  model: 'm',
  messages: [{ role: 'user', content: 'hi', extra: 1 }],
  prompt: 'hi',
};

/** One of each kind for every field: some it takes, some it refuses. */
const VALUES = [null, undefined, true, -1, 0, 1.5, 3, '', 'text', [], ['a'], [1], [{}], {}, { type: 'text' }];

/** The value, or the issues; as text, so that what only one of them has shows. */
function judged(schema: z.ZodType, value: unknown): string {
  const { success, data, error } = schema.safeParse(value);
  return JSON.stringify(success ? sorted(data as object) : error.issues);
}
const sorted = (value: object) => Object.entries(value).sort(([a], [b]) => (a < b ? -1 : 1));

describe.each([
  ['chat', chatRequestSchema],
  ['completion', completionRequestSchema],
] as const)('%s', (_name, schema) => {
  const fields = Object.keys(schema.shape);

  it('with any value in any field', () => {
    const fitted = fittedTo(schema as z.ZodObject);
    for (const field of [...fields, 'unknown', 'constructor']) {
      for (const value of VALUES) {
        const body = { ...GOOD, [field]: value };
        expect([field, judged(fitted(body), body)]).toEqual([field, judged(schema, body)]);
      }
    }
  });

  it('with fields missing, several wrong ones, and no object at all', () => {
    const fitted = fittedTo(schema as z.ZodObject);
    const wrong = { user: 7, n: 0, temperature: 'hot', model: 5 };
    const bodies = [{}, { model: 'm' }, wrong, { ...GOOD, ...wrong }, [], [1], null, 'text', 7];
    const own = JSON.parse('{"model":"m","messages":[],"prompt":[],"__proto__":{"n":0},"toString":1}');
    for (const body of [...bodies, own]) expect(judged(fitted(body), body)).toBe(judged(schema, body));
  });

  it('keeps no more cuts than it must, whatever clients send', () => {
    const fitted = fittedTo(schema as z.ZodObject);
    const seen = new Set<unknown>();
    for (let bits = 0; bits < 256; bits++) {
      const some = fields.filter((_field, at) => at < 8 && (bits >> at) % 2 === 1);
      const body = { ...GOOD, ...Object.fromEntries(some.map((field) => [field, null])) };
      seen.add(fitted(body));
      expect(judged(fitted(body), body)).toBe(judged(schema, body));
    }
    expect(seen.size).toBeLessThanOrEqual(65);
  });
});
