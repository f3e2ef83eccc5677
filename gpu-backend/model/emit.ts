/** A weight source as `model.onnx` and `weights.bin`: what the engine opens. */
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { encodeModel } from '../onnx/encode.ts';
import type { StoredLayer } from './architectures/llama.ts';
import { llamaGraph } from './architectures/llama.ts';
import type { StoredLinear } from './linear.ts';
import { storeLinear } from './linear.ts';
import type { LlamaConfig, WeightKind, WeightSource } from './types.ts';
import { WeightsFile } from './weights-file.ts';

export const MODEL_FILE = 'model.onnx';
export const WEIGHTS_FILE = 'weights.bin';

/** One layer's tensors are in memory at a time. `onProgress` gets the fraction done, 0 to 1. */
export async function emitModel(
  source: WeightSource,
  kind: WeightKind,
  outDir: string,
  onProgress: (fraction: number) => void,
): Promise<void> {
  const { config } = source;
  const file = new WeightsFile(join(outDir, WEIGHTS_FILE), WEIGHTS_FILE);
  try {
    const embedding = store(file, kind, await stackRows(source, ['model.embed_tokens.weight']));
    const head = config.tiedEmbeddings
      ? embedding
      : store(file, kind, await stackRows(source, ['lm_head.weight']));
    const layers: StoredLayer[] = [];
    for (let index = 0; index < config.layerCount; index++) {
      layers.push(await storeLayer(source, file, kind, index));
      onProgress((index + 1) / config.layerCount);
    }
    const finalNorm = file.append(await source.read('model.norm.weight'));
    const [cos, sin] = ropeTables(config);
    const stored = {
      layers,
      embedding,
      head,
      finalNorm,
      ropeCos: file.append(cos),
      ropeSin: file.append(sin),
    };
    writeFileSync(join(outDir, MODEL_FILE), encodeModel(llamaGraph(config, stored)));
  } finally {
    file.close();
  }
}

async function storeLayer(
  source: WeightSource,
  file: WeightsFile,
  kind: WeightKind,
  index: number,
): Promise<StoredLayer> {
  const { config } = source;
  const layer = `model.layers.${index}`;
  const read = (...names: string[]) =>
    stackRows(
      source,
      names.map((name) => `${layer}.${name}.weight`),
    );
  const matrix = async (...names: string[]) => store(file, kind, await read(...names));
  return {
    qkv: store(
      file,
      kind,
      scaleQueries(config, await read('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj')),
    ),
    output: await matrix('self_attn.o_proj'),
    gateUp: await matrix('mlp.gate_proj', 'mlp.up_proj'),
    down: await matrix('mlp.down_proj'),
    attentionNorm: file.append(await source.read(`${layer}.input_layernorm.weight`)),
    ffnNorm: file.append(await source.read(`${layer}.post_attention_layernorm.weight`)),
  };
}

type Matrix = { readonly rows: Float32Array; readonly outputs: number; readonly inputs: number };

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

const store = (file: WeightsFile, kind: WeightKind, { rows, outputs, inputs }: Matrix): StoredLinear =>
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
