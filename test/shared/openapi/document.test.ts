/** The API's document is OpenAPI by somebody else's judgement, and says what the schemas say. */
import { Validator } from '@seriousme/openapi-schema-validator';
import { expect, test } from 'vitest';
import { type JsonSchema, openApi } from '../../../shared/openapi/document.ts';

const api = openApi('1.2.3');
type Body = { properties: Record<string, JsonSchema>; required: string[]; additionalProperties: boolean };
const bodyOf = (path: string, method: string): Body =>
  api.paths[path]![method]!.requestBody!.content['application/json']!.schema as Body;

test('it is a valid document of OpenAPI 3.1, in which every reference leads somewhere', async () => {
  const document = JSON.parse(JSON.stringify(api));
  const validator = new Validator();
  expect(await validator.validate(document)).toEqual({ valid: true });
  expect(validator.version).toBe('3.1');
  for (const [, name] of JSON.stringify(document).matchAll(/"#\/components\/schemas\/(\w+)"/g)) {
    expect(document.components.schemas).toHaveProperty(name!);
  }
  const broken = structuredClone(document);
  broken.paths['/healthz'].get.responses = 'many';
  expect((await validator.validate(broken)).valid).toBe(false);
});

test('operations have names of their own', () => {
  const ids = Object.values(api.paths).flatMap((methods) =>
    Object.values(methods).map(({ operationId }) => operationId),
  );
  expect(new Set(ids).size).toBe(ids.length);
});

test('a body names its fields, which must be there, and what becomes of the others', () => {
  const chat = bodyOf('/v1/chat/completions', 'post');
  expect(chat.required).toEqual(['model', 'messages']);
  expect(chat.additionalProperties).toBe(false);
  expect(chat.properties.seed).toEqual({
    anyOf: [{ type: 'integer', ...SIXTY_FOUR_BITS }, { type: 'null' }],
  });
  expect(chat.properties.use_beam_search).toMatchObject({ 'x-field': 'refused', enum: [null, false] });
  expect(chat.properties.metadata).toMatchObject({ 'x-field': 'ignored' });
  expect(chat.properties.logit_bias).toMatchObject({ anyOf: [{ type: 'object' }, { type: 'null' }] });
  expect(chat.properties.messages).toMatchObject({ type: 'array', items: { required: ['role'] } });
  expect(bodyOf('/admin/v1/tenants', 'post').required).toEqual(['id', 'name']);
});
/** Of integers with and without a sign. */
const SIXTY_FOUR_BITS = { minimum: -(2 ** 63), maximum: 2 ** 64 };

test('an answer names its codes by status', () => {
  const { responses, security } = api.paths['/admin/v1/experiments/{id}']!.patch!;
  expect(security).toEqual([{ adminKey: [] }, { session: [] }]);
  expect(responses['409']!.description).toBe('`conflict`');
  expect(responses['400']!.description).toContain('`invalid_json`');
  const { parameters, responses: others } = api.paths['/admin/v1/models']!.get!;
  expect([parameters, others['400']!.description]).toEqual([[], '`invalid_request`']);
});

test('a completion names its headers', () => {
  const { headers } = api.paths['/v1/chat/completions']!.post!.responses['200']!;
  expect(Object.keys(headers!)).toEqual(
    expect.arrayContaining(['x-maskroute-mask', 'x-maskroute-backend', 'x-ratelimit-remaining-tokens']),
  );
});

test('a query has the bounds and values that it is checked against', () => {
  const schemaOf = (path: string, name: string, method = 'get') =>
    api.paths[path]![method]!.parameters.find((parameter) => parameter.name === name)!.schema;
  expect(schemaOf('/admin/v1/keys', 'limit')).toMatchObject({ type: 'integer', minimum: 1, maximum: 200 });
  expect(schemaOf('/admin/v1/usage', 'limit')).toMatchObject({ type: 'integer', minimum: 1, maximum: 1000 });
  expect(schemaOf('/admin/v1/ratings', 'commented')).toMatchObject({ enum: ['true', 'false'] });
  expect(schemaOf('/admin/v1/mask-sets', 'publishable', 'post')).toMatchObject({ enum: ['true', 'false'] });
});

test('what may name a tenant may not find it', () => {
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const { parameters, responses } of Object.values(methods)) {
      if (!parameters.some(({ name }) => name === 'tenant')) continue;
      expect(responses['404']?.description, path).toContain('`not_found`');
    }
  }
});

test('a change has fields of its own, at least one where an empty one is refused', () => {
  expect(bodyOf('/admin/v1/tenants/{id}', 'patch')).toMatchObject({ minProperties: 1 });
  expect(bodyOf('/admin/v1/backends/{id}', 'patch')).toMatchObject({ minProperties: 1 });
  const { properties } = bodyOf('/admin/v1/experiments/{id}', 'patch');
  expect(properties.alpha).toEqual({
    anyOf: [{ type: 'number', minimum: 0.001, maximum: 0.2 }, { type: 'null' }],
  });
  expect(properties.variants).toMatchObject({ type: 'array', minItems: 1 });
});

test('no default depends on the day when the document was made', () => {
  expect(JSON.stringify(api)).not.toMatch(/"default":"20\d\d-/);
});
