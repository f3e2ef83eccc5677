/**
 * `node scripts/random-model.ts --shape llama3-8b --format safetensors --out FOLDER`: writes a model with the shape of a real
 * model, random weights, and the family's tokenizer, for measuring memory and time. The weights of all layers differ, as
 * ONNX Runtime keeps one copy of equal weights. `--layers 4` makes a model of the same widths with fewer layers.
 */
import { createCipheriv } from 'node:crypto';
import { closeSync, mkdirSync, openSync, writeFileSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { Option } from 'commander';
import { newCommand, parseScript } from '../gpu-backend/cli/help.ts';
import { wholeNumber } from '../gpu-backend/cli/terminal.ts';
import { decoderTensors, FAMILIES, storedShapes } from '../gpu-backend/model/families.ts';
import { configFromHuggingFace } from '../gpu-backend/model/formats/hf-config.ts';
import type { ModelConfig } from '../gpu-backend/model/model-source.ts';
import { attentionMetadata, ggufShape } from '../test/support/family-files.ts';
import { type Value, writeGguf } from '../test/support/gguf.ts';
import { byteLevelMetadata, lenmlFiles, sentencePieceMetadata } from '../test/support/tokenizer-files.ts';

const COMMON = {
  hidden_size: 4096,
  num_attention_heads: 32,
  num_key_value_heads: 8,
  head_dim: 128,
  tie_word_embeddings: false,
  hidden_act: 'silu',
};
const SHAPES = {
  'llama3-8b': {
    json: {
      ...COMMON,
      model_type: 'llama',
      intermediate_size: 14_336,
      num_hidden_layers: 32,
      vocab_size: 128_256,
      max_position_embeddings: 8192,
      rope_theta: 500_000,
      rms_norm_eps: 1e-5,
    },
    tokenizer: 'llama3_1',
    pre: 'llama-bpe',
  },
  'qwen3-8b': {
    json: {
      ...COMMON,
      model_type: 'qwen3',
      intermediate_size: 12_288,
      num_hidden_layers: 36,
      vocab_size: 151_936,
      max_position_embeddings: 40_960,
      rope_theta: 1e6,
      rms_norm_eps: 1e-6,
    },
    tokenizer: 'qwen3',
    pre: 'qwen2',
  },
  'phi3-mini': {
    json: {
      ...COMMON,
      model_type: 'phi3',
      hidden_size: 3072,
      num_key_value_heads: 32,
      head_dim: 96,
      intermediate_size: 8192,
      num_hidden_layers: 32,
      vocab_size: 32_064,
      max_position_embeddings: 4096,
      sliding_window: 2047,
      rope_theta: 10_000,
      rms_norm_eps: 1e-5,
    },
    // As long as Phi-3's own, but for its control tokens.
    tokenizer: 'llama2',
    pre: undefined,
  },
  'gemma3-4b': {
    json: {
      model_type: 'gemma3_text',
      hidden_size: 2560,
      num_attention_heads: 8,
      num_key_value_heads: 4,
      head_dim: 256,
      intermediate_size: 10_240,
      num_hidden_layers: 34,
      vocab_size: 262_208,
      max_position_embeddings: 131_072,
      sliding_window: 1024,
      rope_scaling: { rope_type: 'linear', factor: 8 },
    },
    // Half as long as Gemma's own.
    tokenizer: 'llama3_1',
    pre: 'llama-bpe',
  },
} as const;

type Flags = {
  readonly shape: keyof typeof SHAPES;
  readonly format: 'safetensors' | 'gguf';
  readonly layers?: number;
  readonly out: string;
};
const flags = parseScript<Flags>(
  newCommand('node scripts/random-model.ts', 'write a model of the shape of a real one, with random weights')
    .addOption(new Option('--shape <name>', 'whose shape').choices(Object.keys(SHAPES)).default('llama3-8b'))
    .addOption(
      new Option('--format <name>', 'bf16 in safetensors, or Q4_K in GGUF')
        .choices(['safetensors', 'gguf'])
        .default('safetensors'),
    )
    .option('--layers <count>', "layers (default: the shape's)", wholeNumber(1))
    .requiredOption('--out <folder>', 'where it is written'),
  ['node scripts/random-model.ts --shape qwen3-8b --layers 4 --out /tmp/qwen3-8b-short'],
);
const shape = SHAPES[flags.shape];
const json = { ...shape.json, num_hidden_layers: flags.layers ?? shape.json.num_hidden_layers };
const config = configFromHuggingFace(json);

/* Random bytes from a stream cipher, some gigabytes a second. */

/** A multiple of Q4_K's block of 144 bytes. */
const CHUNK_BYTES = 144 * 65_536;

/** Calls `take` with chunks of random bytes, `bytes` in all. */
function eachChunk(bytes: number, cipher: ReturnType<typeof newCipher>, take: (chunk: Buffer) => void): void {
  const zeros = Buffer.alloc(CHUNK_BYTES);
  for (let done = 0; done < bytes; done += CHUNK_BYTES)
    take(cipher.update(zeros.subarray(0, Math.min(CHUNK_BYTES, bytes - done))));
}

function newCipher() {
  return createCipheriv('aes-128-ctr', Buffer.alloc(16, 7), Buffer.alloc(16));
}

function writeAll(descriptor: number, bytes: Uint8Array): void {
  for (let done = 0; done < bytes.length; ) done += writeSync(descriptor, bytes, done);
}

const product = (sizes: readonly number[]): number => sizes.reduce((all, size) => all * size, 1);

/* BF16 in shards. */

const SHARD_BYTES_MAX = 5e9;

function writeShards(out: string): void {
  const { json: tokenizer, config: tokenizerConfig } = lenmlFiles(shape.tokenizer);
  writeFileSync(join(out, 'config.json'), JSON.stringify(json));
  writeFileSync(join(out, 'tokenizer.json'), JSON.stringify(tokenizer));
  writeFileSync(join(out, 'tokenizer_config.json'), JSON.stringify(tokenizerConfig));
  const shards: Stored[][] = [[]];
  let filled_bytes = 0;
  for (const tensor of storedShapes(decoderTensors(config), ({ hubName }) => hubName)) {
    const bytes = 2 * product(tensor[1]);
    if (filled_bytes + bytes > SHARD_BYTES_MAX) {
      shards.push([]);
      filled_bytes = 0;
    }
    filled_bytes += bytes;
    shards.at(-1)!.push(tensor);
  }
  const number = (value: number) => String(value).padStart(5, '0');
  const cipher = newCipher();
  const map: Record<string, string> = {};
  for (const [i, tensors] of shards.entries()) {
    const file = `model-${number(i + 1)}-of-${number(shards.length)}.safetensors`;
    for (const [name] of tensors) map[name] = file;
    writeShard(join(out, file), tensors, cipher);
    console.log(file);
  }
  writeFileSync(join(out, 'model.safetensors.index.json'), JSON.stringify({ weight_map: map }));
}

/** A tensor of a file: a stack where the family has stacks. */
type Stored = readonly [name: string, shape: readonly number[]];

function writeShard(path: string, tensors: readonly Stored[], cipher: ReturnType<typeof newCipher>): void {
  const header: Record<string, object> = {};
  let end = 0;
  for (const [name, shape] of tensors) {
    const bytes = 2 * product(shape);
    header[name] = { dtype: 'BF16', shape, data_offsets: [end, end + bytes] };
    end += bytes;
  }
  const text = Buffer.from(JSON.stringify(header));
  const head = Buffer.alloc(8 + 8 * Math.ceil(text.length / 8), ' ');
  head.writeBigUInt64LE(BigInt(head.length - 8));
  text.copy(head, 8);
  const descriptor = openSync(path, 'w');
  writeAll(descriptor, head);
  for (const [, shape] of tensors) {
    // Norms are from 1 to 1.12. Other weights have both signs and four exponents, up to 0.0078.
    const [kept, set] = shape.length === 1 ? [0x000f_000f, 0x3f80_3f80] : [0x81ff_81ff, 0x3a00_3a00];
    eachChunk(2 * product(shape), cipher, (chunk) => {
      const words = new Uint32Array(chunk.buffer, chunk.byteOffset, chunk.length / 4);
      for (let i = 0; i < words.length; i++) words[i] = (words[i]! & kept) | set;
      writeAll(descriptor, chunk);
    });
  }
  closeSync(descriptor);
}

/* GGUF: Q4_K, with norms in fp32. */

const Q4_K = { type: 12, blockSize: 256, blockBytes: 144 };
const F32 = 0;
/** The super-blocks' scales of scales and of minimums, in half precision: 6.1e-5, and 7.5 times that. */
const [SCALE, MINIMUM] = [0x0400, 0x0f80];

function writeQ4K(out: string): void {
  const bytesOf = (sizes: readonly number[]) =>
    sizes.length === 1 ? 4 * sizes[0]! : (product(sizes) / Q4_K.blockSize) * Q4_K.blockBytes;
  let end = 0;
  const nothing = new Uint8Array(0);
  const stored = storedShapes(decoderTensors(config), ({ ggufName }) => ggufName);
  const tensors = Array.from(stored, ([name, shape]) => {
    const offset = BigInt(end);
    end = Math.ceil((end + bytesOf(shape)) / 32) * 32;
    return { name, shape, type: shape.length === 1 ? F32 : Q4_K.type, data: nothing, offset };
  });
  const descriptor = openSync(join(out, 'model.gguf'), 'w');
  writeAll(descriptor, writeGguf({ metadata: ggufMetadata(config), tensors }));
  const cipher = newCipher();
  for (const { shape } of tensors) {
    eachChunk(bytesOf(shape), cipher, (chunk) => {
      if (shape.length === 1) new Float32Array(chunk.buffer, chunk.byteOffset, chunk.length / 4).fill(1);
      else fixScales(chunk);
      writeAll(descriptor, chunk);
    });
  }
  closeSync(descriptor);
}

function fixScales(chunk: Buffer): void {
  for (let at = 0; at < chunk.length; at += Q4_K.blockBytes) {
    chunk.writeUInt16LE(SCALE, at);
    chunk.writeUInt16LE(MINIMUM, at + 2);
  }
}

function ggufMetadata(config: ModelConfig): Map<string, Value> {
  const architecture = FAMILIES[config.architecture].otherName ?? config.architecture;
  const u32 = (value: number): Value => ({ type: 'u32', value });
  const files = lenmlFiles(shape.tokenizer);
  const tokenizer =
    shape.pre === undefined
      ? sentencePieceMetadata(files.json.model.vocab)
      : byteLevelMetadata(files, shape.pre);
  const typed = (value: unknown): Value => {
    if (typeof value === 'string') return { type: 'string', value };
    if (typeof value === 'number') return u32(value);
    const list = value as string[] | number[];
    return typeof list[0] === 'string'
      ? { type: 'strings', value: list as string[] }
      : { type: 'i32s', value: list as number[] };
  };
  return new Map<string, Value>([
    ['general.architecture', { type: 'string', value: architecture }],
    ...Object.entries({ ...ggufShape(config), ...attentionMetadata(config) }).map(
      ([key, value]): [string, Value] => [`${architecture}.${key}`, value],
    ),
    ...[...tokenizer].map(([key, value]): [string, Value] => [key, typed(value)]),
  ]);
}

mkdirSync(flags.out, { recursive: true });
if (flags.format === 'gguf') writeQ4K(flags.out);
else writeShards(flags.out);
