/** The tables of fields: they know every field of OpenAI's requests, and every wrong one is named. */
import { readFile } from 'node:fs/promises';
import fc from 'fast-check';
import { parseSync } from 'oxc-parser';
import { describe, expect, it } from 'vitest';
import { z } from 'zod';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import {
  checkedObject,
  type FieldTable,
  honoured,
  ignored,
  listOf,
  readFields,
  refused,
} from '../../../shared/wire/fields.ts';
import {
  CHAT_FIELDS,
  COMPLETION_FIELDS,
  chatRequest,
  completionRequest,
  EMBEDDING_FIELDS,
  embeddingsRequest,
  MESSAGE_FIELDS,
} from '../../../shared/wire/openai.ts';
import { parse } from '../../../shared/wire/parse-body.ts';
import { chatOfResponse, RESPONSE_FIELDS, responsesRequest } from '../../../shared/wire/responses.ts';

/** Names of an interface's members, from the types of the official client. */
async function membersOf(file: string, ...interfaces: string[]): Promise<string[]> {
  const path = new URL(`../../../node_modules/openai/resources/${file}.d.ts`, import.meta.url);
  const { program } = parseSync(file, await readFile(path, 'utf8'), { lang: 'dts' });
  const found = interfaces.map((name) => {
    for (const statement of program.body) {
      const declared = statement.type === 'ExportNamedDeclaration' ? statement.declaration : null;
      if (declared?.type !== 'TSInterfaceDeclaration' || declared.id.name !== name) continue;
      return declared.body.body.flatMap((member) =>
        member.type === 'TSPropertySignature' && member.key.type === 'Identifier' ? [member.key.name] : [],
      );
    }
    throw new Error(`${file} has no ${name}`);
  });
  return [...new Set(found.flat())];
}

describe("the official client's types", () => {
  it.each([
    ['chat', 'chat/completions/completions', ['ChatCompletionCreateParamsBase'], CHAT_FIELDS, 30],
    ['completions', 'completions', ['CompletionCreateParamsBase'], COMPLETION_FIELDS, 15],
    ['embeddings', 'embeddings', ['EmbeddingCreateParams'], EMBEDDING_FIELDS, 5],
    ['responses', 'responses/responses', ['ResponseCreateParamsBase'], RESPONSE_FIELDS, 28],
    [
      'messages',
      'chat/completions/completions',
      [
        ...['Developer', 'System', 'User', 'Assistant', 'Tool', 'Function'].map(
          (role) => `ChatCompletion${role}MessageParam`,
        ),
        'ChatCompletionMessage',
      ],
      MESSAGE_FIELDS,
      9,
    ],
  ] as const)(
    'of %s have no field that the table does not name',
    async (_, file, interfaces, table, least) => {
      const members = await membersOf(file, ...interfaces);
      expect(members.length).toBeGreaterThanOrEqual(least);
      expect(members.filter((name) => !Object.hasOwn(table, name))).toEqual([]);
    },
  );
});

describe('every value that is said to be harmless', () => {
  it.each([
    ['chat', chatRequest, CHAT_FIELDS, { messages: [{ role: 'user', content: 'x' }] }],
    ['completions', completionRequest, COMPLETION_FIELDS, { prompt: 'x' }],
  ] as const)('of %s is taken, and nothing is said of it', (_, checked, table, needed) => {
    for (const [name, rule] of Object.entries(table)) {
      if (rule.kind === 'honoured') continue;
      for (const value of [null, undefined, ...rule.harmless]) {
        expect(readFields<z.ZodType>(checked, { model: 'm', ...needed, [name]: value }).ignored).toEqual({});
      }
      const said = () => readFields<z.ZodType>(checked, { model: 'm', ...needed, [name]: { much: 'more' } });
      if (rule.kind === 'ignored') expect(said().ignored).toEqual({ 'x-maskroute-ignored': name });
      else expect(said).toThrow(`${name}: ${rule.why}`);
    }
  });
});

const errorOf = (run: () => unknown): MaskrouteError => {
  try {
    run();
  } catch (error) {
    if (error instanceof MaskrouteError) return error;
    throw error;
  }
  throw new Error('it was taken');
};

/** One value of a kind that the field does not take. */
const WRONG: Record<string, unknown> = {
  model: 7,
  stream: 'yes',
  stream_options: 1,
  temperature: 9,
  top_p: -1,
  presence_penalty: [],
  seed: 0.5,
  stop: true,
  n: 0,
  user: 1,
  top_k: -7,
  min_p: 2,
  min_tokens: -1,
  ignore_eos: 'x',
  mask: 1,
  kv: 'drop',
  logit_bias: { x: 1 },
  max_tokens: 0,
  logprobs: 'x',
  tools: [1],
  audio: {},
  guided_json: {},
  echo: true,
  response_format: { type: 'xml' },
  messages: [{ role: 'x' }],
  maxTokens: 1,
  zzz: 1,
};

describe('the message', () => {
  it('names each wrong field of any body, and is never of no use', () => {
    fc.assert(
      fc.property(
        fc.subarray(Object.keys(WRONG), { minLength: 1, maxLength: 10 }),
        fc.boolean(),
        (names, before) => {
          const good = { messages: [{ role: 'user', content: 'x' }], model: 'm', top_k: 3 };
          const broken = Object.fromEntries(names.map((name) => [name, WRONG[name]]));
          const body = before ? { ...broken, ...good, ...broken } : { ...good, ...broken };
          const { message, param, code } = errorOf(() => readFields(chatRequest, body));
          expect(code).toBe('invalid_request');
          expect(
            names.map((name) => ({ name, named: new RegExp(`(^|; )${name}[.:[]`).test(message) })),
          ).toEqual(names.map((name) => ({ name, named: true })));
          expect(message).not.toMatch(/invalid input|undefined|\[object/i);
          expect(message).toMatch(new RegExp(`^${param!.replaceAll(/[[\]]/g, '\\$&')}: `));
        },
      ),
      { seed: 12, numRuns: 300 },
    );
  });

  it('is bounded whatever is sent, and repeats nothing at length', () => {
    const long = 'x'.repeat(100_000);
    const many = Object.fromEntries(Array.from({ length: 50_000 }, (_, i) => [`field_${i}`, 1]));
    for (const body of [
      { [long]: 1 },
      { model: 'm', messages: [{ role: long, content: 'x' }] },
      { model: 'm', messages: [{ role: 'user', content: 'x' }], mask: long, kv: long },
      many,
      { model: 'm', messages: Array(2048).fill({ [long]: 1, role: 1 }) },
      { model: 'm', messages: [{ role: 'user', content: Array(20).fill({ type: long }) }] },
    ]) {
      const { message, param } = errorOf(() => readFields(chatRequest, body));
      expect(message.length).toBeLessThanOrEqual(2048);
      expect(param?.length ?? 0).toBeLessThanOrEqual(200);
      expect(message).not.toContain('x'.repeat(200));
    }
    expect(errorOf(() => readFields(chatRequest, many)).message).toMatch(/field_7: [^;]*; and 49992 more\.$/);
  });

  it('of the newer wire is not that its instructions are a message more than its input', () => {
    const items = (count: number) => Array(count).fill({ role: 'user', content: 'x' });
    const read = (input: unknown[]) =>
      chatOfResponse(readFields(responsesRequest, { model: 'm', instructions: 'be brief', input }).body);
    expect(read(items(2048)).messages).toHaveLength(2049);
    expect(errorOf(() => read(items(2049))).param).toBe('input');
  });

  it('of embeddings says that token ids are not supported', () => {
    for (const input of [
      [15496, 995],
      [[15496], [995]],
    ]) {
      const { message, param } = errorOf(() => readFields(embeddingsRequest, { model: 'm', input }));
      expect(param).toBe('input[0]');
      expect(message).toContain('input[0]: token ids of another model are not supported; send texts');
    }
  });

  it('of millions of wrong items is found after the first ones', () => {
    let seen = 0;
    const counting = z.custom(() => ++seen < 0);
    const { schema } = checkedObject({ items: honoured(listOf(counting, { max: 1_000_000 })) });
    expect(errorOf(() => parse(schema, { items: Array(1_000_000).fill(1) })).param).toBe('items[0]');
    expect(seen).toBeLessThanOrEqual(100);
    for (const body of [
      { model: 'm', messages: [{ role: 'user', content: Array(1_000_000).fill({}) }] },
      { model: 'm', messages: [{ role: 'user', content: Array(4000).fill({}) }] },
      { model: 'm', messages: Array(2048).fill({ role: 'user', content: [{}, {}] }) },
      { model: 'm', messages: [{ role: 'user', content: 'x' }], logit_bias: { ...Array(5000).fill('x') } },
    ]) {
      expect(chatRequest.schema.safeParse(body).error!.issues.length).toBeLessThanOrEqual(250);
    }
    const ids = { model: 'm', prompt: Array(1_000_000).fill(0.5) };
    const [issue] = completionRequest.schema.safeParse(ids).error!.issues;
    expect(issue!.code === 'invalid_union' && Math.max(...issue.errors.map(({ length }) => length))).toBe(
      100,
    );
  });

  it.each(
    Object.entries({ CHAT_FIELDS, COMPLETION_FIELDS, RESPONSE_FIELDS, EMBEDDING_FIELDS, MESSAGE_FIELDS }),
  )('of a list of any length is found after the first items: %s', (_, table: FieldTable) => {
    const slow = Object.entries(table).filter(([, rule]) => {
      if (rule.kind !== 'honoured') return false;
      return [{}, 'x', 0.5].some((item) => {
        const { issues } = rule.schema.safeParse(Array(10_000).fill(item)).error!;
        const inner = issues.flatMap((issue) => (issue.code === 'invalid_union' ? issue.errors : []));
        return Math.max(issues.length, ...inner.map(({ length }) => length)) > 100;
      });
    });
    expect(slow.map(([name]) => name)).toEqual([]);
  });

  it('of a union names the alternatives, or what is wrong with the nearest one', () => {
    const schema = z.object({
      of: z.union([z.strictObject({ upload: z.string() }), z.strictObject({ path: z.string() })]),
      sign: z.union([z.literal(1), z.literal(-1)]).optional(),
      count: z.union([z.int().min(1), z.literal('auto')]).optional(),
      many: z.union([z.string(), z.array(z.string()).max(2), z.array(z.int()).max(2)]).optional(),
    });
    const said = (value: unknown) => errorOf(() => parse(schema, value)).message;
    expect(said({ of: 1 })).toBe('of: expected an object, got 1.');
    expect(said({ of: { upload: 1 } })).toContain('expected a string, got 1');
    expect(said({ of: { path: 'x' }, sign: 0, count: 0 })).toBe(
      'sign: expected 1 or -1, got 0; count: expected at least 1.',
    );
    expect(said({ of: { path: 'x' }, count: 'all' })).toBe(
      'count: expected a whole number or "auto", got "all".',
    );
    for (const many of [
      ['a', 'b', 'c'],
      [1, 2, 3],
    ]) {
      expect(said({ of: { path: 'x' }, many })).toBe('many: expected at most 2 items.');
    }
  });
});

describe('a table', () => {
  const inner = checkedObject({ kind: honoured(z.literal('a')), note: ignored() }, { tag: 'kind' });
  const outer = checkedObject({
    items: honoured(z.array(inner.schema), inner),
    limit: honoured(z.int().default(3)),
    old: refused('it is over', 0),
  });

  it('gives honoured fields alone, and presets of absent ones', () => {
    const { body, ignored: header } = readFields(outer, { items: [{ kind: 'a', note: 1 }], old: 0 });
    expect(body).toEqual({ items: [{ kind: 'a' }], limit: 3 });
    expect(header).toEqual({ 'x-maskroute-ignored': 'items.note' });
  });

  it('says nothing of an unknown field that is null', () => {
    const sent = { items: [{ kind: 'a', namespace: null }], later: null };
    expect(readFields(outer, sent)).toEqual({ body: { items: [{ kind: 'a' }], limit: 3 }, ignored: {} });
  });

  it('takes no name for a field that every object has', () => {
    for (const name of ['__proto__', 'constructor', 'toString']) {
      const raw = JSON.parse(`{"items": [], "${name}": {"limit": 9}}`);
      expect(errorOf(() => readFields(outer, raw)).param).toBe(name);
    }
  });
});
