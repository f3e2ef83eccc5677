/** What a session does between its runs. */
import { setTimeout as sleep } from 'node:timers/promises';
import { expect, test } from 'vitest';
import { encodeModel } from '../../../gpu-backend/onnx/encode.ts';
import { GraphBuilder } from '../../../gpu-backend/onnx/graph.ts';
import { createSession, tensor } from '../../../gpu-backend/onnx/session.ts';

const SIZE = 512;

test('threads sleep as soon as a run is over', async () => {
  const g = new GraphBuilder('product');
  const x = g.input('x', 'f32', [SIZE, SIZE]);
  g.node('MatMul', [x, x], ['y']);
  g.output({ name: 'y' }, 'f32', [SIZE, SIZE]);
  const session = await createSession(encodeModel(g.graph), { threads: 2 });
  const feeds = { x: tensor('f32', new Float32Array(SIZE * SIZE), [SIZE, SIZE]) };
  const afterRuns_ms: number[] = [];
  for (let run = 0; run < 7; run++) {
    await session.run(feeds, ['y']);
    const before = process.cpuUsage();
    await sleep(60);
    const { user, system } = process.cpuUsage(before);
    afterRuns_ms.push((user + system) / 1000);
  }
  await session.release();
  // Threads that spin take 15 ms and more.
  expect(afterRuns_ms.sort((a, b) => a - b)[3]).toBeLessThan(5);
});
