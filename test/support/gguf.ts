/** Writes small GGUF files: whole ones for imports that take milliseconds, and parts to be damaged. */
import { appendBytes, BYTE_CHARACTERS } from './bytes.ts';

export type Value =
  | { readonly type: 'u32' | 'u64' | 'i32' | 'f32' | 'bool'; readonly value: number | bigint | boolean }
  | { readonly type: 'string'; readonly value: string }
  | { readonly type: 'strings'; readonly value: readonly string[] }
  | { readonly type: 'i32s'; readonly value: readonly number[] }
  | { readonly type: 'bools'; readonly value: readonly boolean[] };

export type Tensor = {
  readonly name: string;
  /** As PyTorch has it. */
  readonly shape: readonly number[];
  /** 0 is F32. */
  readonly type: number;
  readonly data: Uint8Array;
  /** Says another place than the true one. */
  readonly offset?: bigint;
};

export type GgufParts = {
  readonly version?: number;
  readonly metadata: ReadonlyMap<string, Value>;
  readonly tensors: readonly Tensor[];
  readonly alignment?: number;
};

/** The same as `llama-gguf-split` cuts it: metadata in the first part, tensors in all. `changes`: other metadata by part. */
export function splitGguf(
  { metadata, tensors }: GgufParts,
  count: number,
  changes: (part: number) => Record<string, Value> = () => ({}),
): Record<string, Uint8Array> {
  const number = (value: number) => String(value).padStart(5, '0');
  const each = Math.ceil(tensors.length / count);
  return Object.fromEntries(
    Array.from({ length: count }, (_, i) => {
      const own = new Map<string, Value>([
        ...(i === 0 ? metadata : []),
        ['split.no', { type: 'u32', value: i }],
        ['split.count', { type: 'u32', value: count }],
        ['split.tensors.count', { type: 'i32', value: tensors.length }],
        ...Object.entries(changes(i)),
      ]);
      const part = { metadata: own, tensors: tensors.slice(i * each, (i + 1) * each) };
      return [`tiny-${number(i + 1)}-of-${number(count)}.gguf`, writeGguf(part)];
    }),
  );
}

const VALUE_TYPES = { u32: 4, i32: 5, f32: 6, bool: 7, string: 8, u64: 10 } as const;
const ARRAY = 9;

export function writeGguf({ version = 3, metadata, tensors, alignment = 32 }: GgufParts): Uint8Array {
  const header: number[] = [];
  const { u32, u64, text } = appendBytes(header);
  header.push(0x47, 0x47, 0x55, 0x46);
  u32(version);
  u64(tensors.length);
  u64(metadata.size);
  for (const [key, entry] of metadata) {
    text(key);
    writeValue(header, entry);
  }
  let end = 0;
  const places = tensors.map(({ data }) => {
    const start = Math.ceil(end / alignment) * alignment;
    end = start + data.length;
    return start;
  });
  tensors.forEach((tensor, i) => {
    text(tensor.name);
    u32(tensor.shape.length);
    for (const size of tensor.shape.toReversed()) u64(size);
    u32(tensor.type);
    u64(tensor.offset ?? places[i]!);
  });
  const dataStart = Math.ceil(header.length / alignment) * alignment;
  const file = new Uint8Array(dataStart + end);
  file.set(header);
  tensors.forEach(({ data }, i) => {
    file.set(data, dataStart + places[i]!);
  });
  return file;
}

function writeValue(header: number[], entry: Value): void {
  const { u32, u64, text, f32 } = appendBytes(header);
  switch (entry.type) {
    case 'strings':
      u32(ARRAY);
      u32(VALUE_TYPES.string);
      u64(entry.value.length);
      for (const item of entry.value) text(item);
      return;
    case 'i32s':
      u32(ARRAY);
      u32(VALUE_TYPES.i32);
      u64(entry.value.length);
      for (const item of entry.value) u32(item);
      return;
    case 'bools':
      u32(ARRAY);
      u32(VALUE_TYPES.bool);
      u64(entry.value.length);
      for (const item of entry.value) header.push(item ? 1 : 0);
      return;
    case 'string':
      u32(VALUE_TYPES.string);
      text(entry.value);
      return;
    case 'bool':
      u32(VALUE_TYPES.bool);
      header.push(entry.value ? 1 : 0);
      return;
    case 'f32':
      u32(VALUE_TYPES.f32);
      f32(Number(entry.value));
      return;
    case 'u64':
      u32(VALUE_TYPES.u64);
      u64(BigInt(entry.value));
      return;
    default:
      u32(VALUE_TYPES[entry.type]);
      u32(Number(entry.value));
  }
}

export const floats = (values: ArrayLike<number>): Uint8Array => {
  const array = Float32Array.from(values);
  return new Uint8Array(array.buffer);
};

const SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>'];
const MERGES = ['h e', 'l l', 'he ll', 'hell o', 'Ġ w', 'o r'];

/** A Llama of two layers that spells bytes: every part of a real file, 64 floats wide. */
export function tinyLlama(
  changes: { metadata?: Record<string, Value | undefined>; tensors?: Tensor[] } = {},
): {
  metadata: Map<string, Value>;
  tensors: Tensor[];
} {
  const tokens = [...SPECIAL, ...BYTE_CHARACTERS, ...MERGES.map((merge) => merge.replace(' ', ''))];
  const u32 = (value: number): Value => ({ type: 'u32', value });
  const metadata = new Map<string, Value>([
    ['general.architecture', { type: 'string', value: 'llama' }],
    ['llama.block_count', u32(2)],
    ['llama.context_length', u32(128)],
    ['llama.embedding_length', u32(64)],
    ['llama.feed_forward_length', u32(128)],
    ['llama.attention.head_count', u32(4)],
    ['llama.attention.head_count_kv', u32(2)],
    ['llama.attention.layer_norm_rms_epsilon', { type: 'f32', value: 1e-5 }],
    ['tokenizer.ggml.model', { type: 'string', value: 'gpt2' }],
    ['tokenizer.ggml.pre', { type: 'string', value: 'smollm' }],
    ['tokenizer.ggml.tokens', { type: 'strings', value: tokens }],
    ['tokenizer.ggml.token_type', { type: 'i32s', value: tokens.map((_, id) => (id < 3 ? 3 : 1)) }],
    ['tokenizer.ggml.merges', { type: 'strings', value: MERGES }],
    ['tokenizer.ggml.bos_token_id', u32(1)],
    ['tokenizer.ggml.eos_token_id', u32(2)],
  ]);
  for (const [key, value] of Object.entries(changes.metadata ?? {})) {
    if (value === undefined) metadata.delete(key);
    else metadata.set(key, value);
  }
  return { metadata, tensors: changes.tensors ?? tinyTensors(tokens.length) };
}

/** Values count up within a tensor, so that a row in the wrong place shows. */
function tinyTensors(vocabulary: number): Tensor[] {
  const tensor = (name: string, ...shape: number[]): Tensor => {
    const length = shape.reduce((product, size) => product * size, 1);
    const values = Float32Array.from({ length }, (_, i) => ((i * 7919) % 1013) / 1013 - 0.5);
    return { name: `${name}.weight`, shape, type: 0, data: floats(values) };
  };
  const layer = (i: number) => [
    tensor(`blk.${i}.attn_norm`, 64),
    tensor(`blk.${i}.attn_q`, 64, 64),
    tensor(`blk.${i}.attn_k`, 32, 64),
    tensor(`blk.${i}.attn_v`, 32, 64),
    tensor(`blk.${i}.attn_output`, 64, 64),
    tensor(`blk.${i}.ffn_norm`, 64),
    tensor(`blk.${i}.ffn_gate`, 128, 64),
    tensor(`blk.${i}.ffn_up`, 128, 64),
    tensor(`blk.${i}.ffn_down`, 64, 128),
  ];
  return [tensor('token_embd', vocabulary, 64), ...layer(0), ...layer(1), tensor('output_norm', 64)];
}
