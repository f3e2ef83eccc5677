/** Sampling that changes nothing: what a test is about it says itself. */
import type { Sampling } from '../../gpu-backend/engine/engine.ts';

export const PLAIN_SAMPLING: Sampling = {
  temperature: 1,
  topP: 1,
  topK: 0,
  minP: 0,
  presencePenalty: 0,
  frequencyPenalty: 0,
  repetitionPenalty: 1,
  logitBias: [],
  seed: 1,
};
