/** Entry point of the engine's worker thread: wires the runner and the loop to the messages of the main thread. */
import { parentPort, workerData } from 'node:worker_threads';
import type { MaskrouteError } from '../../shared/wire/errors.ts';
import { EngineLoop } from './engine-loop.ts';
import { openRunner } from './runner.ts';
import type { FromThread, ThreadError, ThreadStart, ToThread } from './thread-messages.ts';
import { writeStats } from './thread-messages.ts';

const start = workerData as ThreadStart;
const port = parentPort!;
const send = (message: FromThread): void => port.postMessage(message);

const { modelDir, config, surrogates, threads } = start;
const runner = await openRunner(modelDir, config, { threads, surrogates });
const loop = new EngineLoop(runner, start.limits, {
  event: (requestId, event) => send({ type: 'event', requestId, event }),
  failed: (requestId, error) => send({ type: 'failed', requestId, error: wireError(error) }),
});
port.on('message', (message: ToThread) => {
  switch (message.type) {
    case 'generate':
      return loop.add(message.request);
    case 'cancel':
      return loop.cancel(message.requestId);
    case 'ping':
      return send({ type: 'pong' });
    case 'close':
      return loop.close();
  }
});
send({ type: 'ready' });

const stats = new Float64Array(start.stats);
await loop.run(() => writeStats(stats, loop.stats()));
await runner.close();
port.close();

function wireError({ code, message, param, retryAfter_s, cause }: MaskrouteError): ThreadError {
  return {
    code,
    message,
    param,
    retryAfter_s,
    detail: cause instanceof Error ? (cause.stack ?? cause.message) : '',
  };
}
