/**
 * Runs the model's graphs: new tokens of one sequence under one mask plan, or of several, each under its own; logits of
 * the rows that are asked for. It knows tensors and nothing of requests; the scheduler knows requests and nothing of tensors.
 *
 * There are two graphs over one file of weights, which give a row the same bits: one for one mask, with the fewest nodes
 * (`one-mask-run.ts`), and the batched one, for many masks and for pieces of prompts in company (`batch-run.ts`). ONNX Runtime
 * packs weights for each session, so a large model opens the batched one alone: there nodes cost nothing beside weights.
 */
import { stat } from 'node:fs/promises';
import { join } from 'node:path';
import { BATCH_PLACES } from '../model/architectures/batched-attention.ts';
import { batchedLlamaGraph } from '../model/architectures/batched-llama.ts';
import { llamaGraph } from '../model/architectures/llama.ts';
import { withExactProducts } from '../model/architectures/projections.ts';
import { BATCHED_MODEL_FILE, MODEL_FILE, WEIGHTS_FILE } from '../model/emit.ts';
import type { KvType, ModelConfig } from '../model/model-source.ts';
import { readStoredLlama } from '../model/stored-llama.ts';
import type { Graph } from '../onnx/graph.ts';
import type { Session, SessionOptions } from '../onnx/session.ts';
import { createSession, createSessionIn } from '../onnx/session.ts';
import { runBatch } from './batch-run.ts';
import { areAlike, runHeads, runPiece } from './one-mask-run.ts';
import { hostParts, isToken, onHost, type RunInput } from './run-input.ts';
import { checkSurrogates, type Runner, type RunnerOptions } from './runner-interface.ts';

export type { Runner } from './runner-interface.ts';

/** The default model's weights twice: 160 MB. */
const TWO_SESSIONS_BYTES_MAX = 2 ** 30;

/** Opens `modelDir/model.onnx`, whose weights are mapped from the file beside it. */
export async function openRunner(
  modelDir: string,
  config: ModelConfig,
  options: RunnerOptions,
): Promise<Runner> {
  if (options.device?.kind === 'webgpu') {
    const { openWebgpuRunner } = await import('./webgpu-runner.ts');
    return openWebgpuRunner(modelDir, config, options);
  }
  const { batches = false, surrogates, kvType = 'f32', exactProducts = false, reuseLogits = false } = options;
  const isLarge = batches && (await stat(join(modelDir, WEIGHTS_FILE))).size > TWO_SESSIONS_BYTES_MAX;
  const { threads, profileFile } = options;
  const settings = { threads, ...(profileFile === undefined ? {} : { profileFile }) };
  const open = await graphsOf(modelDir, config, { kvType, exactProducts }, settings);
  const one = isLarge ? undefined : await open.one();
  const many = batches ? await open.many() : undefined;
  const parts = hostParts(config, kvType, reuseLogits);
  const compute = async (inputs: readonly RunInput[]): Promise<Float32Array[]> => {
    if (inputs.length > BATCH_PLACES)
      throw new RangeError(`${inputs.length} sequences for ${BATCH_PLACES} places`);
    for (const { plan } of inputs) checkSurrogates(plan.mask, surrogates);
    const own = inputs.map(onHost);
    parts.logits.begin();
    if (one !== undefined) {
      const isAlone = own.length === 1;
      if (parts.heads === undefined && isAlone) return [await runPiece(one, parts, own[0]!)];
      const areTokens = own.every((input) => isToken(input, parts));
      if (parts.heads !== undefined && (isAlone || (areTokens && areAlike(own))))
        return runHeads(one, parts, parts.heads, own);
    }
    if (many === undefined) throw new Error('this runner was opened for one sequence at a time');
    return runBatch(many, parts, own);
  };
  // The runtime begins a run in a later turn of the event loop; until it is over, nobody else may move heads.
  let last: Promise<unknown> = Promise.resolve();
  const runMany = (inputs: readonly RunInput[]): Promise<Float32Array[]> => {
    const own = last.then(() => compute(inputs));
    last = own.catch(() => {});
    return own;
  };
  return {
    config,
    surrogates,
    newCache: parts.newCache,
    run: async (input) => (await runMany([input]))[0]!,
    runMany,
    close: async () => {
      for (const session of [one, many]) {
        session?.endProfiling();
        await session?.release();
      }
    },
  };
}

type Graphs = { one(): Promise<Session>; many(): Promise<Session> };

/** Graphs that keep K and V in fp32 are installed with the model; others are made of its weights, which takes some milliseconds. */
async function graphsOf(
  modelDir: string,
  config: ModelConfig,
  { kvType, exactProducts }: { readonly kvType: KvType; readonly exactProducts: boolean },
  settings: SessionOptions,
): Promise<Graphs> {
  if (kvType === 'f32' && !exactProducts) {
    return {
      one: () => createSession(join(modelDir, MODEL_FILE), settings),
      many: () => createSession(join(modelDir, BATCHED_MODEL_FILE), settings),
    };
  }
  const stored = await readStoredLlama(modelDir, config, 'with surrogates');
  const made = (graph: Graph) =>
    createSessionIn(modelDir, exactProducts ? withExactProducts(graph) : graph, settings);
  return {
    one: () => made(llamaGraph(config, stored, kvType === 'f32' ? 'heads' : kvType)),
    many: () => made(batchedLlamaGraph(config, stored, kvType)),
  };
}
