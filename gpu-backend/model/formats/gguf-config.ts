/**
 * `ModelConfig` from a GGUF file's metadata. Defaults are llama.cpp's. Settings that would change the computation and are
 * not supported are refused by name, because a model that runs wrong is worse than a model that does not run.
 */
import {
  type Architecture,
  architectureNamed,
  checkConfig,
  FAMILIES,
  GLOBAL_EVERY,
  gemmaFactors,
  layersOf,
  slidingWindowOf,
} from '../families.ts';
import {
  corruptModel,
  type ModelConfig,
  quoted,
  type RopeScaling,
  unsupportedModel,
} from '../model-source.ts';
import { yarnAttentionFactor } from '../rope.ts';
import type { GgufHeader, GgufValue } from './gguf-header.ts';

/** Llama 3's files have the divisors of the rotary frequencies as a tensor. */
export const ROPE_FACTORS = 'rope_freqs.weight';

/** `ropeFactors`: the content of {@link ROPE_FACTORS}. @throws MaskrouteError `unsupported_model` or `corrupt_model`. */
export function configFromGguf(header: GgufHeader, ropeFactors: readonly number[] | undefined): ModelConfig {
  const named = reader(header.metadata, '').text('general.architecture');
  const architecture = architectureNamed(named);
  const read = reader(header.metadata, `${named}.`);
  refuseUnhonoured(read, header);
  const family = FAMILIES[architecture];
  const layerCount = read.required('block_count');
  const hiddenSize = read.required('embedding_length');
  const headCount = read.required('attention.head_count');
  const kvHeadCount = read.number('attention.head_count_kv') ?? headCount;
  const headSize = read.number('attention.key_length') ?? hiddenSize / headCount;
  const valueSize = read.number('attention.value_length') ?? headSize;
  const rotarySize = read.number('rope.dimension_count') ?? headSize;
  const contextTokens = read.required('context_length');
  if (valueSize !== headSize) throw unsupportedModel(`keys are ${headSize} wide and values ${valueSize}`);
  if (rotarySize !== headSize) {
    throw unsupportedModel(`rotary embedding of ${rotarySize} of ${headSize} dimensions of a head`);
  }
  const every = family.ropelessEvery;
  const windowLayers = layersWithWindow(read, family.window === 'between-global', layerCount);
  const { ropeTheta, localRopeTheta } = family.defaults;
  return checkConfig({
    architecture,
    layerCount,
    hiddenSize,
    ffnSize: read.required('feed_forward_length'),
    headCount,
    kvHeadCount,
    headSize,
    // The rows of the embedding, as vocabularies are padded to a round number.
    vocabularySize: header.tensors.get('token_embd.weight')?.shape[0] ?? 0,
    contextTokens,
    // llama.cpp's default would be wrong for every Gemma 3.
    ropeTheta:
      ropeNumber(read, 'freq_base', 'global.freq_base') ??
      (localRopeTheta === undefined ? 10_000 : ropeTheta),
    rmsEpsilon: singlePrecisionText(read.required('attention.layer_norm_rms_epsilon')),
    tiedEmbeddings: !header.tensors.has('output.weight'),
    ropeScaling: ropeScaling(read, contextTokens, ropeFactors),
    attentionBias: attentionBias(header, architecture),
    headNorms: family.headNorms || undefined,
    slidingWindow: slidingWindowOf(
      // As for llama.cpp, 0 is no window.
      read.number('attention.sliding_window') || undefined,
      windowLayers,
      contextTokens,
    ),
    localRope:
      localRopeTheta === undefined || windowLayers.length === 0
        ? undefined
        : {
            theta: ropeNumber(read, 'freq_base_swa', 'local.freq_base') ?? localRopeTheta,
            layers: windowLayers,
          },
    postNorms: family.postNorms || undefined,
    activation: family.activation === 'silu' ? undefined : 'gelu-tanh',
    layersWithoutRope: every && layersOf(layerCount, (layer) => (layer + 1) % every === 0),
    factors: factorsOf(read, architecture, { layerCount, hiddenSize, headCount, headSize }),
  });
}

/** Ollama's converter has names of its own for the rotary embedding of a Gemma 3. */
const ropeNumber = (read: Reader, name: string, ollamaName: string): number | undefined =>
  read.number(`rope.${name}`) ?? read.number(`rope.${ollamaName}`);

const yarnBeta = (read: Reader, name: 'beta_fast' | 'beta_slow'): number | undefined =>
  ropeNumber(read, `scaling.yarn_${name}`, `scaling.${name}`);

/** As llama.cpp reads it: without a window, all layers are global. */
function layersWithWindow(read: Reader, areSomeGlobal: boolean, layerCount: number): number[] {
  if (!areSomeGlobal) return layersOf(layerCount);
  if (!read.number('attention.sliding_window')) return [];
  const pattern = 'attention.sliding_window_pattern';
  const listed = read.value(pattern);
  // Ollama's converter says it of each layer.
  if (Array.isArray(listed)) {
    if (listed.length !== layerCount || listed.some((has) => typeof has !== 'boolean')) {
      throw corruptModel(`${pattern} is no list of ${layerCount} booleans`);
    }
    return layersOf(layerCount, (layer) => listed[layer]);
  }
  const every = read.number(pattern) ?? GLOBAL_EVERY;
  return layersOf(layerCount, (layer) => (layer + 1) % every !== 0);
}

type Sizes = Pick<ModelConfig, 'layerCount' | 'hiddenSize' | 'headCount' | 'headSize'>;

function factorsOf(read: Reader, architecture: Architecture, sizes: Sizes): ModelConfig['factors'] {
  switch (FAMILIES[architecture].factors) {
    case 'none':
      return undefined;
    case 'asked':
      return askedFactors(read, sizes.headSize);
    case 'gemma':
      return gemmaFactors(sizes.hiddenSize, gemmaScorePart(sizes));
  }
}

/** Files do not say it. llama.cpp knows the one Gemma 3 where it is not the width of a head, of 27B, by its 62 layers. */
const gemmaScorePart = ({ layerCount, hiddenSize, headCount, headSize }: Sizes): number =>
  layerCount === 62 ? hiddenSize / headCount : headSize;

/** Also here, as for llama.cpp, 0 is none. */
function askedFactors(read: Reader, headSize: number): ModelConfig['factors'] {
  // llama.cpp takes this for a switch here.
  if (read.value('rope.scaling.finetuned') === false)
    throw unsupportedModel('no rotary embedding (rope.scaling.finetuned is false)');
  const factor = (name: string, none: number) => singlePrecisionText(read.number(name) || none);
  return {
    embedding: factor('embedding_scale', 1),
    blocks: factor('residual_scale', 1),
    scores: factor('attention.scale', 1 / Math.sqrt(headSize)),
    logits: 1 / singlePrecisionText(read.required('logit_scale')),
  };
}

function attentionBias({ tensors }: GgufHeader, architecture: Architecture): ModelConfig['attentionBias'] {
  const { biases } = FAMILIES[architecture];
  if (biases !== 'asked') return biases === 'qkv' ? 'qkv' : undefined;
  if (!tensors.has('blk.0.attn_q.bias')) return undefined;
  return tensors.has('blk.0.attn_output.bias') ? 'qkvo' : 'qkv';
}

function ropeScaling(
  read: Reader,
  contextTokens: number,
  factors: readonly number[] | undefined,
): RopeScaling | undefined {
  const named = namedRopeScaling(read, contextTokens);
  if (factors === undefined) return named;
  if (named === undefined) return { type: 'factors', factors: [...factors] };
  throw unsupportedModel(`rope factors and the rope scaling ${quoted(named.type)} together`);
}

function namedRopeScaling(read: Reader, contextTokens: number): RopeScaling | undefined {
  const factor = read.number('rope.scaling.factor') ?? read.number('rope.scale_linear') ?? 1;
  const type = read.text('rope.scaling.type') ?? 'linear';
  // llama.cpp reads a factor of 0 as "no scaling".
  const scaled = factor !== 1 && factor !== 0;
  switch (type) {
    case 'none':
      return undefined;
    case 'linear':
      return scaled ? { type, factor } : undefined;
    case 'yarn':
      if (!scaled) return undefined;
      return {
        type,
        factor,
        originalContextTokens: read.number('rope.scaling.original_context_length') ?? contextTokens,
        betaFast: yarnBeta(read, 'beta_fast') ?? 32,
        betaSlow: yarnBeta(read, 'beta_slow') ?? 1,
        wholeDimensions: true,
        attentionFactor: yarnAttentionFactor(factor) * (read.number('rope.scaling.attn_factor') ?? 1),
      };
    default:
      throw unsupportedModel(`rope scaling ${quoted(type)} (factor ${factor})`);
  }
}

type Reader = ReturnType<typeof reader>;

/** Reads metadata under keys that begin with `prefix`. */
function reader(metadata: ReadonlyMap<string, GgufValue>, prefix: string) {
  const number = (name: string): number | undefined => {
    const key = prefix + name;
    const value = metadata.get(key);
    if (value === undefined) return undefined;
    const uniform = Array.isArray(value) ? uniformValue(key, value) : value;
    const result = typeof uniform === 'bigint' ? Number(uniform) : uniform;
    if (typeof result !== 'number' || !Number.isFinite(result)) throw corruptModel(`${key} is not a number`);
    return result;
  };
  return {
    number,
    required(name: string): number {
      const value = number(name);
      if (value === undefined) throw corruptModel(`${prefix}${name} is missing`);
      return value;
    },
    value: (name: string) => metadata.get(prefix + name),
    /** Of all keys that go on behind `beginning`. */
    names: (beginning: string): readonly string[] =>
      [...metadata.keys()]
        .filter((key) => key.startsWith(prefix + beginning))
        .map((key) => key.slice(prefix.length + beginning.length)),
    text(name: string): string | undefined {
      const value = metadata.get(prefix + name);
      return typeof value === 'string' ? value : undefined;
    },
  };
}

/** Some files have a value for each layer; only models with equal layers are supported. */
function uniformValue(key: string, values: readonly unknown[]): unknown {
  if (values.length === 0 || values.some((value) => value !== values[0])) {
    throw unsupportedModel(`${key} differs between layers`);
  }
  return values[0];
}

function refuseUnhonoured(read: Reader, { tensors }: GgufHeader): void {
  for (const name of ['attn_logit_softcapping', 'final_logit_softcapping'])
    if (read.number(name)) throw unsupportedModel(`soft-capping (${name})`);
  const experts = read.number('expert_count') ?? 0;
  if (experts > 0) throw unsupportedModel(`it is a mixture of ${experts} experts`);
  if (tensors.has('rope_factors_long.weight')) throw unsupportedModel('longrope (rope_factors_long)');
  const scaling = read.text('rope.scaling.type');
  if (scaling !== 'yarn' && (read.number('rope.scaling.attn_factor') ?? 1) !== 1) {
    throw unsupportedModel('rope scaling with an attention factor');
  }
  for (const key of ['yarn_ext_factor', 'yarn_attn_factor', 'extrapolation_factor']) {
    if ((read.number(`rope.scaling.${key}`) ?? 1) !== 1) throw unsupportedModel(`rope scaling with ${key}`);
  }
  if ((read.number('rope.scaling.yarn_log_multiplier') ?? 0) !== 0) {
    throw unsupportedModel('rope scaling with yarn_log_multiplier');
  }
  const unknown = read.names('rope.scaling.').find((name) => !ROPE_SCALING.has(name));
  if (unknown !== undefined) throw unsupportedModel(`rope scaling with ${unknown}`);
}

/** What is read of rope scaling, or refused unless it changes nothing. Each other name may be a number that a layer needs. */
const ROPE_SCALING: ReadonlySet<string> = new Set([
  ...['type', 'factor', 'original_context_length', 'finetuned', 'attn_factor'],
  ...['yarn_beta_fast', 'yarn_beta_slow', 'yarn_ext_factor', 'yarn_attn_factor', 'yarn_log_multiplier'],
  ...['beta_fast', 'beta_slow', 'extrapolation_factor'],
]);

/** The shortest decimal that rounds to the same float: 1e-5 is stored as 0.000009999999747. */
function singlePrecisionText(value: number): number {
  for (let digits = 1; digits <= 9; digits++) {
    const short = Number(value.toPrecision(digits));
    if (Math.fround(short) === Math.fround(value)) return short;
  }
  return value;
}
