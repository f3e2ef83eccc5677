/**
 * The engine's worker thread: it opens the runner and runs the loop. Its messages to and from the main thread are
 * structured clones, so plain data only.
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
  /** Answered with `pong` between two steps; a thread stuck in a step does not answer. */
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

/** A change of a request's state, or one of its events. */
export type RequestNews =
  | { readonly type: 'started'; readonly requestId: string }
  | { readonly type: 'event'; readonly requestId: string; readonly event: EngineEvent }
  | { readonly type: 'failed'; readonly requestId: string; readonly error: ThreadError };

export type FromThread =
  | { readonly type: 'ready' }
  | { readonly type: 'pong' }
  /** In order; all events of a step are one message. */
  | { readonly type: 'news'; readonly news: readonly RequestNews[] };

const start = workerData as ThreadStart;
const port = parentPort!;
const send = (message: FromThread): void => port.postMessage(message);

const { modelDir, config, surrogates, threads, device, kvType } = start;
const options = { threads, surrogates, device, kvType, batches: true, reuseLogits: true };
const runner = await openRunner(modelDir, config, options);
let news: RequestNews[] = [];
const loop = new EngineLoop(runner, start.limits, await measureStepTimes(runner), {
  started: (requestId) => news.push({ type: 'started', requestId }),
  event: (requestId, event) => news.push({ type: 'event', requestId, event }),
  failed: (requestId, error) => news.push({ type: 'failed', requestId, error: wireError(error) }),
});
port.on('message', (message: ToThread) => {
  receive(message);
  sendNews();
});
send({ type: 'ready' });

const stats = new Float64Array(start.stats);
await loop.run(() => {
  sendNews();
  writeStats(stats, loop.stats());
});
sendNews();
await runner.close();
port.close();

function receive(message: ToThread): void {
  switch (message.type) {
    case 'generate':
      loop.add(message.request);
      return;
    case 'cancel':
      loop.cancel(message.requestId);
      return;
    case 'ping':
      send({ type: 'pong' });
      return;
    case 'close':
      loop.close();
      return;
  }
}

function sendNews(): void {
  if (news.length === 0) return;
  send({ type: 'news', news });
  news = [];
}

function wireError({ code, message, param, retryAfter_s, cause }: MaskrouteError): ThreadError {
  return {
    code,
    message,
    param,
    retryAfter_s,
    detail: cause instanceof Error ? (cause.stack ?? cause.message) : '',
  };
}
