/** Schemas as grammars: whatever the grammar lets through parses and is valid; what cannot be kept is refused at once. */
import Ajv from 'ajv/dist/2020.js';
import addFormats from 'ajv-formats';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { schemaGrammar } from '../../../gpu-backend/grammar/json-schema.ts';
import { type GrammarPlayer, openGrammarPlayer } from '../../support/grammar-player.ts';

let player: GrammarPlayer;
beforeAll(async () => {
  player = await openGrammarPlayer();
}, 60_000);
afterAll(async () => {
  await player[Symbol.asyncDispose]();
});

const object = (properties: Record<string, unknown>, more: object = {}) => ({
  ...{ type: 'object', properties, required: Object.keys(properties), additionalProperties: false },
  ...more,
});

const KEPT: Record<string, unknown> = {
  'plain types': object({
    a: { type: 'string' },
    b: { type: 'integer' },
    c: { type: 'number' },
    d: { type: 'boolean' },
    e: { type: 'null' },
  }),
  'optional properties': object(
    {
      a: { type: 'integer' },
      b: { type: 'boolean' },
      'c "d"': { type: 'null' },
      e: { enum: ['x', 1, null, { y: [2] }] },
    },
    { required: ['b'] },
  ),
  'lists and tuples': object({
    some: { type: 'array', items: { type: 'integer' }, minItems: 2, maxItems: 4 },
    none: { type: 'array', items: { type: 'integer' }, maxItems: 0 },
    pair: {
      type: 'array',
      prefixItems: [{ type: 'string' }, { type: 'boolean' }],
      minItems: 2,
      items: false,
    },
  }),
  'lengths of strings': object({
    a: { type: 'string', maxLength: 5 },
    b: { type: 'string', minLength: 2, maxLength: 6 },
  }),
  patterns: object({
    a: { type: 'string', pattern: '^[a-z]{2,4}(-\\d+)?$' },
    b: { type: 'string', pattern: '^(?:"\\w"|\\\\)$' },
    c: { type: 'string', pattern: '^[^a]\\s?x$' },
  }),
  formats: object(
    Object.fromEntries(
      ['date-time', 'date', 'time', 'duration', 'uuid', 'email', 'hostname', 'ipv4', 'ipv6', 'uri'].map(
        (format) => [format, { type: 'string', format }],
      ),
    ),
  ),
  'bounds of numbers': object({
    a: { type: 'integer', minimum: -12, maximum: 1305 },
    b: { type: 'integer', exclusiveMinimum: 7, maximum: 9 },
    c: { type: 'number', exclusiveMinimum: 0 },
    d: { type: 'number', minimum: -1.5, exclusiveMaximum: 2.25 },
    e: { type: 'number', minimum: 0.1, maximum: 0.5 },
    f: { type: 'integer', maximum: -3 },
  }),
  choices: {
    anyOf: [
      object({ kind: { const: 'a' }, value: { type: ['string', 'null'] } }),
      object({ kind: { const: 'b' }, value: { oneOf: [{ type: 'integer' }, { type: 'boolean' }] } }),
    ],
  },
  'a tree': {
    $ref: '#/$defs/node',
    $defs: {
      node: object({
        name: { type: 'string' },
        children: { type: 'array', items: { $ref: '#/$defs/node' } },
      }),
    },
  },
  'a dictionary': {
    type: 'object',
    additionalProperties: { type: 'integer' },
    propertyNames: { pattern: '^[a-c]+$' },
  },
  anything: object({ any: {} }),
};

describe('what is generated is valid', () => {
  const ajv = addFormats.default(new Ajv.default({ strict: false, validateFormats: true }));
  test.each(Object.keys(KEPT))('%s', { timeout: 60_000 }, async (name) => {
    const schema = KEPT[name]!;
    const isValid = ajv.compile(schema as object);
    const answer = schemaGrammar(schema, { strict: true, param: 'schema' });
    let ended = 0;
    for (let seed = 0; seed < 12; seed++) {
      const played = await player.play({ answer, calls: undefined }, seed);
      if (!played.ended) continue;
      ended++;
      const value = JSON.parse(played.text);
      expect(isValid(value), `${played.text} ${JSON.stringify(isValid.errors)}`).toBe(true);
    }
    expect(ended).toBeGreaterThan(6);
  });
});
