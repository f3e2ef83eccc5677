/** The tiny Llama of `gguf.ts` as a Hugging Face folder: safetensors, configuration and tokenizer. */
import { decoderTensors, toHalfSplitRotary } from '../../gpu-backend/model/families.ts';
import type { ModelConfig } from '../../gpu-backend/model/model-source.ts';
import { BYTE_CHARACTERS } from './bytes.ts';
import { tinyLlama } from './gguf.ts';

const CONFIG: ModelConfig = {
  architecture: 'llama',
  layerCount: 2,
  hiddenSize: 64,
  ffnSize: 128,
  headCount: 4,
  kvHeadCount: 2,
  headSize: 16,
  vocabularySize: 265,
  contextTokens: 128,
  ropeTheta: 10_000,
  rmsEpsilon: 1e-5,
  tiedEmbeddings: true,
};

export type TensorEntry = { dtype: string; shape: readonly number[]; data_offsets: [number, number] };

/** One file; `changes` make its header lie. */
export function writeSafetensors(
  tensors: ReadonlyMap<string, { shape: readonly number[]; data: Float32Array }>,
  changes: Readonly<Record<string, Partial<TensorEntry>>> = {},
): Uint8Array {
  const header: Record<string, TensorEntry> = {};
  let end = 0;
  for (const [name, { shape, data }] of tensors) {
    header[name] = { dtype: 'F32', shape, data_offsets: [end, end + data.byteLength], ...changes[name] };
    end += data.byteLength;
  }
  const text = new TextEncoder().encode(JSON.stringify({ __metadata__: { format: 'pt' }, ...header }));
  const file = new Uint8Array(8 + text.length + end);
  new DataView(file.buffer).setBigUint64(0, BigInt(text.length), true);
  file.set(text, 8);
  let at = 8 + text.length;
  for (const { data } of tensors.values()) {
    file.set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), at);
    at += data.byteLength;
  }
  return file;
}

/** Q and K in Hugging Face's row order. */
export function tinyWeights(): Map<string, { shape: readonly number[]; data: Float32Array }> {
  const stored = new Map(tinyLlama().tensors.map((tensor) => [tensor.name, tensor]));
  return new Map(
    decoderTensors(CONFIG).map(({ name, ggufName, shape, interleavedHeads }) => {
      const data = new Float32Array(stored.get(ggufName)!.data.slice().buffer);
      return [
        name,
        {
          shape,
          data: interleavedHeads === undefined ? data : toHalfSplitRotary(data, interleavedHeads, shape[1]!),
        },
      ];
    }),
  );
}

export const TINY_CONFIG_JSON = {
  model_type: 'llama',
  hidden_size: 64,
  intermediate_size: 128,
  num_hidden_layers: 2,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  vocab_size: 265,
  max_position_embeddings: 128,
  rms_norm_eps: 1e-5,
  rope_scaling: null,
  tie_word_embeddings: true,
  eos_token_id: 2,
};

function tokenizerJson() {
  const { metadata } = tinyLlama();
  const tokens = (metadata.get('tokenizer.ggml.tokens') as { value: readonly string[] }).value;
  const merges = (metadata.get('tokenizer.ggml.merges') as { value: readonly string[] }).value;
  const special = tokens.slice(0, tokens.length - merges.length - BYTE_CHARACTERS.length);
  return {
    added_tokens: special.map((content, id) => ({ id, content, special: true, normalized: false })),
    normalizer: null,
    // As SmolLM's own file has it.
    pre_tokenizer: {
      type: 'Sequence',
      pretokenizers: [
        { type: 'Digits', individual_digits: true },
        { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true },
      ],
    },
    post_processor: null,
    decoder: { type: 'ByteLevel' },
    model: { type: 'BPE', vocab: Object.fromEntries(tokens.map((token, id) => [token, id])), merges },
  };
}

const encode = (value: unknown): Uint8Array => new TextEncoder().encode(JSON.stringify(value));

export async function tinyFolder(): Promise<Record<string, Uint8Array>> {
  return {
    'config.json': encode(TINY_CONFIG_JSON),
    'tokenizer.json': encode(tokenizerJson()),
    'tokenizer_config.json': encode({ bos_token: '<|im_start|>', eos_token: { content: '<|im_end|>' } }),
    'model.safetensors': writeSafetensors(tinyWeights()),
  };
}
