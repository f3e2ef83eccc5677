/**
 * What the API needs to serve one model: its name, its engine, and the way between text and token ids.
 * `main.ts` builds it from the model store; tests build it from whatever they need.
 */

import { BODY_BYTES_MAX } from '../../shared/wire/openai.ts';
import type { Engine } from '../engine/engine.ts';
import type { EncodedText, TextCall, TextJob } from '../model/tokenizer/text-service.ts';
import type { TokenReader } from '../model/tokenizer/token-bytes.ts';

export type TokenText = TokenReader & {
  /** Rejects with MaskrouteError, as `TextService`. */
  encode(job: TextJob, call: TextCall): Promise<EncodedText>;
};

export type ServedModel = {
  readonly name: string;
  /** Unix time, seconds. */
  readonly created_s: number;
  readonly engine: Engine;
  readonly text: TokenText;
  /** Ids that end an answer unless `ignore_eos`. */
  readonly endTokenIds: readonly number[];
};

/* Every bound and wait of the API in one place; tests shorten the waits. */

export type ApiLimits = {
  readonly bodyBytesMax: number;
  /** Bodies that are arriving, in number and in bytes together, and how long each may take. */
  readonly bodiesArrivingMax: number;
  readonly bytesArrivingMax: number;
  readonly bodyArrival_ms: number;
  /** Completions that are under way, once their bodies are whole: more than the engine's line holds, yet bounded. */
  readonly inFlightMax: number;
  /** Prompts times `n` in one request. */
  readonly choicesMax: number;
  /** Choices of one request that are in the engine at a time, so that one request cannot fill the line. */
  readonly choicesAtOnce: number;
  /** How long a streaming answer waits for its first event before it commits to status 200. */
  readonly commit_ms: number;
  /** A comment goes out when a stream has been silent for so long. */
  readonly keepalive_ms: number;
  /** A client that takes nothing for so long is gone. */
  readonly stall_ms: number;
  /** How long a choice of an admitted request keeps asking for a place in a full line. */
  readonly readmit_ms: number;
  /** An engine that gives no sign of life for so long is stuck. Longer than a step of a large model on a slow machine. */
  readonly engineSilence_ms: number;
  /** How long running requests may take to finish after a signal to stop. */
  readonly drain_ms: number;
  /** How long requests ended by the stop may take to let go before it goes on without them. */
  readonly ending_ms: number;
};

export const DEFAULT_LIMITS: ApiLimits = {
  bodyBytesMax: BODY_BYTES_MAX,
  bodiesArrivingMax: 256,
  bytesArrivingMax: 64 * 1024 * 1024,
  bodyArrival_ms: 30_000,
  inFlightMax: 256,
  choicesMax: 256,
  choicesAtOnce: 8,
  commit_ms: 2000,
  keepalive_ms: 5000,
  stall_ms: 30_000,
  readmit_ms: 30_000,
  engineSilence_ms: 120_000,
  drain_ms: 30_000,
  ending_ms: 3000,
};
