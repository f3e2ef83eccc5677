/** What of a body is refused, and with which words, at a backend; `test/workers/http/bodies.ts` has the edge. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { createJobSchema, createScheduleSchema } from '../../../shared/admin/job-wire.ts';
import { chatRequest, completionRequest, embeddingsRequest } from '../../../shared/wire/openai.ts';
import { HEADERS } from '../../../shared/wire/protocol.ts';
import { responsesRequest } from '../../../shared/wire/responses.ts';
import { BAD_BODIES, CLIENT_BODIES, wrongAllOver } from '../../support/bad-bodies.ts';
import { serveModel, type TestServer } from './harness.ts';
import { bytesOf, END_TOKEN, type ScriptedEngine, scriptedEngine, scriptedModel } from './scripted-engine.ts';

let engine: ScriptedEngine;
let server: TestServer;
beforeAll(async () => {
  engine = scriptedEngine({ answer: () => [...bytesOf('ok'), END_TOKEN] });
  server = await serveModel(scriptedModel(engine));
});
afterAll(() => server[Symbol.asyncDispose]());

it.each(BAD_BODIES)('a bad body: $path $param: $message', async ({ path, body, param, message }) => {
  const response = await server.post(path, body);
  expect(response.status).toBe(400);
  const { error } = (await response.json()) as {
    error: { param: string | null; message: string; code: string };
  };
  expect(error).toMatchObject({ param, type: 'invalid_request_error' });
  expect(error.code).toMatch(/^invalid_(request|json)$/);
  if (typeof message === 'string') expect(error.message).toBe(message);
  else expect(error.message).toMatch(message);
  expect(engine.requests).toEqual([]);
});

/** Those that the edge has, too, are in its table. */
it.each([
  ['/v1/chat/completions', chatRequest.schema],
  ['/v1/completions', completionRequest.schema],
  ['/v1/responses', responsesRequest.schema],
  ['/v1/embeddings', embeddingsRequest.schema],
  ['/v1/jobs', createJobSchema],
  ['/v1/jobs/schedules', createScheduleSchema],
])('a body that is wrong all over names its fields: %s', async (path, schema) => {
  const { names, sent } = wrongAllOver(schema);
  const response = await server.post(path, sent);
  const { error } = (await response.json()) as { error: { param: string; message: string } };
  expect(response.status, error.message).toBe(400);
  for (const name of names.slice(0, 5)) expect(error.message).toMatch(new RegExp(`(^|; )${name}\\b`));
  if (names.length < 10) expect(error.message).toContain('nobody: there is no such field');
  expect(error.param).toMatch(new RegExp(`^${names[0]}`));
});

describe('a body as clients send it', () => {
  it.each(CLIENT_BODIES)('$client', async ({ path, body, ignored }) => {
    const response = await server.post(path, { model: 'scripted', ...body });
    expect(response.status, await response.clone().text()).toBe(200);
    expect(response.headers.get(HEADERS.ignored)).toBe(ignored);
    await response.text();
  });

  it('an embedding, with all that OpenAI has', async () => {
    const body = { model: 'nobody-has-this', input: 'hi', user: 'ann', encoding_format: 'float' };
    const response = await server.post('/v1/embeddings', body);
    expect(response.headers.get(HEADERS.ignored)).toBe('user');
    const refused = await server.post('/v1/embeddings', { ...body, input: [[1, 2]], dimension: 3 });
    expect(await refused.json()).toMatchObject({
      error: {
        param: 'input[0]',
        message:
          'input[0]: token ids of another model are not supported; send texts; dimension: there is no such field here; did you mean `dimensions`?',
      },
    });
  });
});
