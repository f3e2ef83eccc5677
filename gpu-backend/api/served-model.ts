/**
 * What the API needs to serve one model: its name, its engine, and the way between text and token ids.
 * `main.ts` builds it from the model store; tests build it from whatever they need.
 */
import type { EncodedText, TextCall, TextJob } from '../model/text-service.ts';
import type { TokenReader } from '../model/token-bytes.ts';
import type { Engine } from '../serving/engine.ts';

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
