/** Scores of a mask by plain loops over the naive model, in double precision. */
import type { Sample } from '../../../../gpu-backend/learning/data/samples.ts';
import type { SampleScores } from '../../../../gpu-backend/learning/search/score-masks.ts';
import { denseMask, type Mask } from '../../../../shared/mask/mask.ts';
import { naiveLlama } from '../../../support/naive-llama.ts';
import { randomLlama } from '../../../support/random-llama.ts';

const source = randomLlama({ tiedEmbeddings: false });
const tensors = new Map<string, Promise<Float32Array>>();
/** Drawing the weights takes longer than a few tokens. */
function read(name: string): Promise<Float32Array> {
  const tensor = tensors.get(name) ?? source.read(name);
  tensors.set(name, tensor);
  return tensor;
}
export const naiveModel = () => naiveLlama({ ...source, read });

/** Log-probabilities of every scored position. */
export async function naiveLogs({ tokenIds, scoreFrom }: Sample, mask: Mask): Promise<number[][]> {
  const model = await naiveModel();
  const logits = [...tokenIds.subarray(0, -1)].map((id) => model.next(id, mask));
  return logits.slice(scoreFrom).map((row) => {
    const sum = Math.log(row.reduce((total, value) => total + Math.exp(value), 0));
    return [...row].map((value) => value - sum);
  });
}

const denseLogs = new Map<Sample, Promise<number[][]>>();

export async function naiveScores(sample: Sample, mask: Mask): Promise<SampleScores> {
  const known = denseLogs.get(sample) ?? naiveLogs(sample, denseMask(mask.runs.length));
  denseLogs.set(sample, known);
  const dense = await known;
  const masked = await naiveLogs(sample, mask);
  const scores = { positions: dense.length, kl: 0, klEven: 0, equalTops: 0, loss: 0 };
  dense.forEach((p, i) => {
    const q = masked[i]!;
    const kl = p.reduce((sum, value, token) => sum + Math.exp(value) * (value - q[token]!), 0);
    scores.kl += kl;
    scores.klEven += i % 2 === 0 ? kl : 0;
    scores.equalTops += p.indexOf(Math.max(...p)) === q.indexOf(Math.max(...q)) ? 1 : 0;
    scores.loss -= q[sample.tokenIds[sample.scoreFrom + i + 1]!]!;
  });
  return scores;
}
