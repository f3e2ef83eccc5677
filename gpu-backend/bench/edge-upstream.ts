/**
 * The upstream of `bench edge`, in a process of its own: sends the same scripted answer to every request, at once, as
 * only the latency that gateways add is measured. It speaks what the edge and Portkey's gateway expect of a backend.
 */
import { once } from 'node:events';
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import { text } from 'node:stream/consumers';
import type { MaskSet } from '../../shared/mask/mask-set.ts';
import type { LoadReport } from '../../shared/wire/backend-load.ts';
import { nextTurn } from '../event-loop.ts';

type Served = Pick<MaskSet, 'model' | 'surrogates'>;

process.once('message', async (set: Served) => {
  process.send?.({ url: await serve(set) });
});
process.once('disconnect', () => process.exit(0));

async function serve({ model, surrogates }: Served): Promise<string> {
  const maskroute = {
    hash: model.hash,
    block_count: model.blockCount,
    context_tokens: 2048,
    dense: false,
    surrogates: surrogates ?? null,
  };
  const models = {
    object: 'list',
    data: [{ id: model.name, object: 'model', created: 0, owned_by: 'bench', maskroute }],
  };
  const load: LoadReport = {
    object: 'maskroute.load',
    model: model.name,
    running: 0,
    waiting: 0,
    capacity: 64,
    draining: false,
  };
  const fixed: Record<string, string> = {
    '/v1/models': JSON.stringify(models),
    '/v1/load': JSON.stringify(load),
    '/readyz': '{"status":"ready"}',
  };
  const { whole, events } = answerOf(model.name);
  // With a content-length, like our backend and OpenAI's hosts.
  const json = (response: ServerResponse, body: string) =>
    response
      .writeHead(200, { 'content-type': 'application/json', 'content-length': Buffer.byteLength(body) })
      .end(body);
  const server = createServer({ keepAliveTimeout: 120_000 }, async (request, response) => {
    const known = fixed[request.url ?? ''];
    if (known !== undefined) return json(response, known);
    const asked = await readQuestion(request);
    if (asked === undefined) return response.writeHead(404).end();
    if (asked.stream !== true) return json(response, whole);
    response.writeHead(200, { 'content-type': 'text/event-stream', 'cache-control': 'no-cache' });
    // A token at a time, like a model: gateways do their work for each chunk.
    for (const event of events) {
      response.write(event);
      await nextTurn();
    }
    response.end();
  });
  await once(server.listen(0, '127.0.0.1'), 'listening');
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
}

/** The request's body; undefined for a GET (the edge asks what an answer cost) and for a body that broke off. */
async function readQuestion(request: IncomingMessage): Promise<{ stream?: boolean } | undefined> {
  if (request.method !== 'POST') return undefined;
  try {
    return JSON.parse(await text(request)) ?? undefined;
  } catch {
    return undefined;
  }
}

const TOKENS = 32;

function answerOf(model: string) {
  const content = 'The sky is blue because of how air scatters light. '.repeat(3);
  const usage = { prompt_tokens: 60, completion_tokens: TOKENS, total_tokens: 60 + TOKENS };
  const head = { id: 'chatcmpl-0123456789', created: 1_700_000_000, model };
  const whole = {
    ...head,
    object: 'chat.completion',
    choices: [{ index: 0, message: { role: 'assistant', content }, finish_reason: 'stop', logprobs: null }],
    usage,
  };
  const chunk = (delta: object, more: object = {}) =>
    `data: ${JSON.stringify({ ...head, object: 'chat.completion.chunk', choices: [{ index: 0, delta, finish_reason: null }], ...more })}\n\n`;
  const chunks = Array.from({ length: TOKENS }, (_, index) => chunk({ content: ` word${index}` }));
  return {
    whole: JSON.stringify(whole),
    events: [...chunks, chunk({}, { usage }), 'data: [DONE]\n\n'],
  };
}
