/** Many clients at once: every turn of the event loop does a little, and the queue's places are counted before work is done. */
import { EventEmitter, once } from 'node:events';
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { expect, it, onTestFinished, vi } from 'vitest';
import { createApp } from '../../../gpu-backend/api/api-app.ts';
import { Bodies } from '../../../gpu-backend/api/body.ts';
import {
  DEFAULT_LIMITS,
  openParts,
  type ServedModel,
  type TokenText,
} from '../../../gpu-backend/api/parts.ts';
import { connectOneATurn, oneATurn } from '../../../gpu-backend/api/server.ts';
import { turnQueue } from '../../../gpu-backend/event-loop.ts';
import type { Grammars } from '../../../gpu-backend/grammar/grammars.ts';
import type { TextJob } from '../../../gpu-backend/model/tokenizer/text-service.ts';
import { maskBits, maskFromSkippedLayers, maskId } from '../../../shared/mask/mask.ts';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { answer, apiOptions, BACKEND_KEY, eventually, serveModel } from './harness.ts';
import { byteGrammars, MODEL_HASH, says, scriptedEngine, scriptedModel } from './scripted-engine.ts';

const MANY = 40;
const IN_ORDER = Array.from({ length: MANY }, (_, which) => which);

/** Notes in which turn of the event loop each of many things happens. */
function watchTurns() {
  let turn = 0;
  const seen: { readonly which: number; readonly turn: number }[] = [];
  const count = () => {
    turn++;
    if (seen.length < MANY) setImmediate(count);
  };
  setImmediate(count);
  return {
    see: (which: number) => void seen.push({ which, turn }),
    async expectOneATurn() {
      await eventually(() => seen.length === MANY);
      expect(seen.map(({ which }) => which)).toEqual(IN_ORDER);
      expect(new Set(seen.map((one) => one.turn)).size).toBe(MANY);
    },
  };
}

it('requests that come all at once get a turn of the event loop each, in their order', async () => {
  const turns = watchTurns();
  const take = oneATurn((request) => {
    turns.see(Number(new URL(request.url).searchParams.get('which')));
    return new Response('taken');
  }, turnQueue());
  const answers = IN_ORDER.map((which) => take(new Request(`http://backend.test/?which=${which}`)));
  for (const answer of await Promise.all(answers)) expect(await answer.text()).toBe('taken');
  await turns.expectOneATurn();
});

it('connections that come all at once get their parser in a turn each, in their order', async () => {
  const server = createServer((_, response) => response.end('taken'));
  connectOneATurn(server, turnQueue());
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address() as AddressInfo;
  const answers = Array.from({ length: 10 }, () =>
    fetch(`http://127.0.0.1:${port}`, { method: 'POST', body: 'x'.repeat(50_000) }).then((answer) =>
      answer.text(),
    ),
  );
  expect(new Set(await Promise.all(answers))).toEqual(new Set(['taken']));
  server.closeAllConnections();
  server.close();

  const turns = watchTurns();
  const paused = new EventEmitter();
  const resumed: number[] = [];
  paused.on('connection', ({ which }: { which: number }) => turns.see(which));
  connectOneATurn(paused as Server, turnQueue());
  for (const which of IN_ORDER) paused.emit('connection', { which, resume: () => resumed.push(which) });
  await turns.expectOneATurn();
  expect(paused).toMatchObject({ pauseOnConnect: true });
  expect(resumed).toEqual(IN_ORDER);
});

it('requests whose keys are found good all at once go on in a turn each', async () => {
  const engine = scriptedEngine(says('a'));
  const api = await apiOptions(scriptedModel(engine));
  const isGood = Promise.withResolvers<void>();
  const caller = { tenant: 'acme', edge: undefined, mayRunJobs: false };
  const parts = { ...openParts(api.options), authenticate: () => isGood.promise.then(() => caller) };
  const app = createApp(parts);
  const models = IN_ORDER.map((which) => app.request(`/v1/models/m${which}`));
  const turns = watchTurns();
  // A model that is not served here is an error, which is counted.
  let counted = 0;
  parts.metrics.request = () => turns.see(counted++);
  isGood.resolve();
  for (const answer of await Promise.all(models)) expect(answer.status).toBe(404);
  await turns.expectOneATurn();
  await api.close();
});

it('bodies that end all at once are parsed in a turn each, in their order', async () => {
  const bodies = new Bodies(DEFAULT_LIMITS, new AbortController().signal, turnQueue());
  const end = Promise.withResolvers<void>();
  const turns = watchTurns();
  const read = IN_ORDER.map(async (which) => {
    const body = new ReadableStream({
      async pull(controller) {
        await end.promise;
        controller.enqueue(new TextEncoder().encode(`{"which":${which}}`));
        controller.close();
      },
    });
    const headers = { 'content-type': 'application/json' };
    const init = { method: 'POST', body, headers, duplex: 'half' } as RequestInit;
    const request = new Request('http://backend.test', init);
    turns.see(((await bodies.readJson(request, '')) as { which: number }).which);
  });
  end.resolve();
  await Promise.all(read);
  await turns.expectOneATurn();
});

const isFull = (): never => {
  throw new MaskrouteError('queue_full', 'The queue is full.');
};

/** A model whose engine has this many places in its queue. They stay taken until they are given back. */
function withPlaces(count: number) {
  const engine = scriptedEngine(says('a'));
  const taken = new Set<object>();
  engine.expectRoom = () => {
    if (taken.size >= count) isFull();
  };
  engine.reserve = (tenant, countMax) => {
    engine.expectRoom(tenant);
    return Array.from({ length: Math.min(countMax, count - taken.size) }, () => {
      const place = {};
      taken.add(place);
      return () => taken.delete(place);
    });
  };
  return { model: scriptedModel(engine), engine, taken };
}

/** The model, whose tokenizer waits; `reads` is called with each text that it would read. */
const readingAfter = (
  model: ServedModel,
  mayRead: Promise<void>,
  reads: (job: TextJob) => void = () => {},
): ServedModel => ({
  ...model,
  text: {
    ...model.text,
    async encode(job, call) {
      reads(job);
      await mayRead;
      return model.text.encode(job, call);
    },
  },
});

const chat = (which: number) => ({
  model: 'scripted',
  messages: [{ role: 'user', content: `${which}` }],
});

it('requests whose prompts are being read keep their places: nothing of the others is read', async () => {
  const { model, taken } = withPlaces(3);
  const [reading, goOn] = [new Set<string>(), Promise.withResolvers<void>()];
  const noteReading = (job: TextJob) => reading.add(JSON.stringify(job));
  await using server = await serveModel(readingAfter(model, goOn.promise, noteReading));
  const statuses: number[] = [];
  const chats = IN_ORDER.map(async (which) => {
    const { status } = await server.post('/v1/chat/completions', chat(which));
    statuses.push(status);
  });
  await eventually(() => statuses.length === MANY - 3);
  expect(new Set(statuses)).toEqual(new Set([429]));
  expect(reading.size).toBe(3);
  goOn.resolve();
  await Promise.all(chats);
  expect(statuses.slice(-3)).toEqual([200, 200, 200]);
  expect(taken.size).toBe(0);
});

it('a request that fails, or whose client leaves, while its prompt is read gives its place back', async () => {
  const { model, taken } = withPlaces(2);
  const fails = Promise.withResolvers<never>();
  let reading = 0;
  const text: TokenText = {
    ...model.text,
    encode(_, { signal }) {
      reading++;
      const left = new Promise<never>((_resolve, reject) => {
        signal.addEventListener('abort', () => reject(new MaskrouteError('cancelled', 'Its client left.')));
      });
      return Promise.race([left, fails.promise]);
    },
  };
  await using server = await serveModel({ ...model, text });
  const leave = new AbortController();
  const left = server.post('/v1/chat/completions', chat(0), { signal: leave.signal }).catch(() => 'left');
  const failed = server.post('/v1/chat/completions', chat(1));
  await eventually(() => reading === 2);
  expect(taken.size).toBe(2);
  leave.abort();
  expect(await left).toBe('left');
  await eventually(() => taken.size === 1);
  fails.reject(new MaskrouteError('invalid_request', 'It cannot be read.'));
  expect((await failed).status).toBe(400);
  expect(taken.size).toBe(0);
});

it('a request keeps its place until the grammar of its answer is open', async () => {
  const { model, taken } = withPlaces(1);
  const [opening, goOn] = [Promise.withResolvers<void>(), Promise.withResolvers<void>()];
  const grammars: Grammars = {
    prepare: (...given) => byteGrammars.prepare(...given),
    close: async () => {},
    async open(...given) {
      opening.resolve();
      await goOn.promise;
      return byteGrammars.open(...given);
    },
  };
  await using server = await serveModel({ ...model, grammars });
  const formed = server.post('/v1/chat/completions', {
    ...chat(0),
    response_format: { type: 'json_object' },
  });
  await opening.promise;
  expect((await server.post('/v1/chat/completions', chat(1))).status).toBe(429);
  goOn.resolve();
  expect((await formed).status).toBe(200);
  expect(taken.size).toBe(0);
  expect((await server.post('/v1/chat/completions', chat(2))).status).toBe(200);
});

it('a request has a place for each of the choices with which its answer begins', async () => {
  const { model, taken } = withPlaces(3);
  const goOn = Promise.withResolvers<void>();
  await using server = await serveModel(readingAfter(model, goOn.promise), { choicesAtOnce: 3 });
  const several = server.post('/v1/chat/completions', { ...chat(0), n: 5 });
  await eventually(() => taken.size === 3);
  expect((await server.post('/v1/chat/completions', chat(1))).status).toBe(429);
  goOn.resolve();
  const { choices } = await answer<{ choices: unknown[] }>(several, 200);
  expect(choices).toHaveLength(5);
  expect(taken.size).toBe(0);
});

it('a request that finds fewer places begins with as many of its choices', async () => {
  const { model, engine, taken } = withPlaces(3);
  const [goOn, mayEnd] = [Promise.withResolvers<void>(), Promise.withResolvers<void>()];
  engine.script = { ...says('a'), lastToken: mayEnd.promise };
  await using server = await serveModel(readingAfter(model, goOn.promise));
  const one = server.post('/v1/chat/completions', chat(0));
  await eventually(() => taken.size === 1);
  const several = server.post('/v1/chat/completions', { ...chat(1), n: 5 });
  await eventually(() => taken.size === 3);
  engine.expectRoom = isFull;
  goOn.resolve();
  await eventually(() => engine.requests.length === 3);
  mayEnd.resolve();
  const { choices } = await answer<{ choices: unknown[] }>(several, 200);
  expect(choices).toHaveLength(5);
  expect((await one).status).toBe(200);
});

it('a request that found fewer places runs more of its choices at a time once there is room', async () => {
  const { model, engine, taken } = withPlaces(2);
  const goOn = Promise.withResolvers<void>();
  engine.script = { ...says('a'.repeat(400)), step_ms: 5 };
  await using server = await serveModel(readingAfter(model, goOn.promise), { choicesAtOnce: 4 });
  const several = server.post('/v1/chat/completions', { ...chat(0), n: 5 });
  await eventually(() => taken.size === 2);
  const { expectRoom } = engine;
  engine.expectRoom = isFull;
  goOn.resolve();
  await eventually(() => engine.stats().generatedTokensTotal > 4);
  expect(engine.requests).toHaveLength(2);
  engine.expectRoom = expectRoom;
  await eventually(() => engine.requests.length === 4);
  expect(engine.ended).toEqual([]);
  const { choices } = await answer<{ choices: unknown[] }>(several, 200);
  expect(choices).toHaveLength(5);
  expect(taken.size).toBe(0);
});

it.each([
  ['text', 'a', {}],
  ['JSON', '{}', { response_format: { type: 'json_object' } }],
])(
  'choices of %s that are in the engine, which counts them, have no places of their own',
  async (_, said, form) => {
    const { model, engine, taken } = withPlaces(3);
    const goOn = Promise.withResolvers<void>();
    engine.script = { ...says(said), lastToken: goOn.promise };
    await using server = await serveModel(model);
    const running = server.post('/v1/chat/completions', { ...chat(0), ...form, n: 2 });
    await eventually(() => engine.requests.length === 2);
    expect(taken.size).toBe(0);
    goOn.resolve();
    expect((await running).status).toBe(200);
  },
);

it('a later request is the newer one for a full queue, though the clock was set back meanwhile', async () => {
  const { model, engine } = withPlaces(1);
  await using server = await serveModel(model);
  vi.useFakeTimers({ toFake: ['Date'] });
  onTestFinished(() => void vi.useRealTimers());
  await server.post('/v1/chat/completions', chat(0));
  vi.setSystemTime(Date.now() - 3_600_000);
  await server.post('/v1/chat/completions', chat(1));
  const [first, second] = engine.requests.map(({ answerSince_ms }) => answerSince_ms!);
  expect(second).toBeGreaterThan(first!);
});

it('a request whose client leaves while its token ids are copied does not come to the engine', async () => {
  const { model, engine, taken } = withPlaces(1);
  const { options, close } = await apiOptions(model);
  const app = createApp(openParts(options));
  const prompt = Array.from({ length: 200 }, () => [1, 2]);
  const leave = new AbortController();
  const { reserve } = engine;
  engine.reserve = (...given) => {
    setImmediate(() => leave.abort());
    return reserve(...given);
  };
  const asked = app.request('/v1/completions', {
    method: 'POST',
    headers: { authorization: `Bearer ${BACKEND_KEY}`, 'content-type': 'application/json' },
    body: JSON.stringify({ model: 'scripted', prompt }),
    signal: leave.signal,
  });
  expect((await asked).status).toBe(499);
  expect(engine.requests).toEqual([]);
  expect(taken.size).toBe(0);
  await close();
});

/** An edge that gives out a mask when it is told to. */
async function slowEdge() {
  const mask = maskFromSkippedLayers(8, { skipAttention: [1], skipFfn: [] });
  const record = { id: maskId(MODEL_HASH, mask), modelHash: MODEL_HASH, blockCount: 8, bits: maskBits(mask) };
  const [asked, goOn] = [Promise.withResolvers<void>(), Promise.withResolvers<void>()];
  const server = createServer(async (_, response) => {
    asked.resolve();
    await goOn.promise;
    response.end(JSON.stringify(record));
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  return {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    mask: record.id,
    asked: asked.promise,
    answers: goOn.resolve,
    async [Symbol.asyncDispose]() {
      server.closeAllConnections();
      server.close();
    },
  };
}

it('requests that wait for a mask of a slow edge take no place before it is there', async () => {
  const { model, taken } = withPlaces(1);
  await using edge = await slowEdge();
  const goOn = Promise.withResolvers<void>();
  await using server = await serveModel(readingAfter(model, goOn.promise), {}, { edgeUrl: edge.url });
  const waiting = [1, 2, 3].map((which) =>
    server.post('/v1/chat/completions', { ...chat(which), mask: edge.mask }),
  );
  await edge.asked;
  const known = server.post('/v1/chat/completions', chat(0));
  await eventually(() => taken.size === 1);
  edge.answers();
  for (const one of waiting) expect((await one).status).toBe(429);
  goOn.resolve();
  expect((await known).status).toBe(200);
  expect(taken.size).toBe(0);
  const late = { ...chat(4), mask: edge.mask };
  expect((await server.post('/v1/chat/completions', late)).status).toBe(200);
});

it('a request whose client leaves while its mask is fetched does not come to the engine', async () => {
  const { model, engine } = withPlaces(1);
  await using edge = await slowEdge();
  await using server = await serveModel(model, {}, { edgeUrl: edge.url });
  const leave = new AbortController();
  const ids = { model: 'scripted', prompt: [1, 2], mask: edge.mask };
  const left = server.post('/v1/completions', ids, { signal: leave.signal }).catch(() => 'left');
  await edge.asked;
  leave.abort();
  expect(await left).toBe('left');
  // The server hears of the hang-up before it answers this.
  expect((await server.post('/v1/chat/completions', chat(0))).status).toBe(200);
  edge.answers();
  expect((await server.post('/v1/chat/completions', { ...chat(1), mask: edge.mask })).status).toBe(200);
  expect(engine.requests).toHaveLength(2);
});
