/** Opens a training graph of an installed model: its weights lie beside the model, and so does the graph's file. */
import { join } from 'node:path';
import type { StoredLlama } from '../model/architectures/llama.ts';
import { readStoredLlama } from '../model/stored-llama.ts';
import type { LlamaConfig, WeightKind } from '../model/types.ts';
import { encodeModel } from '../onnx/encode.ts';
import type { Graph } from '../onnx/graph.ts';
import type { Session, SessionOptions } from '../onnx/session.ts';
import { createSession } from '../onnx/session.ts';
import { writeWhole } from '../write-whole.ts';
import type { TrainingLinears } from './training-weights.ts';
import { trainingLinears } from './training-weights.ts';

/**
 * `name` tells graphs apart that are open at the same time. The first time, transposed weights are written too.
 * @throws MaskrouteError `corrupt_model`; RangeError for a quantized model whose vocabulary is not a multiple of 32.
 */
export async function openTrainingGraph(
  folder: string,
  config: LlamaConfig,
  kind: WeightKind,
  name: string,
  build: (stored: StoredLlama, linears: TrainingLinears) => Graph,
  options: SessionOptions,
): Promise<Session> {
  const stored = await readStoredLlama(folder, config, kind);
  const linears = await trainingLinears(folder, config, stored);
  // External weights are found beside the graph's file.
  const path = join(folder, `training-${name}.onnx`);
  await writeWhole(path, encodeModel(build(stored, linears)));
  return createSession(path, { spinning: false, ...options });
}
