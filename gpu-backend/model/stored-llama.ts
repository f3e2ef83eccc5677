/**
 * Where an installed model's tensors lie in its weights file, read back from the graph that `model/emit.ts`
 * wrote: training computes with the same bytes that serve.
 */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { ModelProto } from '../onnx/encode.ts';
import { findExtras } from './architectures/attention-extras.ts';
import type { StoredLlama } from './architectures/llama.ts';
import type { StoredLinear } from './architectures/projections.ts';
import { MODEL_FILE } from './emit.ts';
import type { LlamaConfig, WeightKind } from './model-source.ts';
import { corruptModel } from './model-source.ts';
import { QUANT_BLOCK } from './quantize.ts';
import type { WeightRange } from './weights-file.ts';

type Tensor = { readonly shape: readonly number[]; readonly range: WeightRange };

/** @throws MaskrouteError `corrupt_model` when the graph lacks a tensor. */
export async function readStoredLlama(
  folder: string,
  config: LlamaConfig,
  kind: WeightKind,
): Promise<StoredLlama> {
  const tensors = externalTensors(await readFile(join(folder, MODEL_FILE)));
  const get = (name: string): Tensor => {
    const tensor = tensors.get(name);
    if (tensor === undefined) throw corruptModel(`its graph has no tensor ${name}`);
    return tensor;
  };
  const linear = (name: string): StoredLinear => storedLinear(get, name, kind);
  const correction = tensors.get('embedding_correction');
  return {
    layers: Array.from({ length: config.layerCount }, (_, index) => ({
      qkv: linear(`layer_${index}.qkv`),
      output: linear(`layer_${index}.output`),
      gateUp: linear(`layer_${index}.gate_up`),
      down: linear(`layer_${index}.down`),
      attentionNorm: get(`layer_${index}.attention_norm`).range,
      ffnNorm: get(`layer_${index}.ffn_norm`).range,
      ...findExtras(index, (name) => tensors.get(name)?.range),
    })),
    embedding: {
      rows: linear('embedding'),
      correction: correction && { values: correction.range, size: correction.shape[0]! },
    },
    head: linear('head'),
    finalNorm: get('final_norm').range,
    ropeCos: get('rope_cos').range,
    ropeSin: get('rope_sin').range,
  };
}

function storedLinear(get: (name: string) => Tensor, name: string, kind: WeightKind): StoredLinear {
  if (kind === 'f32') {
    const { shape, range } = get(name);
    return {
      kind,
      outputs: shape[0]!,
      inputs: shape[1]!,
      values: range,
      scales: undefined,
      zeroPoints: undefined,
    };
  }
  const scales = get(`${name}.scales`);
  return {
    kind,
    outputs: scales.shape[0]!,
    inputs: scales.shape[1]! * QUANT_BLOCK,
    values: get(`${name}.q`).range,
    scales: scales.range,
    zeroPoints: kind === 'q8' ? get(`${name}.zeros`).range : undefined,
  };
}

type DecodedGraph = {
  initializer: {
    name: string;
    dims: (number | string)[];
    external_data?: { key: string; value: string }[];
  }[];
  node: { attribute?: { g?: DecodedGraph }[] }[];
};

/** Every initializer that lies in a file, in the graph and its branches. */
function externalTensors(bytes: Uint8Array): Map<string, Tensor> {
  const found = new Map<string, Tensor>();
  const collect = (graph: DecodedGraph): void => {
    for (const { name, dims, external_data = [] } of graph.initializer ?? []) {
      const data = Object.fromEntries(external_data.map(({ key, value }) => [key, value]));
      if (data.location === undefined) continue;
      const range = { file: data.location, offset: Number(data.offset), bytes: Number(data.length) };
      found.set(name, { shape: (dims ?? []).map(Number), range });
    }
    for (const { attribute = [] } of graph.node ?? []) {
      for (const { g } of attribute) if (g) collect(g);
    }
  };
  const options = { longs: Number, arrays: true };
  collect((ModelProto.toObject(ModelProto.decode(bytes), options) as { graph: DecodedGraph }).graph);
  return found;
}
