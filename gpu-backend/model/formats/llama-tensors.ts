/**
 * The tensors of a Llama decoder: their Hugging Face names, their GGUF names and their shapes. Both readers
 * check a file against this list before a single weight is read.
 */

import type { LlamaConfig } from '../model-source.ts';
import { corruptModel, unsupportedModel } from '../model-source.ts';

type LlamaTensor = {
  /** Hugging Face's name. */
  readonly name: string;
  readonly ggufName: string;
  /** `[out, in]` for a projection. */
  readonly shape: readonly number[];
  /** Heads of a projection whose rows rotary pairs up; GGUF files hold these rows interleaved. */
  readonly rotaryHeads: number | undefined;
};

export function llamaTensors(config: LlamaConfig): LlamaTensor[] {
  const { hiddenSize, ffnSize, vocabularySize, headCount, kvHeadCount, headSize } = config;
  const queryWidth = headCount * headSize;
  const keyWidth = kvHeadCount * headSize;
  const list: LlamaTensor[] = [];
  const add = (name: string, ggufName: string, shape: readonly number[], rotaryHeads?: number) =>
    list.push({ name: `${name}.weight`, ggufName: `${ggufName}.weight`, shape, rotaryHeads });

  add('model.embed_tokens', 'token_embd', [vocabularySize, hiddenSize]);
  for (let i = 0; i < config.layerCount; i++) {
    const layer = `model.layers.${i}`;
    add(`${layer}.input_layernorm`, `blk.${i}.attn_norm`, [hiddenSize]);
    add(`${layer}.self_attn.q_proj`, `blk.${i}.attn_q`, [queryWidth, hiddenSize], headCount);
    add(`${layer}.self_attn.k_proj`, `blk.${i}.attn_k`, [keyWidth, hiddenSize], kvHeadCount);
    add(`${layer}.self_attn.v_proj`, `blk.${i}.attn_v`, [keyWidth, hiddenSize]);
    add(`${layer}.self_attn.o_proj`, `blk.${i}.attn_output`, [hiddenSize, queryWidth]);
    add(`${layer}.post_attention_layernorm`, `blk.${i}.ffn_norm`, [hiddenSize]);
    add(`${layer}.mlp.gate_proj`, `blk.${i}.ffn_gate`, [ffnSize, hiddenSize]);
    add(`${layer}.mlp.up_proj`, `blk.${i}.ffn_up`, [ffnSize, hiddenSize]);
    add(`${layer}.mlp.down_proj`, `blk.${i}.ffn_down`, [hiddenSize, ffnSize]);
  }
  add('model.norm', 'output_norm', [hiddenSize]);
  if (!config.tiedEmbeddings) add('lm_head', 'output', [vocabularySize, hiddenSize]);
  return list;
}

/**
 * Proves that a file holds exactly the tensors that the architecture computes with: a missing or misshapen one
 * is damage, one more (a bias, rope factors, experts) would be ignored and make the answers wrong.
 * `held`: the file's tensors by the names that `nameOf` gives.
 */
export function checkLlamaTensors(
  expected: readonly LlamaTensor[],
  held: ReadonlyMap<string, readonly number[]>,
  nameOf: (tensor: LlamaTensor) => string,
): void {
  const known = new Set<string>();
  for (const tensor of expected) {
    const name = nameOf(tensor);
    const shape = held.get(name);
    if (shape === undefined) throw corruptModel(`tensor ${name} is missing`);
    if (shape.join() !== tensor.shape.join()) {
      throw corruptModel(`tensor ${name} is [${shape.join()}], expected [${tensor.shape.join()}]`);
    }
    known.add(name);
  }
  for (const name of held.keys()) {
    if (!known.has(name)) {
      throw unsupportedModel(
        `tensor ${JSON.stringify(name.slice(0, 60))} is no part of the architecture llama`,
      );
    }
  }
}

/**
 * Undoes the row order that llama.cpp's converter gives Q and K (`LlamaModel.permute`): row h·D + 2i + j of
 * the file is row h·D + j·D/2 + i of the Hugging Face layout. `rows`: `[heads·D, columns]`.
 */
export function toHalfSplitRotary(rows: Float32Array, heads: number, columns: number): Float32Array {
  const out = new Float32Array(rows.length);
  const headSize = rows.length / columns / heads;
  const half = headSize / 2;
  for (let head = 0; head < heads; head++) {
    for (let i = 0; i < half; i++) {
      for (let j = 0; j < 2; j++) {
        const from = (head * headSize + 2 * i + j) * columns;
        out.set(rows.subarray(from, from + columns), (head * headSize + j * half + i) * columns);
      }
    }
  }
  return out;
}
