/**
 * Speaks the wire of two embedding providers: `POST /` as Hugging Face's feature extraction answers (one
 * vector a text), `POST /ai/run/...` as Workers AI does. Vectors are four numbers that depend on the text
 * alone; some texts make the provider fail in a particular way.
 */
import { createHash } from 'node:crypto';
import type { ServerResponse } from 'node:http';
import { listen, type RunningServer, readText } from './http-server.ts';

/** What the model behind the Workers AI encoder gives. */
const WORKERS_AI_DIMENSIONS = 384;

/** The first word picks the direction, so tests can choose the cluster; other texts get one from their hash. */
const DIRECTIONS = new Map([
  ['north', [1, 0, 0, 0]],
  ['east', [0, 1, 0, 0]],
  ['south', [0, 0, 1, 0]],
  ['west', [0, 0, 0, 1]],
]);

export const startEncoder = (): Promise<RunningServer> =>
  listen(async (request, response) => {
    const body = JSON.parse(await readText(request)) as { inputs?: string[]; text?: string[] };
    const texts = body.inputs ?? body.text ?? [];
    const isWorkersAi = request.url?.startsWith('/ai/run/') === true;
    const answer = (vectors: unknown) =>
      json(
        response,
        isWorkersAi
          ? { shape: [texts.length, WORKERS_AI_DIMENSIONS], data: vectors, pooling: 'cls' }
          : vectors,
      );
    const right = (text: string) =>
      isWorkersAi ? [...vectorOf(text), ...Array(WORKERS_AI_DIMENSIONS - 4).fill(0)] : vectorOf(text);
    if (texts.some((text) => text.startsWith('!hang'))) return;
    if (texts.some((text) => text.startsWith('!fail'))) {
      response.writeHead(500, { 'content-type': 'application/json' }).end('{"error":"overloaded"}');
    } else if (texts.some((text) => text.startsWith('!short'))) answer(texts.map(() => [1, 2]));
    else if (texts.some((text) => text.startsWith('!missing'))) answer([]);
    else if (texts.some((text) => text.startsWith('!words'))) answer(texts.map(() => ['a', 'b', 'c', 'd']));
    else answer(texts.map(right));
  });

/** Four numbers. */
export function vectorOf(text: string): readonly number[] {
  const direction = DIRECTIONS.get(text.split(/\s/)[0]!);
  if (direction !== undefined) return direction.map((value) => 3 * value);
  return [...createHash('sha256').update(text).digest().subarray(0, 4)].map((byte) => byte / 128 - 1);
}

function json(response: ServerResponse, value: unknown): void {
  response.writeHead(200, { 'content-type': 'application/json' }).end(JSON.stringify(value));
}
