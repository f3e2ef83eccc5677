/** The one interface behind which every encoder stands, at the edge and in calibration. */
import type { EncoderSpec } from '../mask/mask-set.ts';

export interface Encoder {
  readonly spec: EncoderSpec;
  /** It computes where it is called and waits for nobody: no clock could stop it, so none is set. */
  readonly isLocal?: true;
  /**
   * One L2-normalised vector of `spec.dimensions` a text; an empty or unknown text gives the zero vector.
   * Rejects when the encoder fails or `signal` aborts. `region` is where the texts come from, for an encoder that runs
   * in several places.
   */
  embed(texts: readonly string[], signal?: AbortSignal, region?: string): Promise<Float32Array[]>;
}

/** Longer prompts are cut before they are embedded: enough to tell the kind, bounded for the edge's CPU. */
export const EMBED_CHARS_MAX = 4000;

/* Vector arithmetic that every encoder shares. */

/** Scales to length 1 in place and returns it; the zero vector stays as it is. */
export function normalise(vector: Float32Array): Float32Array {
  let squares = 0;
  for (const value of vector) squares += value * value;
  if (squares === 0) return vector;
  const factor = 1 / Math.sqrt(squares);
  for (let i = 0; i < vector.length; i++) vector[i] = vector[i]! * factor;
  return vector;
}
