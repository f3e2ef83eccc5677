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
});

test('no default depends on the day when the document was made', () => {
  expect(JSON.stringify(api)).not.toMatch(/"default":"20\d\d-/);
});
