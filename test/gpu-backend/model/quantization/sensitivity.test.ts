/** What rounding a matrix costs, against plain loops over the whole model with that matrix rounded. */
import { expect, test } from 'vitest';
import { divergence } from '../../../../gpu-backend/logits.ts';
import { fileBasis } from '../../../../gpu-backend/model/architectures/rotation.ts';
import { layerMatrices } from '../../../../gpu-backend/model/matrices.ts';
import type { WeightSource } from '../../../../gpu-backend/model/model-source.ts';
import { embedText } from '../../../../gpu-backend/model/quantization/calibration.ts';
import { measureSensitivity } from '../../../../gpu-backend/model/quantization/four-bits.ts';
import { openLayerSteps, openProducts } from '../../../../gpu-backend/model/quantization/layer-steps.ts';
import { dequantize, roundRows } from '../../../../gpu-backend/model/quantization/quantize.ts';
import { createRandom } from '../../../../gpu-backend/random.ts';
import { denseMask } from '../../../../shared/mask/mask.ts';
import { naiveLlama } from '../../../support/naive-llama.ts';
import { randomLlama } from '../../../support/random-llama.ts';

const PLAIN = randomLlama({ layerCount: 2 });
/** With everything that families add to attention. */
const RICH = randomLlama({
  layerCount: 2,
  attentionBias: 'qkvo',
  headNorms: true,
  layersWithoutRope: [0],
  slidingWindow: { tokens: 5, layers: [1] },
});
const { vocabularySize: V, layerCount: L } = PLAIN.config;
const SEQUENCE = 12;
const EVERY = 3;
const random = createRandom(3);
const tokenIds = Int32Array.from({ length: 2 * SEQUENCE }, () => random.below(V));

const rounded = (rows: Float32Array, outputs: number, inputs: number): Float32Array =>
  dequantize(roundRows(rows, outputs, inputs, { bits: 4, blockSize: 32 }));

/** The model with some matrices rounded. */
function withRounded(source: WeightSource, names: readonly string[]): WeightSource {
  return {
    ...source,
    async read(name) {
      const weights = await source.read(name);
      const [outputs, inputs] = source.shape(name);
      const isMatrix = name.endsWith('proj.weight') && names.some((part) => name.includes(part));
      return isMatrix ? rounded(weights, outputs!, inputs!) : weights;
    },
  };
}

/** Logits of every third position of both sequences, `[8, V]`. */
async function naiveLogits(model: WeightSource): Promise<Float32Array> {
  const rows: number[] = [];
  for (let start = 0; start < tokenIds.length; start += SEQUENCE) {
    const naive = await naiveLlama(model);
    for (let i = 0; i < SEQUENCE; i++) {
      const logits = naive.next(tokenIds[start + i]!, denseMask(2 * L));
      if (i % EVERY === EVERY - 1) rows.push(...logits);
    }
  }
  return Float32Array.from(rows);
}

const MATRICES = [
  [0, 'qkv', ['layers.0.self_attn.q', 'layers.0.self_attn.k', 'layers.0.self_attn.v']],
  [1, 'output', ['layers.1.self_attn.o']],
  [1, 'gateUp', ['layers.1.mlp.gate', 'layers.1.mlp.up']],
  [0, 'down', ['layers.0.mlp.down']],
] as const;

const CASES = [
  ...MATRICES.map((matrix) => ['a plain Llama', PLAIN, ...matrix] as const),
  ...MATRICES.map((matrix) => ['all that families add', RICH, ...matrix] as const),
];

test.each(CASES)('%s, case %#', async (_name, source, layer, name, files) => {
  await using steps = await openLayerSteps(source.config, fileBasis, SEQUENCE, 1);
  await using products = await openProducts(1);
  const layers = [await layerMatrices(source, fileBasis, 0), await layerMatrices(source, fileBasis, 1)];
  const [first, second] = await embedText(source, fileBasis, { tokenIds, sequenceTokens: SEQUENCE });
  const fractions: number[] = [];
  const found = await measureSensitivity(source, fileBasis, {
    steps,
    products,
    stream: Float32Array.from([...first!, ...second!]),
    every: EVERY,
    rounded(at, which) {
      const { rows, outputs, inputs } = layers[at]![which];
      return { rows: rounded(rows, outputs, inputs), outputs, inputs };
    },
    onProgress: (fraction) => fractions.push(fraction),
  });
  expect(found).toHaveLength(4 * L);
  expect(fractions).toEqual([0.5, 1]);
  const expected = divergence(await naiveLogits(source), await naiveLogits(withRounded(source, files)), V);
  expect(expected).toBeGreaterThan(1e-4);
  const { kl } = found.find((one) => one.layer === layer && one.name === name)!;
  expect(kl / expected).toBeGreaterThan(0.99);
  expect(kl / expected).toBeLessThan(1.01);
});

test('a divergence is what its formula says', () => {
  const p = Float32Array.of(1, 2, 3, 0, 0, 0);
  const q = Float32Array.of(1, 2, 3, 1, 0, 0);
  // The first row is equal; of the second, p is uniform and q = softmax(1, 0, 0).
  const sum = Math.E + 2;
  const expected = (Math.log(1 / 3 / (Math.E / sum)) + 2 * Math.log(1 / 3 / (1 / sum))) / 3;
  expect(divergence(p, q, 3)).toBeCloseTo(expected / 2, 6);
});
