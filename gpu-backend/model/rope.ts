/**
 * Rotary frequencies and their tables, with rope scaling. Formulas: transformers' modeling_rope_utils.py; linear scaling
 * (kaiokendev, 2023), YaRN (Peng et al., 2023, arXiv 2309.00071), Llama 3.1's scaling (its model card).
 */
import type { ModelConfig, RopeScaling } from './model-source.ts';

type RopeConfig = Pick<ModelConfig, 'headSize' | 'ropeTheta' | 'ropeScaling'>;

/** Radians a position, `[D/2]`. */
export function ropeFrequencies({ headSize, ropeTheta, ropeScaling }: RopeConfig): Float64Array {
  const half = headSize / 2;
  const plain = Float64Array.from({ length: half }, (_, i) => ropeTheta ** (-i / half));
  if (ropeScaling === undefined) return plain;
  switch (ropeScaling.type) {
    case 'linear':
      return plain.map((frequency) => frequency / ropeScaling.factor);
    case 'factors':
      return plain.map((frequency, i) => frequency / ropeScaling.factors[i]!);
    case 'llama3':
      return plain.map((frequency) => llama3Frequency(frequency, ropeScaling));
    case 'yarn':
      return yarnFrequencies(plain, ropeTheta, ropeScaling);
  }
}

/** Divides low frequencies by the factor, keeps high frequencies, and interpolates between the two bounds. */
function llama3Frequency(frequency: number, scaling: Extract<RopeScaling, { type: 'llama3' }>): number {
  const { factor, lowFrequencyFactor, highFrequencyFactor, originalContextTokens } = scaling;
  const turns = (originalContextTokens * frequency) / (2 * Math.PI);
  if (turns < lowFrequencyFactor) return frequency / factor;
  if (turns > highFrequencyFactor) return frequency;
  const smooth = (turns - lowFrequencyFactor) / (highFrequencyFactor - lowFrequencyFactor);
  return ((1 - smooth) * frequency) / factor + smooth * frequency;
}

function yarnFrequencies(
  plain: Float64Array,
  theta: number,
  scaling: Extract<RopeScaling, { type: 'yarn' }>,
): Float64Array {
  const { factor, betaFast, betaSlow, originalContextTokens, wholeDimensions } = scaling;
  const size = 2 * plain.length;
  // The dimension that makes `turns` rotations within the original context.
  const dimension = (turns: number) =>
    (size * Math.log(originalContextTokens / (turns * 2 * Math.PI))) / (2 * Math.log(theta));
  const [first, last] = [dimension(betaFast), dimension(betaSlow)];
  const low = Math.max(wholeDimensions ? Math.floor(first) : first, 0);
  let high = Math.min(wholeDimensions ? Math.ceil(last) : last, size - 1);
  if (low === high) high += 0.001;
  return plain.map((frequency, i) => {
    const stretched = Math.min(Math.max((i - low) / (high - low), 0), 1);
    return (frequency / factor) * stretched + frequency * (1 - stretched);
  });
}

/** YaRN's default factor on cos and sin. */
export const yarnAttentionFactor = (factor: number, mscale = 1): number =>
  factor <= 1 ? 1 : 0.1 * mscale * Math.log(factor) + 1;

/** The configuration of the layers whose rotary embedding has a base of its own, for the functions around. */
export const localRopeConfig = <T extends RopeConfig>(
  config: T,
  { theta }: { readonly theta: number },
): T => ({
  ...config,
  ropeTheta: theta,
  ropeScaling: undefined,
});

/** cos and sin of position · frequency, `[context, D/2]` each; computed in double precision. */
export function ropeTables(
  config: RopeConfig & Pick<ModelConfig, 'contextTokens'>,
): [Float32Array, Float32Array] {
  const { contextTokens, ropeScaling } = config;
  const frequencies = ropeFrequencies(config);
  const factor = ropeScaling?.type === 'yarn' ? ropeScaling.attentionFactor : 1;
  const half = frequencies.length;
  const cos = new Float32Array(contextTokens * half);
  const sin = new Float32Array(contextTokens * half);
  for (let i = 0; i < half; i++) {
    for (let position = 0; position < contextTokens; position++) {
      const angle = position * frequencies[i]!;
      cos[position * half + i] = factor * Math.cos(angle);
      sin[position * half + i] = factor * Math.sin(angle);
    }
  }
  return [cos, sin];
}
