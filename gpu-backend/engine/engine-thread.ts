/**
 * The engine's worker thread: what the main thread and it say to each other (structured clones, so plain data only), and
 * the runner and the loop behind it.
 */
import { parentPort, workerData } from 'node:worker_threads';
import type { SurrogatesId } from '../../shared/mask/mask.ts';
import type { ErrorCode, MaskrouteError } from '../../shared/wire/errors.ts';
import type { KvType, ModelConfig } from '../model/model-source.ts';
import type { Device } from '../onnx/device.ts';
import { type EngineEvent, type GenerateRequest, writeStats } from './engine.ts';
import { EngineLoop, type LoopLimits } from './engine-loop.ts';
import { openRunner } from './runner.ts';
import { measureStepTimes } from './step-cost.ts';

export type ThreadStart = {
  readonly modelDir: string;
  readonly config: ModelConfig;
  readonly surrogates: SurrogatesId | undefined;
  readonly threads: number;
  readonly device: Device;
  readonly kvType: KvType;
  readonly limits: LoopLimits;
  /** Statistics, written after every step. */
  readonly stats: SharedArrayBuffer;
};

export type ToThread =
  | { readonly type: 'generate'; readonly request: GenerateRequest }
  | { readonly type: 'cancel'; readonly requestId: string }
  /** Answered with `pong` between two steps: a thread that does not answer is stuck in a step. */
  | { readonly type: 'ping' }
  | { readonly type: 'close' };

/** A `MaskrouteError` as plain data; `detail`: the stack of its cause, for the log. */
export type ThreadError = {
  readonly code: ErrorCode;
  readonly message: string;
  readonly param: string | null;
  readonly retryAfter_s: number | undefined;
  readonly detail: string;
};

export type FromThread =
  | { readonly type: 'ready' }
  | { readonly type: 'pong' }
  | { readonly type: 'started'; readonly requestId: string }
  | { readonly type: 'event'; readonly requestId: string; readonly event: EngineEvent }
  | { readonly type: 'failed'; readonly requestId: string; readonly error: ThreadError };

const start = workerData as ThreadStart;
const port = parentPort!;
const send = (message: FromThread): void => port.postMessage(message);

const { modelDir, config, surrogates, threads, device, kvType } = start;
const runner = await openRunner(modelDir, config, { threads, surrogates, device, kvType, batches: true });
const loop = new EngineLoop(runner, start.limits, await measureStepTimes(runner), {
  started: (requestId) => send({ type: 'started', requestId }),
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
