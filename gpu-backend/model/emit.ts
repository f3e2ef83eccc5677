/** A weight source as `model.onnx` and `weights.bin`: what the engine opens. */
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { encodeModel } from '../onnx/encode.ts';
import type { Graph } from '../onnx/graph.ts';
import { batchedLlamaGraph } from './architectures/batched-llama.ts';
import type { StoredLayer, StoredLlama } from './architectures/llama.ts';
import { llamaGraph } from './architectures/llama.ts';
import type { StoredEmbedding, StoredLinear } from './architectures/projections.ts';
import { storeLinear } from './architectures/projections.ts';
import type { Basis, Matrix } from './architectures/rotation.ts';
import { fileBasis, rotatedBasis } from './architectures/rotation.ts';
import type { LlamaConfig, WeightKind, WeightSource } from './model-source.ts';
import type { WeightRange } from './weights-file.ts';
import { WeightsFile } from './weights-file.ts';

export const MODEL_FILE = 'model.onnx';
/** The graph for many sequences at once, over the same weights. */
export const BATCHED_MODEL_FILE = 'model-batched.onnx';
export const WEIGHTS_FILE = 'weights.bin';

/** Where tensors come from, where they go, and how they are changed on the way. */
type Emission = {
  readonly source: WeightSource;
  readonly file: WeightsFile;
  readonly kind: WeightKind;
  readonly basis: Basis;
};

/** One layer's tensors are in memory at a time. `onProgress` gets the fraction done, 0 to 1. */
export async function emitModel(
  source: WeightSource,
  kind: WeightKind,
  outDir: string,
  onProgress: (fraction: number) => void,
): Promise<void> {
  const { config } = source;
  const file = new WeightsFile(join(outDir, WEIGHTS_FILE), WEIGHTS_FILE);
  // fp32 is the reference, so it stays as the file has it; the quantized kinds gain precision from a rotation.
  const emission = {
    source,
    file,
    kind,
    basis: kind === 'f32' ? fileBasis : rotatedBasis(config.hiddenSize),
  };
  try {
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
      finalNorm: file.append(emission.basis.norm(finalNorm)),
      ropeCos: file.append(cos),
      ropeSin: file.append(sin),
    };
    writeGraphs(outDir, config, stored);
  } finally {
    file.close();
  }
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
  const headName = tiedEmbeddings ? 'model.embed_tokens.weight' : 'lm_head.weight';
  const head = store(emission, basis.reads(await stackRows(source, [headName]), finalNorm));
  if (tiedEmbeddings) {
    const correction = basis.embeddingFromHead(finalNorm);
    const range = correction && file.append(correction);
    return { head, embedding: { rows: head, correction: range && { values: range, size: hiddenSize } } };
  }
  const rows = store(emission, basis.embeds(await stackRows(source, ['model.embed_tokens.weight'])));
  return { head, embedding: { rows, correction: undefined } };
}

async function storeLayer(emission: Emission, index: number): Promise<StoredLayer> {
  const { source, file, basis } = emission;
  const layer = `model.layers.${index}`;
  const read = (...names: string[]) =>
    stackRows(
      source,
      names.map((name) => `${layer}.${name}.weight`),
    );
  const attentionNorm = await source.read(`${layer}.input_layernorm.weight`);
  const ffnNorm = await source.read(`${layer}.post_attention_layernorm.weight`);
  const qkv = await read('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj');
  const keepNorm = (norm: Float32Array): WeightRange => file.append(basis.norm(norm));
  return {
    qkv: store(emission, basis.reads(scaleQueries(source.config, qkv), attentionNorm)),
    output: store(emission, basis.writes(await read('self_attn.o_proj'))),
    gateUp: store(emission, basis.reads(await read('mlp.gate_proj', 'mlp.up_proj'), ffnNorm)),
    down: store(emission, basis.writes(await read('mlp.down_proj'))),
    attentionNorm: keepNorm(attentionNorm),
    ffnNorm: keepNorm(ffnNorm),
  };
}

/** The named matrices, one above the other. */
async function stackRows(source: WeightSource, names: readonly string[]): Promise<Matrix> {
  const inputs = source.shape(names[0]!)[1]!;
  const outputs = names.reduce((sum, name) => sum + source.shape(name)[0]!, 0);
  const rows = new Float32Array(outputs * inputs);
  let at = 0;
  for (const name of names) {
    const part = await source.read(name);
    rows.set(part, at);
    at += part.length;
  }
  return { rows, outputs, inputs };
}

/** Puts the 1/√D of the attention scores into the rows of Q (exact where D is a power of 4). */
function scaleQueries(config: LlamaConfig, qkv: Matrix): Matrix {
  const scale = 1 / Math.sqrt(config.headSize);
  const end = config.headCount * config.headSize * qkv.inputs;
  for (let i = 0; i < end; i++) qkv.rows[i]! *= scale;
  return qkv;
}

const store = ({ file, kind }: Emission, { rows, outputs, inputs }: Matrix): StoredLinear =>
  storeLinear(file, kind, rows, outputs, inputs);

/** cos and sin of position · theta^(-2i/D), `[context, D/2]` each; computed in double precision. */
function ropeTables(config: LlamaConfig): [Float32Array, Float32Array] {
  const half = config.headSize / 2;
  const cos = new Float32Array(config.contextTokens * half);
  const sin = new Float32Array(config.contextTokens * half);
  for (let i = 0; i < half; i++) {
    const frequency = config.ropeTheta ** (-i / half);
    for (let position = 0; position < config.contextTokens; position++) {
      cos[position * half + i] = Math.cos(position * frequency);
      sin[position * half + i] = Math.sin(position * frequency);
    }
  }
  return [cos, sin];
}
