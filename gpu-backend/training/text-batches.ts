/**
 * Calibration samples as batches of a training step. Sequences of similar length stand side by side, so that
 * little is padded; nobody attends to another's tokens, and padding, at the end, is neither attended to nor scored.
 */
import type { Sample } from '../calibration/samples.ts';
import { scoredPositions } from '../calibration/samples.ts';
import type { GateBatch, TextBatch } from './batch.ts';

export type SampleBatch = TextBatch & {
  readonly tokenIds: Int32Array;
  readonly scoredRows: Int32Array;
  /** The text's own next token at every scored position, `[R]`. */
  readonly nextIds: Int32Array;
};

/** Batches of at most `tokensMax` tokens with padding, but at least one sample each; the shortest come first. */
export function batchSamples(samples: readonly Sample[], tokensMax: number): SampleBatch[] {
  const sorted = samples
    .map((sample, index) => ({ sample, index }))
    .sort((a, b) => a.sample.tokenIds.length - b.sample.tokenIds.length || a.index - b.index);
  const groups: Sample[][] = [];
  for (const { sample } of sorted) {
    const group = groups.at(-1);
    if (group !== undefined && (group.length + 1) * sample.tokenIds.length <= tokensMax) group.push(sample);
    else groups.push([sample]);
  }
  return groups.map(sampleBatch);
}

/** The text as its own target: next-token loss instead of KL to the dense model. */
export const nextTokenTargets = ({ nextIds, ...text }: SampleBatch): GateBatch => ({
  ...text,
  targetIds: nextIds,
  targetProbabilities: new Float32Array(nextIds.length).fill(1),
});

function sampleBatch(samples: readonly Sample[]): SampleBatch {
  const width = Math.max(...samples.map(({ tokenIds }) => tokenIds.length));
  const tokenIds = new Int32Array(samples.length * width);
  const scoredRows: number[] = [];
  const nextIds: number[] = [];
  samples.forEach((sample, row) => {
    const { length } = sample.tokenIds;
    tokenIds.set(sample.tokenIds, row * width);
    // Padding repeats the last token: nothing out of the ordinary for activations that share a scale.
    tokenIds.fill(sample.tokenIds[length - 1]!, row * width + length, (row + 1) * width);
    for (let i = 0; i < scoredPositions(sample); i++) {
      scoredRows.push(row * width + sample.scoreFrom + i);
      nextIds.push(sample.tokenIds[sample.scoreFrom + i + 1]!);
    }
  });
  return {
    tokenIds,
    sequences: samples.length,
    scoredRows: Int32Array.from(scoredRows),
    nextIds: Int32Array.from(nextIds),
  };
}
