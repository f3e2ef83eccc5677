/**
 * How little a block or layer changes the residual stream: the cosine similarity of the stream before and after it,
 * averaged over all tokens. ShortGPT's block influence is 1 − the cosine of a layer (Men et al., 2024); LLM-Drop's
 * importance is 1 − the cosine of an attention block with its residual (He et al., 2024).
 *
 * The streams are inner values of the serving graph; a copy of the graph has them as outputs. Rotating the stream does
 * not change cosines.
 */
import { denseMask } from '../../../../shared/mask/mask.ts';
import { bindPiece } from '../../../engine/one-mask-run.ts';
import { hostParts } from '../../../engine/run-input.ts';
import { llamaGraph } from '../../../model/architectures/one-mask-llama.ts';
import type { ModelConfig } from '../../../model/model-source.ts';
import type { InstalledModel } from '../../../model/store.ts';
import { readStoredLlama } from '../../../model/stored-llama.ts';
import type { Graph } from '../../../onnx/graph.ts';
import type { Fetches, Outputs, Session } from '../../../onnx/session.ts';
import { createSessionIn, floats } from '../../../onnx/session.ts';

export type Similarities = {
  /** Before and after each block, `[2L]`. */
  readonly blocks: readonly number[];
  /** Before and after each layer, `[L]`. */
  readonly layers: readonly number[];
};

/** Under the dense model, over all tokens of `sequences`. Rejects when `signal` aborts. */
export async function measureSimilarities(
  { folder, manifest }: InstalledModel,
  sequences: readonly Int32Array[],
  threads: number,
  signal?: AbortSignal,
): Promise<Similarities> {
  const { config } = manifest;
  const graph = llamaGraph(config, await readStoredLlama(folder, config), 'f32');
  const names = exposeStreams(graph, config.hiddenSize);
  const session = await createSessionIn(folder, graph, { threads });
  const blocks = Array<number>(2 * config.layerCount).fill(0);
  const layers = Array<number>(config.layerCount).fill(0);
  let tokens = 0;
  try {
    for (const tokenIds of sequences) {
      signal?.throwIfAborted();
      const outputs = await runDense(session, config, tokenIds, names);
      const streams = names.map((name) => floats(outputs[name]!));
      for (let start = 0; start < streams[0]!.length; start += config.hiddenSize) {
        const rows = streams.map((stream) => stream.subarray(start, start + config.hiddenSize));
        for (const block of blocks.keys()) blocks[block]! += cosine(rows[block]!, rows[block + 1]!);
        for (const layer of layers.keys()) layers[layer]! += cosine(rows[2 * layer]!, rows[2 * layer + 2]!);
        tokens++;
      }
    }
  } finally {
    await session.release();
  }
  const mean = (sums: readonly number[]) => sums.map((sum) => sum / tokens);
  return { blocks: mean(blocks), layers: mean(layers) };
}

/** The stream before each of the 2L blocks, and after the last: 2L + 1 names, now outputs of the graph. */
function exposeStreams(graph: Graph, hiddenSize: number): string[] {
  const first = graph.nodes.find(({ op }) => op === 'SimplifiedLayerNormalization')!.inputs[0]!;
  const between = graph.nodes
    .filter(({ op }) => op === 'SkipSimplifiedLayerNormalization')
    .map(({ outputs }) => outputs[3]!);
  const gather = graph.nodes.find(({ inputs }) => inputs[1] === 'logit_rows')!;
  const names = [first, ...between, gather.inputs[0]!];
  for (const name of names) graph.outputs.push({ name, type: 'f32', shape: [1, 'S', hiddenSize] });
  return names;
}

/** Runs every block with an empty cache; new keys and values are written where attention reads them. */
function runDense(
  session: Session,
  config: ModelConfig,
  tokenIds: Int32Array,
  names: readonly string[],
): Promise<Outputs> {
  const parts = hostParts(config, 'f32');
  const plan = { mask: denseMask(2 * config.layerCount), kv: 'preserve' } as const;
  const input = { cache: parts.newCache(), tokenIds, plan, logitRows: [] };
  const { feeds, bound } = bindPiece(session, parts, input);
  const fetches: Fetches = { ...bound, ...Object.fromEntries(names.map((name) => [name, null])) };
  return session.run(feeds, fetches);
}

function cosine(a: Float32Array, b: Float32Array): number {
  let [dot, aa, bb] = [0, 0, 0];
  for (let i = 0; i < a.length; i++) {
    dot += a[i]! * b[i]!;
    aa += a[i]! * a[i]!;
    bb += b[i]! * b[i]!;
  }
  return dot / Math.sqrt(Math.max(aa * bb, Number.MIN_VALUE));
}
