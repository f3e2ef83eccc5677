/** The upstream of `bench edge` under an edge whose clients leave. */
import { once } from 'node:events';
import { connect } from 'node:net';
import { afterAll, expect, test } from 'vitest';
import { startUpstream } from '../../../gpu-backend/bench/edge-peers.ts';
import { DEFAULT_MODEL } from '../../../gpu-backend/model/sources/resolve.ts';
import { readMaskSet } from '../../../gpu-backend/publication/publish.ts';

const upstream = await startUpstream(await readMaskSet(`gpu-backend/presets/${DEFAULT_MODEL}/mask-set.json`));
afterAll(() => upstream.stop());

const ask = (stream: boolean) =>
  fetch(upstream.target.url, { method: 'POST', body: JSON.stringify({ stream }) });

test('it goes on answering when a client hangs up, half-way through its question or in the answer', async () => {
  const { port } = new URL(upstream.url);
  const socket = connect(Number(port), '127.0.0.1');
  await once(socket, 'connect');
  socket.write('POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"stream"');
  socket.resetAndDestroy();
  await once(socket, 'close');
  const stream = await ask(true);
  await stream.body?.cancel();
  expect(await (await ask(true)).text()).toMatch(/data: \[DONE\]\n\n$/);
});

test('it does not know what an answer cost', async () => {
  const cost = await fetch(`${upstream.url}/v1/answers/0123456789`);
  expect(cost.status).toBe(404);
  expect(await (await ask(false)).json()).toMatchObject({ object: 'chat.completion' });
});
