/**
 * Runs the model's graphs on the CPU: new tokens of one or several sequences, each under its own mask plan, to logits of
 * the wanted rows. It knows tensors and nothing of requests; the scheduler knows requests and nothing of tensors.
 *
 * Two graphs share one file of weights and compute bit-identical rows: one takes a single mask and has the fewest nodes
 * (`one-mask-run.ts`); the batched one takes many masks and pieces of prompts together with tokens (`batch-run.ts`). ONNX
 * Runtime packs the weights once for each session, so a large model opens only the batched graph: its additional nodes cost
 * little compared with the weights.
 */
import { readFile, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { batchedLlamaGraph } from '../model/architectures/batched-llama.ts';
import { llamaGraph } from '../model/architectures/one-mask-llama.ts';
import { withExactProducts } from '../model/architectures/projections.ts';
import { BATCHED_MODEL_FILE, MODEL_FILE, WEIGHTS_FILE } from '../model/emit.ts';
import type { KvType, ModelConfig } from '../model/model-source.ts';
import { readStoredLlama } from '../model/stored-llama.ts';
import { oneAtATime } from '../one-at-a-time.ts';
import type { Graph } from '../onnx/graph.ts';
import type { Session, SessionOptions } from '../onnx/session.ts';
import { createSession, createSessionIn, multipliesSignedExactly } from '../onnx/session.ts';
import { runBatch } from './batch-run.ts';
import { areAlike, runHeads, runPiece } from './one-mask-run.ts';
import { hostParts, isToken, onHost, type RunInput } from './run-input.ts';
import { checkInputs, type Runner, type RunnerOptions } from './runner-interface.ts';

/** Larger models open one session only. (Two sessions of the default model take 160 MB.) */
const TWO_SESSIONS_BYTES_MAX = 2 ** 30;

/** Opens the graphs in `modelDir`, whose weights are mapped from the file beside them. */
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
    checkInputs(inputs, surrogates);
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
  // One run at a time: the runtime starts it in a later turn of the event loop, and nothing may move K and V meanwhile.
  const inTurn = oneAtATime();
  const runMany = (inputs: readonly RunInput[]) => inTurn(() => compute(inputs));
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

/**
 * Graphs with keys and values in fp32 are files of the model. Others are built from its weights when it opens, within milliseconds,
 * and so are those whose signed codes this CPU does not multiply exactly.
 */
async function graphsOf(
  modelDir: string,
  config: ModelConfig,
  { kvType, exactProducts }: { readonly kvType: KvType; readonly exactProducts: boolean },
  settings: SessionOptions,
): Promise<Graphs> {
  if (kvType === 'f32' && !exactProducts && (await areExactInFiles(modelDir))) {
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

/** The operator of all products with signed codes; a graph's file has the names of its operators as text. */
const SIGNED_PRODUCT = 'MatMulIntegerToFloat';

/** Whether this CPU multiplies exactly what the model's graphs multiply. It is tried only for graphs with signed codes. */
async function areExactInFiles(modelDir: string): Promise<boolean> {
  const graph = await readFile(join(modelDir, MODEL_FILE));
  return !graph.includes(SIGNED_PRODUCT) || multipliesSignedExactly();
}
