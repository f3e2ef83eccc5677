/** Learning layer by layer gives the bits of the whole graph: losses, gradients and targets, for every kind of layer. */
import { mkdtemp, readdir, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { nextTokenBatch } from '../../../../gpu-backend/learning/gates/batches.ts';
import { openGateSession, openLossSession } from '../../../../gpu-backend/learning/gates/gate-session.ts';
import { openLayeredSession } from '../../../../gpu-backend/learning/gates/layered-session.ts';
import { fastestRounding } from '../../../../gpu-backend/learning/gates/rounding.ts';
import { openTeacher } from '../../../../gpu-backend/learning/gates/teacher.ts';
import type { ModelConfig, WeightKind } from '../../../../gpu-backend/model/model-source.ts';
import { createRandom } from '../../../../gpu-backend/random.ts';
import {
  asGemma,
  calibrated,
  emitFromMemory,
  randomLlama,
  randomSurrogates,
} from '../../../support/random-llama.ts';

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'maskroute-layered-'));
});
afterEach(() => rm(folder, { recursive: true }));

const CASES: [string, WeightKind, Partial<ModelConfig>, number][] = [
  ['Llama, eight bits, with surrogates', 'q8', { tiedEmbeddings: false }, 32],
  ['Qwen 2, fp32', 'f32', { architecture: 'qwen2', attentionBias: 'qkv' }, 0],
  [
    'Qwen 2, eight bits by column, with surrogates',
    'q8-columns',
    { architecture: 'qwen2', attentionBias: 'qkvo', tiedEmbeddings: false },
    32,
  ],
  ['Qwen 3, four bits', 'q4', { architecture: 'qwen3', headNorms: true, headSize: 32 }, 0],
  ['Gemma 3, eight bits, with surrogates', 'q8', asGemma(), 32],
  ['Gemma 3, eight bits by column', 'q8-columns', asGemma(), 0],
  [
    'Mistral, a window, eight bits',
    'q8',
    { architecture: 'mistral', slidingWindow: { tokens: 5, layers: [0, 1, 2, 3] } },
    0,
  ],
];

test.each(CASES)('%s: the same bits', async (_, weights, changes, rank) => {
  const source = randomLlama(changes);
  const { config } = source;
  // Calibrated, some matrices of a layer have eight bits.
  const holding = weights === 'q4' ? calibrated(weights, config) : weights;
  await emitFromMemory(source, holding, folder, () => {});
  const surrogates = rank === 0 ? undefined : randomSurrogates(config, rank);
  const random = createRandom(3);
  const text = nextTokenBatch(
    Int32Array.from({ length: 48 }, () => random.below(config.vocabularySize)),
    3,
  );
  const rounding = await fastestRounding();
  const options = { threads: 1, rounding, surrogates, tail: true };
  const layered = await openLayeredSession(folder, config, { ...options, layersKept: 1 });
  const teacher = await openTeacher(folder, config, { threads: 1 });
  const losses = await openLossSession(folder, config, options);
  const steps = await openGateSession(folder, config, options);
  try {
    const batch = await teacher.teach(text);
    expect(await layered.teach(text)).toEqual(batch);
    // Open, shut and between; twice, as kept layers are used again.
    for (const gates of [
      [1, 1, 1, 1, 1, 1, 1, 1],
      [1, 0, 0.4, 1, 0, 0, 0.9, 1],
    ]) {
      expect(await layered.loss(batch, gates)).toBe(await losses.loss(batch, gates));
      expect(await layered.step(batch, gates)).toEqual(await steps.step(batch, gates));
    }
  } finally {
    for (const session of [layered, teacher, losses, steps]) await session.close();
  }
  const graphs = (await readdir(folder)).filter((name) => name.includes('.onnx'));
  expect(graphs.sort()).toEqual(['model-batched.onnx', 'model.onnx']);
});
