/** A weight source as `model.onnx` and `weights.bin`: what the engine opens. */
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { encodeModel } from '../onnx/encode.ts';
import type { Graph } from '../onnx/graph.ts';
import { storeExtras } from './architectures/attention-extras.ts';
import { batchedLlamaGraph } from './architectures/batched-llama.ts';
import type { StoredLayer, StoredLlama } from './architectures/llama.ts';
import { llamaGraph } from './architectures/llama.ts';
import type { StoredEmbedding, StoredLinear } from './architectures/projections.ts';
import { storeCodes, storeLinear } from './architectures/projections.ts';
import type { Basis, Matrix } from './architectures/rotation.ts';
import { fileBasis, rotatedBasis } from './architectures/rotation.ts';
import type { LayerProduct } from './matrices.ts';
import { eachProduct, headMatrix, layerMatrices, stackRows } from './matrices.ts';
import type { LlamaConfig, WeightSource } from './model-source.ts';
import { type FourBitOptions, openFourBits, type Quantizer } from './quantization/four-bits.ts';
import { PLAIN_8_BITS, roundRows } from './quantization/quantize.ts';
import { ropeTables } from './rope.ts';
import type { WeightRange } from './weights-file.ts';
import { WeightsFile } from './weights-file.ts';

export const MODEL_FILE = 'model.onnx';
/** The graph for many sequences at once, over the same weights. */
export const BATCHED_MODEL_FILE = 'model-batched.onnx';
export const WEIGHTS_FILE = 'weights.bin';

/** How weights are held; for four bits, what they are chosen by. */
export type Holding = 'f32' | 'q8' | (FourBitOptions & { readonly kind: 'q4' });

/** Where tensors come from, where they go, and how they are changed on the way. */
type Emission = {
  readonly source: WeightSource;
  readonly file: WeightsFile;
  /** Undefined: matrices are held as they are. */
  readonly quantizer: Quantizer | undefined;
  readonly basis: Basis;
};

/**
 * One layer's tensors are in memory at a time. `onProgress` gets the fraction done, 0 to 1; when it throws, the work ends
 * there.
 */
export async function emitModel(
  source: WeightSource,
  holding: Holding,
  outDir: string,
  onProgress: (fraction: number) => void,
): Promise<void> {
  // fp32 is the reference, so it stays as the file has it; codes gain precision from a rotation.
  const basis = holding === 'f32' ? fileBasis : rotatedBasis(source.config.hiddenSize);
  const file = new WeightsFile(join(outDir, WEIGHTS_FILE), WEIGHTS_FILE);
  try {
    const quantizer = await openQuantizer(source, basis, holding, onProgress);
    const emission = { source, file, quantizer, basis };
    const from = quantizer?.progress ?? 0;
    await writeModel(emission, outDir, (done) => onProgress(from + (1 - from) * done));
  } finally {
    file.close();
  }
}

async function openQuantizer(
  source: WeightSource,
  basis: Basis,
  holding: Holding,
  onProgress: (fraction: number) => void,
): Promise<Quantizer | undefined> {
  if (holding === 'f32') return undefined;
  if (holding !== 'q8') return openFourBits(source, basis, holding, onProgress);
  const round = ({ rows, outputs, inputs }: Matrix) => roundRows(rows, outputs, inputs, PLAIN_8_BITS);
  return {
    progress: 0,
    end: round,
    layer: async (_, matrices) => eachProduct((name) => round(matrices[name])),
  };
}

async function writeModel(
  emission: Emission,
  outDir: string,
  onProgress: (fraction: number) => void,
): Promise<void> {
  const { source, file, basis } = emission;
  const { config } = source;
  const finalNorm = await source.read('model.norm.weight');
  const { embedding, head } = await storeEnds(emission, finalNorm);
  const layers: StoredLayer[] = [];
  for (let index = 0; index < config.layerCount; index++) {
    layers.push(await storeLayer(emission, index));
    onProgress((index + 1) / config.layerCount);
  }
  const [cos, sin] = ropeTables(config);
  const stored = {
    layers,
    embedding,
    head,
    finalNorm: file.append(basis.norm(finalNorm)),
    ropeCos: file.append(cos),
    ropeSin: file.append(sin),
  };
  writeGraphs(outDir, config, stored);
}

export function writeGraphs(folder: string, config: LlamaConfig, stored: StoredLlama): void {
  const write = (file: string, graph: Graph) =>
    writeFileSync(join(folder, file), encodeModel(graph), { flush: true });
  write(MODEL_FILE, llamaGraph(config, stored));
  write(BATCHED_MODEL_FILE, batchedLlamaGraph(config, stored));
}

/** Embedding and head; tied ones are stored once, as the head multiplies by them. */
async function storeEnds(
  emission: Emission,
  finalNorm: Float32Array,
): Promise<{ embedding: StoredEmbedding; head: StoredLinear }> {
  const { source, file, basis } = emission;
  const { tiedEmbeddings, hiddenSize } = source.config;
  const head = storeEnd(emission, await headMatrix(source, basis, finalNorm));
  if (tiedEmbeddings) {
    const correction = basis.embeddingFromHead(finalNorm);
    const range = correction && file.append(correction);
    return { head, embedding: { rows: head, correction: range && { values: range, size: hiddenSize } } };
  }
  const embedding = basis.embeds(await stackRows(source, ['model.embed_tokens.weight']));
  return { head, embedding: { rows: storeEnd(emission, embedding), correction: undefined } };
}

const storeEnd = ({ file, quantizer }: Emission, matrix: Matrix): StoredLinear =>
  quantizer === undefined ? storeExact(file, matrix) : storeCodes(file, quantizer.end(matrix));

async function storeLayer({ source, file, basis, quantizer }: Emission, index: number): Promise<StoredLayer> {
  const matrices = await layerMatrices(source, basis, index);
  const codes = await quantizer?.layer(index, matrices);
  const store = (name: LayerProduct): StoredLinear =>
    codes === undefined ? storeExact(file, matrices[name]) : storeCodes(file, codes[name]);
  const keep = (norm: Float32Array): WeightRange => file.append(norm);
  return {
    ...eachProduct(store),
    attentionNorm: keep(matrices.attentionNorm),
    ffnNorm: keep(matrices.ffnNorm),
    ...storeExtras(file, matrices.extras),
  };
}

const storeExact = (file: WeightsFile, { rows, outputs, inputs }: Matrix): StoredLinear =>
  storeLinear(file, 'f32', rows, outputs, inputs);
