/** What a run of the model is told: which blocks run, how tokens are drawn. */
import type { Mask } from '../../shared/mask.ts';

export type KvMode = 'preserve' | 'elide';

/** What the model may do in this request. */
export type MaskPlan = { readonly mask: Mask; readonly kv: KvMode };

export type Sampling = {
  /** 0 is greedy. */
  readonly temperature: number;
  readonly topP: number;
  /** 0 means no limit. */
  readonly topK: number;
  readonly minP: number;
  readonly presencePenalty: number;
  readonly frequencyPenalty: number;
  readonly repetitionPenalty: number;
  readonly logitBias: readonly (readonly [tokenId: number, bias: number])[];
  /** Equal seeds give equal tokens; the engine draws one when it is absent. */
  readonly seed: number | undefined;
};

export type TokenLogprob = {
  readonly tokenId: number;
  readonly logprob: number;
  readonly top: readonly { readonly tokenId: number; readonly logprob: number }[];
};
