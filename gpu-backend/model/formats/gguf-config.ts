/**
 * `LlamaConfig` from a GGUF file's metadata. Defaults are llama.cpp's; whatever would change the computation and
 * is not honoured here is refused by name, because a model that runs wrong is worse than a model that does not run.
 */
import { check } from '../../../shared/wire/parse-body.ts';
import type { LlamaConfig } from '../model-source.ts';
import { corruptModel, llamaConfigSchema, unsupportedModel } from '../model-source.ts';
import type { GgufHeader, GgufValue } from './gguf-header.ts';
import { quoted } from './gguf-header.ts';

const SUPPORTED_ARCHITECTURES = ['llama'] as const;

// The largest models have 16,384 floats a position and 256,000 tokens; rotary tables grow with the context.
const WIDTH_MAX = 1 << 18;
const VOCABULARY_MAX = 1 << 20;
const CONTEXT_TOKENS_MAX = 1 << 20;

/** @throws MaskrouteError `unsupported_model` or `corrupt_model`. */
export function configFromGguf(header: GgufHeader): LlamaConfig {
  const read = reader(header.metadata);
  const architecture = read.text('general.architecture');
  if (architecture !== 'llama') throw unsupportedArchitecture(architecture ?? 'none');
  refuseUnhonoured(read);
  const hiddenSize = read.required('llama.embedding_length');
  const headCount = read.required('llama.attention.head_count');
  const kvHeadCount = read.number('llama.attention.head_count_kv') ?? headCount;
  const headSize = read.number('llama.attention.key_length') ?? hiddenSize / headCount;
  const valueSize = read.number('llama.attention.value_length') ?? headSize;
  const rotarySize = read.number('llama.rope.dimension_count') ?? headSize;
  if (valueSize !== headSize) throw unsupportedModel(`keys are ${headSize} wide and values ${valueSize}`);
  if (rotarySize !== headSize) {
    throw unsupportedModel(`rotary turns ${rotarySize} of ${headSize} dimensions of a head`);
  }
  return checkConfig({
    architecture: 'llama',
    layerCount: read.required('llama.block_count'),
    hiddenSize,
    ffnSize: read.required('llama.feed_forward_length'),
    headCount,
    kvHeadCount,
    headSize,
    // The embedding has the last word: vocabularies are padded to a round number.
    vocabularySize: header.tensors.get('token_embd.weight')?.shape[0] ?? 0,
    contextTokens: read.required('llama.context_length'),
    ropeTheta: read.number('llama.rope.freq_base') ?? 10_000,
    rmsEpsilon: singlePrecisionText(read.required('llama.attention.layer_norm_rms_epsilon')),
    tiedEmbeddings: !header.tensors.has('output.weight'),
  });
}

export const unsupportedArchitecture = (name: string) =>
  unsupportedModel(`architecture ${quoted(name)} (supported: ${SUPPORTED_ARCHITECTURES.join(', ')})`);

/** Relations between the numbers that the schema cannot say. Shared by every reader of configurations. */
export function checkConfig(config: Record<keyof LlamaConfig, unknown>): LlamaConfig {
  const checked = check(llamaConfigSchema, config, 'all of it');
  if (checked.kind === 'bad') {
    throw corruptModel(`its configuration makes no sense (${checked.message})`);
  }
  const { value } = checked;
  const atMost = (name: keyof LlamaConfig, max: number) => {
    if ((value[name] as number) > max) throw unsupportedModel(`${name} is ${value[name]}, more than ${max}`);
  };
  atMost('hiddenSize', WIDTH_MAX);
  atMost('ffnSize', WIDTH_MAX);
  atMost('headCount', WIDTH_MAX);
  atMost('headSize', WIDTH_MAX);
  atMost('vocabularySize', VOCABULARY_MAX);
  atMost('contextTokens', CONTEXT_TOKENS_MAX);
  if (value.headSize % 2 !== 0)
    throw corruptModel(`a head of ${value.headSize} dimensions cannot be rotated`);
  if (value.headCount % value.kvHeadCount !== 0) {
    throw corruptModel(
      `${value.headCount} heads do not share ${value.kvHeadCount} key and value heads evenly`,
    );
  }
  return value;
}

type Reader = ReturnType<typeof reader>;

function reader(metadata: ReadonlyMap<string, GgufValue>) {
  const number = (key: string): number | undefined => {
    const value = metadata.get(key);
    if (value === undefined) return undefined;
    const uniform = Array.isArray(value) ? uniformValue(key, value) : value;
    const result = typeof uniform === 'bigint' ? Number(uniform) : uniform;
    if (typeof result !== 'number' || !Number.isFinite(result)) throw corruptModel(`${key} is not a number`);
    return result;
  };
  return {
    number,
    required(key: string): number {
      const value = number(key);
      if (value === undefined) throw corruptModel(`${key} is missing`);
      return value;
    },
    text(key: string): string | undefined {
      const value = metadata.get(key);
      return typeof value === 'string' ? value : undefined;
    },
  };
}

/** Some files give one value a layer; only models whose layers are all alike can be built. */
function uniformValue(key: string, values: readonly unknown[]): unknown {
  if (values.length === 0 || values.some((value) => value !== values[0])) {
    throw unsupportedModel(`${key} differs between layers`);
  }
  return values[0];
}

function refuseUnhonoured(read: Reader): void {
  const shards = read.number('split.count') ?? 1;
  if (shards > 1)
    throw unsupportedModel(`it is one of ${shards} parts; join them with llama-gguf-split --merge`);
  const experts = read.number('llama.expert_count') ?? 0;
  if (experts > 0) throw unsupportedModel(`it is a mixture of ${experts} experts`);
  const scaling = read.text('llama.rope.scaling.type') ?? 'linear';
  const factor = read.number('llama.rope.scaling.factor') ?? read.number('llama.rope.scale_linear') ?? 1;
  // llama.cpp reads a factor of 0 as "no scaling".
  const scaled = scaling === 'linear' ? factor !== 1 && factor !== 0 : scaling !== 'none';
  if (scaled) throw unsupportedModel(`rope scaling ${quoted(scaling)} (factor ${factor})`);
  if ((read.number('llama.rope.scaling.attn_factor') ?? 1) !== 1) {
    throw unsupportedModel('rope scaling with an attention factor');
  }
}

/** 1e-5 is stored as a float, 0.000009999999747; the shortest decimal that names the float is what was meant. */
function singlePrecisionText(value: number): number {
  for (let digits = 1; digits <= 9; digits++) {
    const short = Number(value.toPrecision(digits));
    if (Math.fround(short) === Math.fround(value)) return short;
  }
  return value;
}
