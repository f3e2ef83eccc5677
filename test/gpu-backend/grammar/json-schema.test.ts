/** Schemas as grammars: whatever the grammar lets through parses and is valid; what cannot be enforced is refused at once. */
import Ajv from 'ajv/dist/2020.js';
import addFormats from 'ajv-formats';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { z } from 'zod';
import { answerForm } from '../../../gpu-backend/api/answer-form.ts';
import type { ServedModel } from '../../../gpu-backend/api/parts.ts';
import { schemaGrammar } from '../../../gpu-backend/grammar/json-schema.ts';
import type { GrammarSpec } from '../../../gpu-backend/grammar/xgrammar.ts';
import { PLAIN_FORMAT } from '../../../gpu-backend/model/tokenizer/tool-format.ts';
import type { ChatRequest } from '../../../shared/wire/openai.ts';
import { type GrammarPlayer, openGrammarPlayer } from '../../support/grammar-player.ts';

let player: GrammarPlayer;
beforeAll(async () => {
  player = await openGrammarPlayer();
}, 60_000);
afterAll(async () => {
  await player[Symbol.asyncDispose]();
});

const object = (properties: Record<string, unknown>, more: object = {}) => ({
  type: 'object',
  properties,
  required: Object.keys(properties),
  additionalProperties: false,
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
    d: { type: 'string', pattern: '(^a$)|(?:b|^c)$' },
    e: { type: 'string', pattern: '^\\ud83d\\ude00[\\uD83D\\uDE80é]$' },
    f: { type: 'string', pattern: '^(a*acd|acc|cbba|bbc|ab|bbbcca)$' },
  }),
  'patterns that are written with one reading': object({
    a: { type: 'string', pattern: '^([a-z]{1,3} ?){2,4}$' },
    b: { type: 'string', pattern: '^([a-z]{2,5}[-_]?){2}$' },
    c: { type: 'string', pattern: '^((é|[a-z]"?|\\\\)*[a-z]?x?)*$' },
    d: { type: 'string', pattern: '^(.*a.*|.*\\t.*)+$' },
  }),
  'formats beside lengths that they keep': object({
    a: { type: 'string', format: 'uuid', minLength: 36, maxLength: 36 },
    b: { type: 'string', format: 'email', maxLength: 254 },
  }),
  formats: object(
    Object.fromEntries(
      ['date-time', 'date', 'time', 'duration', 'uuid', 'email', 'hostname', 'ipv4', 'ipv6', 'uri'].map(
        (format) => [format, { type: 'string', format }],
      ),
    ),
  ),
  'formats beside patterns that all their texts match': object({
    a: { type: 'string', format: 'date', pattern: '^[0-9-]+$' },
    b: { type: 'string', format: 'uuid', pattern: '^[0-9a-f-]{36}$' },
    c: { type: 'string', format: 'ipv4', pattern: '^(\\d{1,3}\\.){3}\\d{1,3}$' },
  }),
  "zod's formats": z.toJSONSchema(
    z.object({
      a: z.email(),
      b: z.uuid(),
      c: z.iso.datetime(),
      d: z.iso.date(),
      e: z.iso.duration(),
      f: z.ipv4(),
      g: z.ipv6(),
      h: z.hostname(),
      i: z.url(),
      j: z.uuidv4(),
      k: z.guid(),
    }),
  ),
  'bounds of numbers': object({
    a: { type: 'integer', minimum: -12, maximum: 1305 },
    b: { type: 'integer', exclusiveMinimum: 7, maximum: 9 },
    c: { type: 'number', exclusiveMinimum: 0 },
    d: { type: 'number', minimum: -1.5, exclusiveMaximum: 2.25 },
    e: { type: 'number', minimum: 0.1, maximum: 0.5 },
    f: { type: 'integer', maximum: -3 },
    g: { type: 'number', minimum: 486484700627.81903, maximum: 486484700627.88586 },
    h: { type: 'number', minimum: -4258081833.00126, exclusiveMaximum: -4258081833.0003 },
    i: { type: 'integer', minimum: -12345678, maximum: 12345678 },
    j: { type: 'number', minimum: -12345.5, maximum: 12345.5 },
    k: { type: 'number', minimum: 0.5, maximum: 12345.5 },
  }),
  choices: {
    anyOf: [
      object({ kind: { const: 'a' }, value: { type: ['string', 'null'] } }),
      object({ kind: { const: 'b' }, value: { oneOf: [{ type: 'integer' }, { type: 'boolean' }] } }),
    ],
  },
  'choices of one type': object({
    a: {
      type: 'integer',
      anyOf: [
        { minimum: 5, maximum: 9 },
        { type: 'number', exclusiveMaximum: 2 },
      ],
    },
    b: { type: ['string', 'null'], anyOf: [{ description: 'anything' }, { enum: ['x', 1] }] },
    c: { type: 'boolean', anyOf: [true, { type: 'string' }] },
    d: { type: 'string', anyOf: [{ const: 1 }, { const: 'x' }] },
  }),
  'choices of one valid schema': object({
    a: { oneOf: [{ const: 'x', title: 'the first' }, { const: 1 }, { enum: ['y', null] }] },
    b: { oneOf: [{ enum: ['x', 'y'] }, { type: ['integer', 'null'] }] },
    c: { oneOf: [{ type: ['string', 'number'] }, { type: 'boolean' }] },
  }),
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
  'a dictionary with names from elsewhere': {
    type: 'object',
    additionalProperties: { type: 'integer' },
    propertyNames: { $ref: '#/$defs/name' },
    $defs: { name: { enum: ['x', 'y'], type: 'string' } },
  },
  'a dictionary with names from further away': {
    type: 'object',
    additionalProperties: { type: 'integer' },
    propertyNames: { $ref: '#/$defs/alias' },
    $defs: { alias: { $ref: '#/$defs/name' }, name: { enum: ['x', 'y'] } },
  },
  'a dictionary with any names': {
    type: 'object',
    additionalProperties: { type: 'boolean' },
    propertyNames: true,
  },
  "zod's record with names from a list": z.toJSONSchema(z.record(z.enum(['x', 'y']), z.int())),
  anything: object({ any: {} }),
};

/** Of this process, whatever else the machine does. The least of three: compiling and collecting garbage add to the others. */
async function leastCpu_ms(work: () => Promise<unknown>): Promise<number> {
  const times: number[] = [];
  for (let attempt = 0; attempt < 3; attempt++) {
    const started = process.cpuUsage();
    await work();
    times.push(process.cpuUsage(started).user / 1000);
  }
  return Math.min(...times);
}

const ajv = addFormats.default(new Ajv.default({ strict: false, validateFormats: true }));

describe('what is generated is valid', () => {
  test.each(Object.keys(KEPT))('%s', { timeout: 60_000 }, async (name) => {
    const schema = KEPT[name]!;
    const isValid = ajv.compile(schema as object);
    const answer = schemaGrammar(schema, { strict: true, param: 'schema' });
    let ended = 0;
    for (let seed = 0; seed < 8; seed++) {
      const played = await player.play({ answer, calls: undefined }, seed);
      if (!played.ended) continue;
      ended++;
      const value = JSON.parse(played.text);
      expect(isValid(value), `${played.text} ${JSON.stringify(isValid.errors)}`).toBe(true);
    }
    expect(ended).toBeGreaterThan(4);
  });
});

test('a pattern that comes again uses the same rules, since all patterns of a request share their states', () => {
  const statesOf = (names: string) => {
    const pattern = '^([a-z]{1,20} ?){9}$';
    const schema = object(Object.fromEntries([...names].map((name) => [name, { type: 'string', pattern }])));
    return schemaGrammar(schema, { strict: true, param: 'schema' }).match(/^text_\w+ ::=/gm)?.length;
  };
  expect(statesOf('a')).toBe(310);
  expect(statesOf('abc')).toBe(310);
});

test('an object whose names are listed has none of them twice', async () => {
  const schema = {
    type: 'object',
    propertyNames: { enum: ['a', 'b', 'c'] },
    additionalProperties: { type: 'null' },
  };
  const answer = schemaGrammar(schema, { strict: true, param: 'schema' });
  const all = new Set<string>();
  for (let seed = 0; seed < 20; seed++) {
    const { text } = await player.play({ answer, calls: undefined }, seed);
    expect(text).toBe(JSON.stringify(JSON.parse(text)).replaceAll(':', ': ').replaceAll(',', ', '));
    all.add(text);
  }
  expect(all.size).toBeGreaterThan(3);
});

test('beside a class such as \\d a dash is a dash, as in regular expressions without the flag u', async () => {
  const pattern = '^[\\d-_]{8}$';
  const answer = schemaGrammar({ type: 'string', pattern }, { strict: true, param: 'schema' });
  for (let seed = 0; seed < 4; seed++) {
    const { text } = await player.play({ answer, calls: undefined }, seed);
    expect(JSON.parse(text)).toMatch(new RegExp(pattern));
  }
});

test('a `$ref` is an address: its escapes are read before those of the pointer', () => {
  const $defs = { 'a/b ~%': { type: 'null' }, '100%': { type: 'boolean' } };
  const grammar = (place: string) =>
    schemaGrammar({ $ref: `#/$defs/${place}`, $defs }, { strict: true, param: 'schema' });
  for (const place of ['a~1b ~0%25', 'a%7E1b%20%7E0%25', 'a%2fb%20~0%25'])
    expect(grammar(place), place).toContain('schema_1 ::= ("null"');
  expect(grammar('100%')).toContain('"true"');
});

test('a bound that OpenAPI 3.0 excludes is excluded', () => {
  const grammar = (schema: object) =>
    schemaGrammar({ type: 'integer', ...schema }, { strict: true, param: 'schema' });
  const bounds = { minimum: 7, maximum: 90 };
  const newer = { exclusiveMinimum: 7, exclusiveMaximum: 90 };
  expect(grammar({ ...bounds, exclusiveMinimum: true, exclusiveMaximum: true })).toBe(grammar(newer));
  expect(grammar({ ...bounds, exclusiveMinimum: false, exclusiveMaximum: false })).toBe(grammar(bounds));
  expect(grammar({ exclusiveMinimum: true })).toBe(grammar({}));
});

test.each<[string, object, object]>([
  ['null beside a type', { type: 'string', nullable: true }, { type: ['string', 'null'] }],
  [
    "zod's lengths without a bound",
    { type: 'string', maxLength: Number.MAX_SAFE_INTEGER },
    { type: 'string' },
  ],
  ['two lower bounds, of one number', { minimum: 7, exclusiveMinimum: 7 }, { exclusiveMinimum: 7 }],
  ['two lower bounds', { minimum: 7, exclusiveMinimum: 5 }, { minimum: 7 }],
  ['two upper bounds', { maximum: 7, exclusiveMaximum: 9 }, { maximum: 7 }],
  [
    'a tuple that ends early',
    { prefixItems: [{ type: 'null' }, { type: 'boolean' }], maxItems: 1 },
    { prefixItems: [{ type: 'null' }] },
  ],
  ['a tuple of older drafts', { items: [{ type: 'null' }] }, { prefixItems: [{ type: 'null' }] }],
  ['no items at all', { items: false }, { maxItems: 0 }],
  [
    'a required property that the others describe',
    { required: ['a'], additionalProperties: { type: 'null' } },
    { properties: { a: { type: 'null' } }, required: ['a'] },
  ],
  [
    'any names beside named ones',
    { properties: { a: {} }, propertyNames: { type: 'string', title: 'A name' } },
    { properties: { a: {} } },
  ],
])('%s: the same in other words', (_, schema, other) => {
  const grammar = (one: object) => schemaGrammar(one, { strict: true, param: 'schema' });
  expect(grammar(schema)).toBe(grammar(other));
});

test.each<[object, RegExp]>([
  [{ type: [] }, /at \/type: expected object, array/],
  [{ enum: [] }, /at \/enum: expected a list with a value/],
  [{ anyOf: [] }, /at \/anyOf: expected a list with a schema/],
  [{ $ref: 5 }, /at \/\$ref: expected a place in the same schema/],
  [{ properties: [] }, /at \/properties: expected an object of schemas/],
  [{ required: 'a' }, /at \/required: expected a list of names/],
  [{ required: ['a'], additionalProperties: false }, /at \/required: "a" is not in `properties`/],
  [{ propertyNames: { type: 'integer' } }, /at \/propertyNames: expected a schema of strings/],
  [{ propertyNames: { type: 'string', nullable: true } }, /at \/propertyNames: expected a schema of strings/],
  [{ propertyNames: { allOf: [{ type: 'integer' }] } }, /at \/propertyNames: expected a schema of strings/],
  [
    { propertyNames: { $ref: '#/$defs/a' }, $defs: { a: { $ref: '#/$defs/a' } } },
    /at \/propertyNames: it leads back to itself/,
  ],
  [{ prefixItems: {} }, /at \/prefixItems: expected a list of schemas/],
  [{ minItems: 2, maxItems: 1 }, /its `maxItems` is below its `minItems`/],
  [{ minItems: 2, prefixItems: [{}], items: false }, /at \/minItems: more items than there are schemas for/],
  [{ minLength: -1 }, /at \/minLength: expected a whole number/],
  [{ minLength: 2, maxLength: 1 }, /its `maxLength` is below its `minLength`/],
  [{ minimum: '1' }, /at \/minimum: expected a number/],
  [{ pattern: 5 }, /at \/pattern: expected a string/],
  [{ pattern: '^a$', maxLength: 5 }, /at \/pattern: beside a length it cannot be enforced/],
  [{ format: 'binary' }, /at \/format: expected one of date-time, date/],
  [{ allOf: [{ minimum: 1 }, { maximum: 2 }] }, /at \/allOf: .* write them as one schema/],
])('%j is refused where it is wrong', (schema, message) => {
  expect(() => schemaGrammar(schema, { strict: true, param: 'schema' })).toThrow(message);
});

test.each([true, false])('keys are strings, whatever leads to their schema (strict: %s)', (strict) => {
  const grammar = (propertyNames: object) => {
    const $defs = {
      alias: { $ref: '#/$defs/number' },
      number: { type: 'number' },
      name: { enum: ['x', 'y'] },
      both: { anyOf: [{ $ref: '#/$defs/name' }, { $ref: '#/$defs/number' }] },
      deep: { anyOf: [{ $ref: '#/$defs/both' }] },
    };
    const schema = { type: 'object', propertyNames, additionalProperties: { type: 'null' }, $defs };
    return schemaGrammar(schema, { strict, param: 'schema' });
  };
  for (const name of ['alias', 'number', 'deep'])
    expect(() => grammar({ $ref: `#/$defs/${name}` }), name).toThrow(/at \/propertyNames/);
  // Keys are no numbers anyway.
  expect(grammar({ $ref: '#/$defs/both' })).toContain('"x\\u0022"');
  expect(() => grammar({ anyOf: [{ $ref: '#/$defs/alias' }] })).toThrow(/at \/propertyNames/);
});

test('objects with the same fields in another order are one value for two schemas', () => {
  const oneOf = (...values: object[]) =>
    schemaGrammar({ oneOf: values.map((value) => ({ const: value })) }, { strict: true, param: 'schema' });
  expect(() => oneOf({ a: 1, b: [{ c: 2, d: 3 }] }, { b: [{ d: 3, c: 2 }], a: 1 })).toThrow(/valid for two/);
  expect(oneOf({ a: [1, 2] }, { a: [2, 1] })).toContain('root');
});

describe('what cannot be enforced', () => {
  const deep = (levels: number): unknown =>
    levels === 0 ? { type: 'null' } : object({ a: deep(levels - 1) });
  const many = (count: number) => Array.from({ length: count }, (_, i) => i);
  const beside = (format: string, pattern: string) => ({ type: 'string', format, pattern });
  const doubling = {
    $defs: Object.fromEntries(
      many(30).map((i) => [
        `d${i}`,
        i === 29
          ? { type: 'null' }
          : object({ a: { $ref: `#/$defs/d${i + 1}` }, b: { $ref: `#/$defs/d${i + 1}` } }),
      ]),
    ),
    $ref: '#/$defs/d0',
  };
  const chain = (length: number) => ({
    $defs: Object.fromEntries(
      many(length).map((i) => [
        `d${i}`,
        i === length - 1 ? { type: 'null' } : object({ a: { $ref: `#/$defs/d${i + 1}` } }),
      ]),
    ),
    $ref: '#/$defs/d0',
  });
  const unlike = (i: number) => (k: number) => String.fromCodePoint(0x4e00 + 2 * k + i);
  const HOSTILE: readonly (readonly [string, unknown, RegExp])[] = [
    ['a thousand nested objects', deep(1000), /nested more than 48 deep/],
    [
      'a hundred thousand properties',
      object(Object.fromEntries(many(100_000).map((i) => [`p${i}`, {}]))),
      /more than 2000 parts/,
    ],
    [
      'a megabyte of values',
      { enum: many(20_000).map((i) => `${i}`.padStart(50, 'x')) },
      /characters together/,
    ],
    ['a reference to itself', { $ref: '#' }, /leads back to itself/],
    [
      'references in a ring',
      {
        $defs: { a: { $ref: '#/$defs/b' }, b: { anyOf: [{ $ref: '#/$defs/a' }, { type: 'null' }] } },
        $ref: '#/$defs/a',
      },
      /leads back to itself/,
    ],
    ['a list that needs itself', { type: 'array', items: { $ref: '#' }, minItems: 1 }, /no finite value/],
    [
      'an object that needs itself',
      {
        $defs: { a: object({ a: { $ref: '#/$defs/a' } }) },
        anyOf: [{ $ref: '#/$defs/a' }, { type: 'null' }],
      },
      /no finite value/,
    ],
    ['long strings', { type: 'string', maxLength: 1_000_000 }, /limited length have more than 256/],
    [
      'a pattern that repeats repetitions',
      { type: 'string', pattern: '^((a{99}){99}){99}$' },
      /at \/pattern: it has more than 2048 characters/,
    ],
    [
      'a pattern that repeats a million times',
      { type: 'string', pattern: '^a{1000000,1000000}$' },
      /at \/pattern: it has more than 2048 characters/,
    ],
    [
      'a pattern with half of a surrogate pair',
      { type: 'string', pattern: '^\\ud83d$' },
      /at \/pattern: half of a surrogate pair is no character/,
    ],
    [
      'an emoji in a pattern that is not valid with the flag u',
      { type: 'string', pattern: '^\\_😀$' },
      /at \/pattern: half of .* with an emoji, the pattern has to be valid with the flag u/,
    ],
    [
      'a character that is generated nowhere',
      { type: 'string', pattern: '^\\x01$' },
      /at \/pattern: a character class has no character that can be generated/,
    ],
    [
      'an escape in a range that is a letter here and a bell there',
      { type: 'string', pattern: '^[\\a-\\z]$' },
      /at \/pattern: \\a is not supported/,
    ],
    ['a pattern that looks ahead', { type: 'string', pattern: '^(?=a)b$' }, /look-ahead/],
    ['millions of items', { type: 'array', minItems: 5_000_000 }, /more than 2000 items/],
    ['a place that is not there', { $ref: '#/$defs/nothing' }, /no such place/],
    ['another document', { $ref: 'https://example.com/a.json' }, /a place in the same schema/],
    [
      'a keyword without a grammar',
      { type: 'array', items: {}, uniqueItems: true },
      /at \/uniqueItems: it cannot be enforced/,
    ],
    ['options that overlap', { oneOf: [{ type: 'integer' }, { type: 'number' }] }, /valid for two/],
    [
      'options that are both null',
      { oneOf: [{ type: 'string', nullable: true }, { type: ['integer', 'null'] }] },
      /valid for two/,
    ],
    [
      'options that a property tells apart, unless they are null',
      {
        oneOf: [1, 2].map((kind) => ({
          type: ['object', 'null'],
          properties: { kind: { const: kind } },
          required: ['kind'],
        })),
      },
      /valid for two/,
    ],
    [
      'options, and an option without a type',
      { oneOf: [{ type: 'string' }, { minimum: 1 }] },
      /valid for two/,
    ],
    [
      'a property whose name is not allowed',
      object({ a: {} }, { propertyNames: { pattern: '^b' } }),
      /at \/propertyNames: beside named properties it cannot be enforced/,
    ],
    [
      'a required name that is not in the list of names',
      { type: 'object', propertyNames: { enum: ['x', 'y'] }, required: ['x', 'z'] },
      /at \/propertyNames: beside named properties it cannot be enforced/,
    ],
    ['bounds with nothing between them', { type: 'integer', minimum: 2, maximum: 1 }, /no number/],
    ['no value at all', false, /it allows no value/],
    ['a type that is none', { type: 'thing' }, /expected object, array/],
    ['a value of another type', { type: 'string', const: 5 }, /at \/const: none of its values has the type/],
    ['values and a length', { enum: ['a', 'bb'], minLength: 2 }, /beside `enum` it cannot be enforced/],
    [
      'a choice between schemas of another type',
      { type: 'string', anyOf: [{ type: 'null' }, { minimum: 1 }] },
      /none of its schemas has the type/,
    ],
    [
      'a reference to another type',
      { $defs: { a: { type: 'null' } }, type: 'string', anyOf: [{ $ref: '#/$defs/a' }] },
      /at \/anyOf: none of its schemas has the type/,
    ],
    [
      'a reference to another type, too',
      { $defs: { a: { type: ['null', 'string'] } }, type: 'string', anyOf: [{ $ref: '#/$defs/a' }] },
      /at \/anyOf\/0\/\$ref: it leads to a schema of other types/,
    ],
    [
      'a format beside a pattern that its texts do not match',
      { format: 'email', pattern: '^[a-z]+@example\\.com$' },
      /at \/pattern: it is not known to match every text that is generated for this `format`/,
    ],
    [
      'a format beside a pattern of one version',
      z.toJSONSchema(z.uuidv7()),
      /at \/pattern: it is not known to match every text/,
    ],
    [
      'a format beside a pattern that looks ahead',
      { format: 'email', pattern: '^(?!root)' },
      /at \/pattern: look-ahead and look-behind are not supported/,
    ],
    [
      'a format beside a pattern with many ways through it',
      { format: 'uri', pattern: `^${'(.*a|.*b)'.repeat(60)}$` },
      /at \/pattern: it is not known to match every text/,
    ],
    [
      'a format beside a pattern that repeats nothing very often',
      { format: 'uuid', pattern: '^((){999999}){999999}' },
      /at \/pattern: it is not known to match every text/,
    ],
    [
      'formats beside many patterns, each slow to compare',
      object(Object.fromEntries(many(100).map((i) => [`p${i}`, beside('email', `^.{0,${150 + i}}$`)]))),
      /pattern: it is not known to match every text/,
    ],
    [
      'a pattern that holds for texts of another format',
      beside('uuid', z.toJSONSchema(z.iso.duration()).pattern!),
      /at \/pattern: look-ahead and look-behind are not supported/,
    ],
    ['a format beside a length', { format: 'email', maxLength: 10 }, /6 to 142 characters/],
    [
      'bounds between two whole numbers',
      { type: 'integer', minimum: 24119820648.8, maximum: 24119820648.9 },
      /no number/,
    ],
    [
      'an end in a pattern that goes on',
      { type: 'string', pattern: '(a$)b' },
      /`\$` is only supported at the end/,
    ],
    [
      'a beginning in a pattern that has begun',
      { type: 'string', pattern: 'x(^a)' },
      /`\^` is only supported at the start/,
    ],
    ['an anchor that repeats', { type: 'string', pattern: '(^a)+' }, /`\^` is only supported at the start/],
    [
      'counted words with more states than can be compiled',
      { type: 'string', pattern: '^([a-z]{1,20} ?){20,40}$' },
      /at \/pattern: it allows one text in too many ways/,
    ],
    [
      'counted words that are too many together',
      object({ a: { pattern: '^([a-z]{1,20} ?){9}$' }, b: { pattern: '^([a-z]{1,20} ?){10,20}$' } }),
      /at \/properties\/b\/pattern: it allows one text in too many ways/,
    ],
    [
      'patterns with thousands of different letters beside a repeated group',
      object(
        Object.fromEntries(
          many(8).map((i) => [`p${i}`, { pattern: `^(ab)*${many(1900).map(unlike(i)).join('')}$` }]),
        ),
      ),
      /it allows one text in too many ways/,
    ],
    [
      'a loop before an exact length, which the library would follow without end',
      { type: 'string', pattern: '^.*a.{20}$' },
      /at \/pattern: behind an endless loop, a part of exact length may begin at too many places/,
    ],
    ...[
      ['in a repeated group', '^([ab]*a[ab]{30})*$'],
      ['behind an endless part that never comes', '^(?:a*){0}.*a.{20}$'],
      ['within choices', '^(x|(y|.*a.{20}))z$'],
      ['behind a choice of equal options, which is none', '^.*(?:a|a).{20}$'],
    ].map(
      ([where, pattern]) =>
        [
          `a loop before an exact length, ${where}`,
          { type: 'string', pattern },
          /at \/pattern: behind an endless loop/,
        ] as const,
    ),
    [
      'loops before exact lengths that take too long together',
      object(Object.fromEntries(many(4).map((i) => [`p${i}`, { pattern: `^.*${i}.{7}$` }]))),
      /at \/properties\/p1\/pattern: behind an endless loop/,
    ],
    ['a chain of thousands of references', chain(2000), /more than 2000 parts/],
  ];
  test.each(HOSTILE)('%s', async (_, schema, message) => {
    const refused = async () =>
      expect(() => schemaGrammar(schema, { strict: true, param: 'schema' })).toThrowError(
        expect.objectContaining({
          code: 'invalid_schema',
          param: 'schema',
          message: expect.stringMatching(message),
        }),
      );
    expect(await leastCpu_ms(refused)).toBeLessThan(100);
  });

  test.each(['^([a-z]{1,20} ?){20,40}$', '^.*a.{20}$'])('%s is ignored without strict', (pattern) => {
    const read = (one: object) => schemaGrammar(one, { strict: false, param: 'schema' });
    expect(read({ type: 'string', pattern })).toBe(read({ type: 'string' }));
  });

  const URL_PATTERN =
    '^https?:\\/\\/(www\\.)?[-a-zA-Z0-9@:%._+~#=]{1,64}\\.[a-zA-Z0-9()]{1,6}([-a-zA-Z0-9()@:%_+.~#?&/=]*)$';
  test.each([
    ...['^.*foo.{0,60}$', '^[ab]*a[ab]{11}$', '^\\w+-?\\d{40}$', '^.{0,40}a.{15}$', '^.*@.*\\..{2,}$'],
    ...['^.*(a.{12}|b.{12})$', '^.*a[bc]?.{12}$', URL_PATTERN],
    `^.*(${many(200)
      .map((i) => `word${i.toString(36)}`)
      .join('|')}).*$`,
  ])('%s has few states', (pattern) => {
    const read = () => schemaGrammar({ type: 'string', pattern }, { strict: true, param: 'schema' });
    expect(read).not.toThrow();
  });

  test.each(['error|warning|fatal', '\\d{4}-\\d{2}-\\d{2}T', '[0-9a-f]{8}-[0-9a-f]{4}-'])(
    'thirty patterns that look for (%s) have few states',
    (wanted) => {
      const schema = object(
        Object.fromEntries(many(30).map((i) => [`p${i}`, { pattern: `^.*(${wanted}${i}).*$` }])),
      );
      expect(() => schemaGrammar(schema, { strict: true, param: 'schema' })).not.toThrow();
    },
  );

  test('many patterns that are long to read, though each is one letter', () => {
    const schema = object(
      Object.fromEntries(many(40).map((i) => [`p${i}`, { pattern: `[${'a'.repeat(1900)}]` }])),
    );
    expect(() => schemaGrammar(schema, { strict: true, param: 'schema' })).toThrow(
      'patterns and formats have more than 65536 characters together, as they are written',
    );
  });

  /** The form of 128 tools that have this schema; compiles nothing. */
  const toolsOf = (
    parameters: Record<string, unknown>,
    strict: boolean,
    tool_choice?: ChatRequest['tool_choice'],
  ) => {
    const model = {
      grammars: { prepare: async (spec: GrammarSpec) => ({ key: '', spec }) },
      text: { toolFormat: PLAIN_FORMAT },
    } as unknown as ServedModel;
    const tools = many(128).map((i) => ({
      type: 'function' as const,
      function: { name: `f${i}`, parameters, strict },
    }));
    const call = { tenant: 'a', signal: new AbortController().signal };
    return answerForm(model, call, { model: 'm', messages: [], tools, tool_choice });
  };
  const OF_TOOLS: readonly [string, Record<string, unknown>, RegExp][] = [
    [
      'parts',
      object(Object.fromEntries(many(100).map((i) => [`p${i}`, {}]))),
      /more than 2000 parts together/,
    ],
    ['values', { enum: many(100).map((i) => `${i}`.padStart(50, 'x')) }, /characters together/],
    ['counted characters', object({ a: { type: 'string', maxLength: 200 } }), /more than 256 characters/],
    ['counted items', object({ a: { type: 'array', maxItems: 500 } }), /more than 2000 items together/],
    ['states of patterns', object({ a: { type: 'string', pattern: '^[a-z]{2000}$' } }), /more than 16384/],
  ];
  test.each(OF_TOOLS)('is what many tools have together: %s', async (_, parameters, message) => {
    expect(() => schemaGrammar(parameters, { strict: true, param: 'schema' })).not.toThrow();
    const refused = () =>
      expect(toolsOf(parameters, true)).rejects.toMatchObject({
        code: 'invalid_schema',
        param: expect.stringMatching(/^tools\[[1-9]\d*\]\.function\.parameters$/),
        message: expect.stringMatching(message),
      });
    expect(await leastCpu_ms(refused)).toBeLessThan(100);
  });

  test('of many tools is read in turns of the event loop, between which other requests go on', async () => {
    const string = { type: 'string', pattern: '^[a-z]{1,20}$' };
    const parameters = object(Object.fromEntries(many(60).map((i) => [`p${i}`, string])));
    let turns = 0;
    let next = setImmediate(function count() {
      turns++;
      next = setImmediate(count);
    });
    await toolsOf(parameters, false);
    clearImmediate(next);
    expect(turns).toBeGreaterThan(2);
  });

  test('counts only in tools that may be called', async () => {
    const parameters = object({ a: { type: 'string', maxLength: 200 } });
    const named = { type: 'function' as const, function: { name: 'f99' } };
    const { grammar } = await toolsOf(parameters, true, named);
    expect(grammar!.spec.calls!.tools.map(({ begin }) => begin)).toEqual([expect.stringContaining('f99')]);
  });

  test('is left out of many tools where nobody asked for strictness', async () => {
    const { grammar } = await toolsOf(object({ a: { type: 'string', maxLength: 200 } }), false);
    const [first, second] = grammar!.spec.calls!.tools;
    expect(first!.argumentsGrammar).toContain('{0,200}');
    expect(second!.argumentsGrammar).not.toContain('{0,200}');
  });

  test('leaves any object to the last of many tools where nobody asked for strictness', async () => {
    const ofParts = (count: number) => object(Object.fromEntries(many(count).map((i) => [`p${i}`, {}])));
    const { grammar } = await toolsOf(ofParts(100), false);
    const { tools } = grammar!.spec.calls!;
    expect(tools[0]!.argumentsGrammar).toContain('p99');
    expect(tools.at(-1)!.argumentsGrammar).toBe(
      schemaGrammar({ type: 'object' }, { strict: false, param: 'schema' }),
    );
    await expect(toolsOf(ofParts(2001), false)).rejects.toThrow(/tools\[0\].*more than 2000 parts/);
  });

  test('is small where references double: each is one rule', () => {
    expect(schemaGrammar(doubling, { strict: true, param: 'schema' }).length).toBeLessThan(20_000);
  });

  test('is no pattern that stands beside a format often: they are compared once', () => {
    const email = beside('email', '^\\S+@\\S+\\.\\S+$');
    const schema = object(Object.fromEntries(many(100).map((i) => [`p${i}`, email])));
    expect(() => schemaGrammar(schema, { strict: true, param: 'schema' })).not.toThrow();
  });

  test('is no pattern that repeats nothing very often: nothing is written once', () => {
    const schema = { type: 'string', pattern: '^a(((){9999})+|(){8888}){9999}$' };
    expect(schemaGrammar(schema, { strict: true, param: 'schema' })).not.toMatch(/9999|8888/);
  });

  test('is no long chain of references', () => {
    expect(schemaGrammar(chain(900), { strict: true, param: 'schema' })).toContain('schema_900');
  });

  test('is kept together where nobody asked for strictness and one schema can say it', async () => {
    const schema = {
      type: 'object',
      properties: { id: { type: 'integer' }, name: { enum: ['x', 'y'] }, kind: { type: 'boolean' } },
      required: ['kind'],
      anyOf: [{ required: ['id'] }, { required: ['name'], properties: { more: { type: 'null' } } }],
    };
    const answer = schemaGrammar(schema, { strict: false, param: 'schema' });
    const isValid = ajv.compile(schema);
    for (let seed = 0; seed < 6; seed++) {
      const { text } = await player.play({ answer, calls: undefined }, seed);
      expect(isValid(JSON.parse(text)), text).toBe(true);
    }
  });

  test('is kept together where schemas of an `allOf` say different things', async () => {
    const schema = {
      $defs: { named: { type: 'object', properties: { name: { enum: ['x', 'y'] } }, required: ['name'] } },
      properties: { kind: { type: 'boolean' } },
      required: ['kind'],
      allOf: [
        { $ref: '#/$defs/named' },
        { properties: { id: { type: 'integer' } }, required: ['id'] },
        { allOf: [{ properties: { more: { type: 'null' } }, required: ['more'] }] },
      ],
    };
    const answer = schemaGrammar(schema, { strict: false, param: 'schema' });
    const isValid = ajv.compile(schema);
    for (let seed = 0; seed < 6; seed++) {
      const { text } = await player.play({ answer, calls: undefined }, seed);
      expect(isValid(JSON.parse(text)), text).toBe(true);
    }
  });

  test('is refused where schemas of an `allOf` never end', () => {
    const ring = { $defs: { a: { allOf: [{ $ref: '#/$defs/a' }, {}] } }, $ref: '#/$defs/a' };
    const tree = {
      $defs: Object.fromEntries(
        many(30).map((i) => {
          const next = i === 29 ? {} : { $ref: `#/$defs/d${i + 1}` };
          return [`d${i}`, { allOf: [next, next] }];
        }),
      ),
      $ref: '#/$defs/d0',
    };
    const grammar = (schema: unknown) => () => schemaGrammar(schema, { strict: false, param: 'schema' });
    expect(grammar(ring)).toThrow(/leads back to itself/);
    expect(grammar(tree)).toThrow(/more than 2000 schemas in total/);
  });

  test('is left out where nobody asked for strictness', () => {
    const schema = {
      type: 'array',
      items: { type: 'string', maxLength: 9999, pattern: '(?=a)' },
      uniqueItems: true,
    };
    expect(schemaGrammar(schema, { strict: false, param: 'schema' })).toContain('json_string');
    const long = { type: 'array', items: { type: 'null' }, maxItems: 3000 };
    expect(schemaGrammar(long, { strict: false, param: 'schema' })).not.toContain('2999');
    expect(() => schemaGrammar(long, { strict: true, param: 'schema' })).toThrow(/more than 2000 items/);
  });
});
