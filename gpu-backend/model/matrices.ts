/**
 * A model's matrices in the form that its graphs use, in fp32: in the basis of the installed model, with Q, K and V and with
 * gate and up stacked, and Q scaled.
 */
import { type ExtraWeights, queryScale, readExtras } from './architectures/attention-extras.ts';
import { type Basis, type Matrix, rotateInputs, rotateOutputs } from './architectures/rotation.ts';
import { scaleAll } from './formats/tensor-parts.ts';
import type { ModelConfig, WeightSource } from './model-source.ts';

/** The matrices of one layer; Q is multiplied by {@link queryScale}. */
export type LayerMatrices = {
  readonly index: number;
  readonly qkv: Matrix;
  readonly output: Matrix;
  readonly gateUp: Matrix;
  readonly down: Matrix;
  readonly extras: ExtraWeights;
  readonly attentionNorm: Float32Array;
  readonly ffnNorm: Float32Array;
  readonly postNorms: PostNorms | undefined;
};

/** The weights of the norms behind a layer's blocks. They are in the file's basis, and so are the products before them. */
export type PostNorms = { readonly attention: Float32Array; readonly ffn: Float32Array };

const LAYER_PRODUCTS = ['qkv', 'output', 'gateUp', 'down'] as const;
export type LayerProduct = (typeof LAYER_PRODUCTS)[number];

export const eachProduct = <T>(make: (name: LayerProduct) => T): Record<LayerProduct, T> =>
  Object.fromEntries(LAYER_PRODUCTS.map((name) => [name, make(name)])) as Record<LayerProduct, T>;

/** The head's matrix, `[V, H]`. */
export async function headMatrix(
  source: WeightSource,
  basis: Basis,
  finalNorm: Float32Array,
): Promise<Matrix> {
  const name = source.config.tiedEmbeddings ? 'model.embed_tokens.weight' : 'lm_head.weight';
  return basis.reads(await stackRows(source, [name]), finalNorm);
}

export async function layerMatrices(
  source: WeightSource,
  basis: Basis,
  index: number,
): Promise<LayerMatrices> {
  const layer = `model.layers.${index}`;
  const read = (...names: string[]) =>
    stackRows(
      source,
      names.map((name) => `${layer}.${name}.weight`),
    );
  const attentionNorm = await source.read(`${layer}.input_layernorm.weight`);
  const ffnNorm = await source.read(`${layer}.post_attention_layernorm.weight`);
  const qkv = basis.reads(
    scaleQueries(source.config, await read('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj')),
    attentionNorm,
  );
  const output = basis.writes(await read('self_attn.o_proj'));
  const down = basis.writes(await read('mlp.down_proj'));
  const { headCount, kvHeadCount, headSize } = source.config;
  const values = qkv.rows.subarray((headCount + kvHeadCount) * headSize * qkv.inputs);
  rotateOutputs(values, qkv.inputs, basis.inside(headSize));
  rotateInputs(output.rows, basis.inside(headSize));
  rotateInputs(down.rows, basis.inside(down.inputs));
  return {
    index,
    qkv,
    output,
    gateUp: basis.reads(await read('mlp.gate_proj', 'mlp.up_proj'), ffnNorm),
    down,
    extras: await readExtras(source, basis, index),
    attentionNorm: basis.norm(attentionNorm),
    ffnNorm: basis.norm(ffnNorm),
    postNorms: await readPostNorms(source, index),
  };
}

/** Undefined in a family without these norms. */
export async function readPostNorms(source: WeightSource, index: number): Promise<PostNorms | undefined> {
  if (!source.config.postNorms) return undefined;
  const read = (name: string) => source.read(`model.layers.${index}.${name}.post_norm.weight`);
  return { attention: await read('self_attn'), ffn: await read('mlp') };
}

/** The named matrices, stacked by rows. */
export async function stackRows(source: WeightSource, names: readonly string[]): Promise<Matrix> {
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

/** Multiplies the rows of Q by {@link queryScale}; 1/√D is exact when D is a power of 4. */
function scaleQueries(config: ModelConfig, qkv: Matrix): Matrix {
  scaleAll(qkv.rows.subarray(0, config.headCount * config.headSize * qkv.inputs), queryScale(config));
  return qkv;
}
