/**
 * Reads the positions of an installed model's tensors in its weights file back from the graph that `emit.ts` wrote. So
 * other graphs, for training or a device, use the same weights.
 */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { z } from 'zod';
import { ModelProto } from '../onnx/encode.ts';
import { findExtras } from './architectures/attention-extras.ts';
import { postNormName, ROPE_NAMES, type StoredLlama } from './architectures/llama.ts';
import {
  type StoredLinear,
  type StoredRows,
  stretchName,
  type VocabularyMatrix,
} from './architectures/projections.ts';
import type { StoredSurrogate } from './architectures/surrogate.ts';
import { MODEL_FILE } from './emit.ts';
import type { ModelConfig } from './model-source.ts';
import { corruptModel, unsupportedModel } from './model-source.ts';
import type { QuantForm } from './quantization/quantize.ts';
import type { WeightRange } from './weights-file.ts';

type Tensor = { readonly shape: readonly number[]; readonly range: WeightRange };

/** @throws MaskrouteError `corrupt_model` when the graph lacks a tensor, `unsupported_model` by column from an earlier version. */
export async function readStoredLlama(
  folder: string,
  config: ModelConfig,
  surrogates: 'with surrogates' | 'without surrogates' = 'without surrogates',
): Promise<StoredLlama> {
  const found = await readWeights(join(folder, MODEL_FILE));
  const get = (name: string): Tensor => {
    const tensor = found.tensors.get(name);
    if (tensor === undefined) throw corruptModel(`its graph has no tensor ${name}`);
    return tensor;
  };
  const linear = (name: string): StoredLinear => {
    const rotation = found.tensors.get(`${name}.rotation`);
    const stored = storedLinear(found, get, name);
    return rotation ? { ...stored, rotation: { size: rotation.shape[0]!, matrix: rotation.range } } : stored;
  };
  const stretches = <Stretch extends StoredLinear>(
    matrix: 'head' | 'embedding',
    read: (name: string) => Stretch,
  ): VocabularyMatrix<Stretch> => {
    const all: Stretch[] = [];
    do all.push(read(stretchName(matrix, all.length)));
    while (found.tensors.has(`${stretchName(matrix, all.length)}.scales`));
    return all;
  };
  const surrogate = (name: string): StoredSurrogate => ({
    down: linear(`${name}.surrogate_down`),
    up: linear(`${name}.surrogate_up`),
    bias: get(`${name}.surrogate_bias`).range,
    first: get(`${name}.surrogate_first`).range,
  });
  const hasSurrogates =
    surrogates === 'with surrogates' && found.tensors.has('layer_0.attention.surrogate_bias');
  const correction = found.tensors.get('embedding_correction');
  return {
    layers: Array.from({ length: config.layerCount }, (_, index) => ({
      qkv: linear(`layer_${index}.qkv`),
      output: linear(`layer_${index}.output`),
      gateUp: linear(`layer_${index}.gate_up`),
      down: requireRotation(linear(`layer_${index}.down`)),
      attentionNorm: get(`layer_${index}.attention_norm`).range,
      ffnNorm: get(`layer_${index}.ffn_norm`).range,
      ...(hasSurrogates && {
        surrogates: {
          attention: surrogate(`layer_${index}.attention`),
          ffn: surrogate(`layer_${index}.ffn`),
        },
      }),
      ...(config.postNorms && {
        postNorms: {
          attention: get(postNormName(index, 'attention')).range,
          ffn: get(postNormName(index, 'ffn')).range,
        },
      }),
      ...findExtras(index, (name) => found.tensors.get(name)?.range),
    })),
    embedding: {
      rows: stretches('embedding', (name) => rowMatrix(found, get, name)),
      correction: correction && { values: correction.range, size: correction.shape[0]! },
    },
    head: stretches('head', linear),
    finalNorm: get('final_norm').range,
    ropeCos: get(ROPE_NAMES.global[0]).range,
    ropeSin: get(ROPE_NAMES.global[1]).range,
    localRope: config.localRope && {
      cos: get(ROPE_NAMES.local[0]).range,
      sin: get(ROPE_NAMES.local[1]).range,
    },
  };
}

/**
 * Earlier versions rotated nothing before down, and had two codes for each of its inputs by column. With one it is 0.02 nats away.
 * @throws MaskrouteError `unsupported_model`.
 */
function requireRotation(down: StoredLinear): StoredLinear {
  if (down.kind === 'q8-columns' && down.rotation === undefined)
    throw unsupportedModel('an earlier version imported it by column, so pull it again');
  return down;
}

function storedLinear(weights: Weights, get: (name: string) => Tensor, name: string): StoredLinear {
  const columns = weights.tensors.get(`${name}.columns`);
  if (columns === undefined) return rowMatrix(weights, get, name);
  const [inputs, outputs] = columns.shape as [number, number];
  const scales = get(`${name}.scales`).range;
  return { kind: 'q8-columns', outputs, inputs, values: columns.range, scales, from: 0, width: outputs };
}

function rowMatrix({ forms }: Weights, get: (name: string) => Tensor, name: string): StoredRows {
  const form = forms.get(`${name}.q`);
  if (form === undefined) {
    const { shape, range } = get(name);
    return { kind: 'f32', outputs: shape[0]!, inputs: shape[1]!, values: range };
  }
  const scales = get(`${name}.scales`);
  return {
    kind: form.bits === 8 ? 'q8' : 'q4',
    blockSize: form.blockSize,
    outputs: scales.shape[0]!,
    inputs: scales.shape[1]! * form.blockSize,
    values: get(`${name}.q`).range,
    scales: scales.range,
    zeroPoints: get(`${name}.zeros`).range,
  };
}

type DecodedGraph = {
  initializer: {
    name: string;
    dims: (number | string)[];
    external_data?: { key: string; value: string }[];
  }[];
  node: {
    op_type: string;
    input?: string[];
    attribute?: { name: string; i?: number; g?: DecodedGraph }[];
  }[];
};

type Weights = {
  /** All initializers of the graph and its branches whose data are in a file. */
  readonly tensors: Map<string, Tensor>;
  /** Bits and block size of matrices in blocks, from the nodes that read them, by the names of their codes. */
  readonly forms: Map<string, QuantForm>;
};

async function readWeights(path: string): Promise<Weights> {
  const [tensors, forms] = [new Map<string, Tensor>(), new Map<string, QuantForm>()];
  const collect = (graph: DecodedGraph): void => {
    for (const { name, dims, external_data = [] } of graph.initializer ?? []) {
      const data = Object.fromEntries(external_data.map(({ key, value }) => [key, value]));
      if (data.location === undefined) continue;
      const range = { file: data.location, offset: Number(data.offset), bytes: Number(data.length) };
      tensors.set(name, { shape: (dims ?? []).map(Number), range });
    }
    for (const { input = [], attribute = [] } of graph.node ?? []) {
      const form = quantForm(attribute);
      for (const name of form ? input : []) forms.set(name, form!);
      for (const { g } of attribute) if (g) collect(g);
    }
  };
  const options = { longs: Number, arrays: true };
  const decoded = ModelProto.decode(await readFile(path));
  collect((ModelProto.toObject(decoded, options) as { graph: DecodedGraph }).graph);
  return { tensors, forms };
}

/** Bits and block size of a MatMulNBits or GatherBlockQuantized node, which use the same names; else undefined. */
function quantForm(attributes: readonly { name: string; i?: number }[]): QuantForm | undefined {
  const value = (name: string) => attributes.find((attribute) => attribute.name === name)?.i;
  const [bits, blockSize] = [value('bits'), value('block_size')];
  if (bits === undefined || blockSize === undefined) return undefined;
  const form = quantFormSchema.safeParse({ bits: Number(bits), blockSize: Number(blockSize) });
  if (!form.success) throw corruptModel(`its graph has ${bits} bits in blocks of ${blockSize}`);
  return form.data;
}

const quantFormSchema = z.object({
  bits: z.union([z.literal(4), z.literal(8)]),
  blockSize: z.union([z.literal(32), z.literal(64), z.literal(128)]),
});
