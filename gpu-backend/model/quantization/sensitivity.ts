/**
 * What four bits cost in each matrix alone: KL(dense ‖ with that matrix rounded) on a few positions, in fp32. All the
 * rounded variants go through the layers together, so that every matrix is read once.
 *
 * Limits: a forward pass of T tokens for each of 4·L matrices, from its own layer on.
 */
import { divergence } from '../../logits.ts';
import type { Basis, Matrix } from '../architectures/rotation.ts';
import {
  eachProduct,
  headMatrix,
  type LayerMatrices,
  type LayerProduct,
  layerMatrices,
} from '../matrices.ts';
import type { WeightSource } from '../model-source.ts';
import type { LayerSteps } from './layer-steps.ts';
import type { Products } from './products.ts';

export type Sensitivity = { readonly layer: number; readonly name: LayerProduct; readonly kl: number };

export type SensitivityOptions = {
  readonly steps: LayerSteps;
  readonly products: Products;
  /** The dense stream before the first layer, `[T, H]`. */
  readonly stream: Float32Array;
  /** Every how many-th position is scored. */
  readonly every: number;
  /** A matrix as four bits have it. */
  rounded(layer: number, name: LayerProduct): Matrix;
  readonly onProgress: (fraction: number) => void;
};

type Variant = { readonly layer: number; readonly name: LayerProduct; stream: Float32Array };

export async function measureSensitivity(
  source: WeightSource,
  basis: Basis,
  options: SensitivityOptions,
): Promise<Sensitivity[]> {
  const { layerCount } = source.config;
  let dense = options.stream;
  const variants: Variant[] = [];
  for (let layer = 0; layer < layerCount; layer++) {
    const matrices = await layerMatrices(source, basis, layer);
    dense = await throughLayer(options, layer, matrices, dense, variants);
    options.onProgress((layer + 1) / layerCount);
  }
  const finalNorm = await source.read('model.norm.weight');
  const head = await headMatrix(source, basis, finalNorm);
  const logits = async (stream: Float32Array) => {
    const scored = everyRow(stream, head.inputs, options.every);
    const x = await options.steps.normalize(scored, basis.norm(finalNorm));
    return options.products.multiply(x, head.rows, head.inputs);
  };
  const expected = await logits(dense);
  const found: Sensitivity[] = [];
  for (const { layer, name, stream } of variants)
    found.push({ layer, name, kl: divergence(expected, await logits(stream), head.outputs) });
  return found;
}

/** The dense stream after the layer; `variants` gain this layer's four and have passed it. */
async function throughLayer(
  { steps, ...options }: SensitivityOptions,
  layer: number,
  matrices: LayerMatrices,
  dense: Float32Array,
  variants: Variant[],
): Promise<Float32Array> {
  const rounded = eachProduct((name) => options.rounded(layer, name));
  const attention = async (h: Float32Array, qkv: Matrix, output: Matrix) => {
    const attended = await steps.attend(await steps.normalize(h, matrices.attentionNorm), matrices, qkv);
    return steps.add(h, attended, output, matrices.extras.outputBias);
  };
  const ffn = async (h: Float32Array, gateUp: Matrix, down: Matrix) =>
    steps.add(h, await steps.activate(await steps.normalize(h, matrices.ffnNorm), gateUp), down);
  const passing = async (through: (h: Float32Array) => Promise<Float32Array>) => {
    for (const variant of variants) variant.stream = await through(variant.stream);
  };
  const { qkv, output, gateUp, down } = matrices;
  await passing((h) => attention(h, qkv, output));
  variants.push(
    { layer, name: 'qkv', stream: await attention(dense, rounded.qkv, output) },
    { layer, name: 'output', stream: await attention(dense, qkv, rounded.output) },
  );
  const between = await attention(dense, qkv, output);
  await passing((h) => ffn(h, gateUp, down));
  variants.push(
    { layer, name: 'gateUp', stream: await ffn(between, rounded.gateUp, down) },
    { layer, name: 'down', stream: await ffn(between, gateUp, rounded.down) },
  );
  return ffn(between, gateUp, down);
}

function everyRow(stream: Float32Array, width: number, every: number): Float32Array {
  const rows = Math.floor(stream.length / width / every);
  const picked = new Float32Array(rows * width);
  for (let row = 0; row < rows; row++) {
    const at = ((row + 1) * every - 1) * width;
    picked.set(stream.subarray(at, at + width), row * width);
  }
  return picked;
}
