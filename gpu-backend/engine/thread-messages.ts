/** What goes between the main thread and the engine's thread. Structured clones, so plain data only. */

import type { SurrogatesId } from '../../shared/mask/mask.ts';
import type { ErrorCode } from '../../shared/wire/errors.ts';
import type { ModelConfig } from '../model/model-source.ts';
import type { EngineEvent, GenerateRequest } from './engine.ts';
import type { LoopLimits, LoopStats } from './engine-loop.ts';

export type ThreadStart = {
  readonly modelDir: string;
  readonly config: ModelConfig;
  readonly surrogates: SurrogatesId | undefined;
  readonly threads: number;
  readonly limits: LoopLimits;
  /** Statistics, written by the engine's thread after every step: see `STATS`. */
  readonly stats: SharedArrayBuffer;
};

export type ToThread =
  | { readonly type: 'generate'; readonly request: GenerateRequest }
  | { readonly type: 'cancel'; readonly requestId: string }
  /** Answered with `pong` between two steps: a thread that does not is stuck in one. */
  | { readonly type: 'ping' }
  | { readonly type: 'close' };

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
  | { readonly type: 'event'; readonly requestId: string; readonly event: EngineEvent }
  | { readonly type: 'failed'; readonly requestId: string; readonly error: ThreadError };

/** The order of the numbers in the shared statistics. */
const STATS = [
  'requestsRunning',
  'requestsWaiting',
  'kvCacheUsage',
  'leastRecentStep_ms',
  'oldestUnstarted_ms',
  'stepsTotal',
  'promptTokensTotal',
  'generatedTokensTotal',
] as const satisfies readonly (keyof LoopStats)[];

export const newSharedStats = (): SharedArrayBuffer =>
  new SharedArrayBuffer(STATS.length * Float64Array.BYTES_PER_ELEMENT);

export function writeStats(shared: Float64Array, stats: LoopStats): void {
  STATS.forEach((name, i) => {
    shared[i] = stats[name];
  });
}

export const readStats = (shared: Float64Array): LoopStats =>
  Object.fromEntries(STATS.map((name, i) => [name, shared[i]!])) as LoopStats;
