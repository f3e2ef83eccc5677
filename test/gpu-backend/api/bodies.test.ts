/** What of a body is refused, and with which words, at a backend; `test/workers/http/bodies.test.ts` has the edge. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { HEADERS } from '../../../shared/wire/protocol.ts';
import { BAD_BODIES, CLIENT_BODIES } from '../../support/bad-bodies.ts';
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
          'input[0]: expected a string, got a list; dimension: there is no such field here; did you mean `dimensions`?.',
      },
    });
  });
});
