/** The edge's API as an OpenAPI 3.1 document, generated from the schemas that check requests and answers. */
import { z } from 'zod';
import { COMPLETION_HEADERS } from '../wire/backend-load.ts';
import { ERROR_CODES, type ErrorCode } from '../wire/errors.ts';
import { drawnFrom, type FieldTable, type Rule } from '../wire/fields.ts';
import { HEADERS } from '../wire/protocol.ts';
import { ANSWERS, type AnswerName } from './answers.ts';
import { type CallerKind, type Endpoint, GROUPS } from './endpoints.ts';

export type JsonSchema = { [name: string]: unknown };
export type Operation = {
  readonly tags: string[];
  readonly operationId: string;
  readonly summary: string;
  readonly description?: string;
  readonly security: Record<string, string[]>[];
  readonly parameters: Parameter[];
  readonly requestBody?: { required: true; content: Content };
  readonly responses: Record<string, { description: string; headers?: object; content?: Content }>;
};
type Parameter = {
  readonly name: string;
  readonly in: 'path' | 'query';
  readonly required: boolean;
  readonly schema: JsonSchema;
};
type Content = Record<string, { readonly schema?: JsonSchema }>;
export type OpenApi = ReturnType<typeof openApi>;

const SECURITY: Readonly<Record<CallerKind, Record<string, string[]>[]>> = {
  tenant: [{ tenantKey: [] }],
  admin: [{ adminKey: [] }, { session: [] }],
  backend: [{ backendToken: [] }],
  session: [],
  anybody: [],
};
const bearer = (description: string) => ({ type: 'http', scheme: 'bearer', description }) as const;

/** @param version the product's version. */
export const openApi = (version: string) => ({
  openapi: '3.1.0',
  info: {
    title: 'Maskroute',
    version,
    description:
      'One language model, many block masks, and an edge that picks the right mask for every request.',
    license: { name: 'MIT', identifier: 'MIT' },
  },
  servers: [{ url: '/' }],
  tags: GROUPS.map(({ tag, about }) => ({ name: tag, description: about })),
  paths: paths(),
  components: {
    securitySchemes: {
      tenantKey: bearer("A tenant's key."),
      adminKey: bearer("`ADMIN_KEY`, a key of kind `admin`, or a tenant's own, which sees that tenant only."),
      backendToken: bearer('A short-lived token that a backend signs.'),
      session: {
        type: 'apiKey',
        in: 'cookie',
        name: 'maskroute-session',
        description: "The dashboard's session. Over https the cookie's name begins with `__Host-`.",
      },
    },
    schemas: {
      ...Object.fromEntries(
        Object.entries(ANSWERS).map(([name, schema]) => [name, jsonSchema(schema, 'output')]),
      ),
      Error: jsonSchema(
        z.object({
          error: z.object({
            message: z.string(),
            type: z.string(),
            param: z.string().nullable().meta({ description: 'The path of the first wrong field' }),
            code: z.enum(Object.keys(ERROR_CODES) as [ErrorCode, ...ErrorCode[]]),
          }),
        }),
        'output',
      ),
    } as Record<string, JsonSchema>,
  },
});

function paths(): Record<string, Record<string, Operation>> {
  const all: Record<string, Record<string, Operation>> = {};
  for (const { tag, caller, endpoints } of GROUPS) {
    for (const endpoint of endpoints) {
      all[endpoint.path] ??= {};
      all[endpoint.path]![endpoint.method.toLowerCase()] = operation(endpoint, tag, caller);
    }
  }
  return all;
}

function operation(endpoint: Endpoint, tag: string, caller: CallerKind): Operation {
  const { method, path, summary, more, body, answers } = endpoint;
  const good = Object.entries(answers).map(([status, answer]) => [status, success(answer)] as const);
  return {
    tags: [tag],
    operationId: `${method.toLowerCase()}${path.replaceAll(/[^A-Za-z0-9]+(\w?)/g, (_, letter) => letter.toUpperCase())}`,
    summary,
    ...(more === undefined ? {} : { description: more }),
    security: SECURITY[caller],
    parameters: parameters(endpoint),
    ...(body === undefined ? {} : { requestBody: { required: true, content: bodyContent(body) } }),
    responses: Object.fromEntries([...failures(endpoint, caller), ...good]),
  };
}

function parameters({ path, query }: Endpoint): Parameter[] {
  const inPath = [...path.matchAll(/\{(\w+)\}/g)].map(
    ([, name]): Parameter => ({ name: name!, in: 'path', required: true, schema: { type: 'string' } }),
  );
  if (query === undefined) return inPath;
  const { properties = {}, required = [] } = jsonSchema(query, 'input');
  return [
    ...inPath,
    ...Object.entries(properties as Record<string, JsonSchema>).map(
      ([name, schema]): Parameter => ({
        name,
        in: 'query',
        required: (required as string[]).includes(name),
        schema,
      }),
    ),
  ];
}

const bodyContent = (body: z.ZodType | string): Content =>
  typeof body === 'string' ? { [body]: {} } : { 'application/json': { schema: jsonSchema(body, 'input') } };

const ref = (name: AnswerName | 'Error'): JsonSchema => ({ $ref: `#/components/schemas/${name}` });
const json = (schema: JsonSchema): Content => ({ 'application/json': { schema } });

const COMPLETION_NAMES: readonly unknown[] = ['ChatCompletion', 'Response', 'TextCompletion'];
const HEADER_SCHEMAS = Object.fromEntries(
  COMPLETION_HEADERS.map((name) => [name, { schema: { type: 'string' } }]),
);

function success(answer: Endpoint['answers'][number] | undefined) {
  if (answer == null) return { description: 'No content.' };
  if (typeof answer !== 'string') {
    const list = {
      type: 'object',
      required: ['object', 'data'],
      properties: {
        object: { const: 'list' },
        data: { type: 'array', items: ref(answer[0]) },
        has_more: { type: 'boolean' },
        next: { type: ['string', 'null'], description: 'Where the next page begins' },
      },
    };
    return { description: `A list of ${answer[0]}.`, content: json(list) };
  }
  if (answer.includes('/')) return { description: 'A stream.', content: { [answer]: {} } };
  const name = answer as AnswerName;
  if (!COMPLETION_NAMES.includes(name)) return { description: `${name}.`, content: json(ref(name)) };
  return {
    description: `${name}; with \`stream: true\` its events as a stream.`,
    headers: HEADER_SCHEMAS,
    content: { ...json(ref(name)), 'text/event-stream': {} },
  };
}

const BY_CALLER: Readonly<Record<CallerKind, readonly ErrorCode[]>> = {
  tenant: ['invalid_api_key', 'forbidden', 'tenant_disabled', 'rate_limit_exceeded'],
  admin: ['invalid_api_key', 'invalid_session', 'forbidden', 'tenant_disabled', 'rate_limit_exceeded'],
  backend: ['invalid_api_key', 'expired_token'],
  session: ['invalid_api_key', 'invalid_session', 'forbidden', 'tenant_disabled', 'rate_limit_exceeded'],
  anybody: [],
};
const OF_BODIES: readonly ErrorCode[] = [
  ...(['invalid_json', 'invalid_request', 'request_timeout'] as const),
  ...(['body_too_large', 'unsupported_media_type'] as const),
];

/** One response for each status, naming its error codes. */
function failures({ path, query, body, answers, errors = [] }: Endpoint, caller: CallerKind) {
  const codes: ErrorCode[] = [
    ...BY_CALLER[caller],
    ...(body === undefined ? [] : OF_BODIES),
    // The admin API refuses queries that its endpoints do not have.
    ...(query === undefined && caller !== 'admin' ? [] : (['invalid_request'] as const)),
    ...(path.includes('{') || query?.shape.tenant !== undefined ? (['not_found'] as const) : []),
    ...errors,
    ...(caller === 'anybody' ? [] : (['internal_error', 'configuration_unavailable'] as const)),
  ];
  const byStatus = Map.groupBy(new Set(codes), (code) => ERROR_CODES[code][0]);
  return [...byStatus]
    .filter(([status]) => answers[status] === undefined)
    .sort(([a], [b]) => a - b)
    .map(([status, some]) => {
      const named = some.map((code) => `\`${code}\``).join(', ');
      return [String(status), { description: named, content: json(ref('Error')) }] as const;
    });
}

/* Schemas. */

/** The JSON schema of input or output; they differ for fields with defaults or transformations. */
function jsonSchema(schema: z.ZodType, io: 'input' | 'output'): JsonSchema {
  const made = z.toJSONSchema(schema, {
    io,
    unrepresentable: 'any',
    override({ zodSchema, jsonSchema: written }) {
      const { def } = zodSchema._zod;
      // A check of our own says nothing to a document; the schema behind it does.
      if (def.type === 'pipe' && def.in._zod.def.type === 'custom') {
        Object.assign(written, jsonSchema(def.out as z.ZodType, io));
      }
      const from = drawnFrom(zodSchema);
      if (from?.kind === 'table') Object.assign(written, tableSchema(from.table, io));
      if (from?.kind === 'list') {
        const { item, min, max } = from;
        Object.assign(written, { type: 'array', items: jsonSchema(item, io), minItems: min, maxItems: max });
      }
      const { format } = written;
      if (format !== 'date' && format !== 'date-time') return;
      // The format makes the pattern redundant, and a default relative to the present is meaningless in a document.
      delete written.pattern;
      delete written.default;
    },
  }) as JsonSchema;
  const { $schema: _, $defs: __, ...rest } = made;
  return withoutLoops(rest) as JsonSchema;
}

/**
 * Replaces recursive schemas (`learned` and `heldOut` of a mask set) with any JSON: a reference to them would be
 * dangling.
 */
function withoutLoops(value: unknown): unknown {
  if (Array.isArray(value)) return value.map(withoutLoops);
  if (typeof value !== 'object' || value === null) return value;
  if ('$ref' in value) return {};
  return Object.fromEntries(Object.entries(value).map(([name, inner]) => [name, withoutLoops(inner)]));
}

function tableSchema(table: FieldTable, io: 'input' | 'output'): JsonSchema {
  const entries = Object.entries(table);
  const required = entries.filter(
    ([, rule]) => rule.kind === 'honoured' && !rule.schema.safeParse(undefined).success,
  );
  return {
    type: 'object',
    properties: Object.fromEntries(entries.map(([name, rule]) => [name, ruleSchema(rule, io)])),
    required: required.map(([name]) => name),
    additionalProperties: false,
  };
}

function ruleSchema(rule: Rule, io: 'input' | 'output'): JsonSchema {
  switch (rule.kind) {
    case 'honoured':
      return jsonSchema(rule.schema, io);
    case 'ignored':
      return { 'x-field': rule.kind, description: `Ignored; named in \`${HEADERS.ignored}\`.` };
    case 'refused':
      return { 'x-field': rule.kind, description: `Refused: ${rule.why}.`, enum: [null, ...rule.harmless] };
  }
}
