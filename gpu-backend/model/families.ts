/**
 * The supported families of decoders, as a table: their features, the names in their files, and the tensors that follow.
 * Readers check a file against this list before they read any weights.
 */
import { check } from '../../shared/wire/parse-body.ts';
import {
  type ARCHITECTURES,
  corruptModel,
  type ModelConfig,
  modelConfigSchema,
  quoted,
  unsupportedModel,
} from './model-source.ts';

export type Architecture = (typeof ARCHITECTURES)[number];

type Family = {
  /** Biases of attention: none, always Q, K and V, or as `attention_bias` in config.json says. */
  readonly biases: 'none' | 'qkv' | 'asked';
  /** RMS norms over each head of Q and K. */
  readonly headNorms: boolean;
  /** RMS norms of what blocks give. */
  readonly postNorms: boolean;
  /** Files of safetensors have the weights of norms minus 1; llama.cpp's converter adds the 1. */
  readonly normsFromOne: boolean;
  /** As config.json names it. */
  readonly activation: 'silu' | 'gelu_pytorch_tanh';
  /**
   * Layers with a sliding window: none, all, those from `max_window_layers` on, those without rotary embedding, or all but every
   * {@link GLOBAL_EVERY}-th.
   */
  readonly window: 'none' | 'all' | 'upper' | 'without-rope' | 'between-global';
  /** Every n-th layer has no rotary embedding, unless config.json lists these layers. */
  readonly ropelessEvery: number | undefined;
  /** llama.cpp's converter interleaves the rows of Q and K; {@link toHalfSplitRotary} undoes it. */
  readonly interleavedInGguf: boolean;
  /** Files have Q, K and V, and gate and up, as one matrix each; GGUF files may have them alone, too. */
  readonly stacked: boolean;
  /**
   * Factors on the embedding, the outputs of blocks, scores and logits: none, as its configuration says, or Gemma's, which follow
   * from sizes.
   */
  readonly factors: 'none' | 'asked' | 'gemma';
  /** Other names of longrope in config.json, which is not supported. */
  readonly longropeNames: readonly string[];
  /** Its name in GGUF, and in the config.json of a model that reads images, too. */
  readonly otherName: string | undefined;
  /** transformers' defaults for fields that config.json leaves out. */
  readonly defaults: {
    /** Undefined: the number of heads. */
    readonly kvHeadCount: number | undefined;
    /** Undefined: `hidden_size` divided by the number of heads. */
    readonly headSize: number | undefined;
    readonly contextTokens: number;
    readonly ropeTheta: number;
    readonly rmsEpsilon: number;
    readonly windowTokens: number | undefined;
    readonly tiedEmbeddings: boolean;
    /** Of layers with a sliding window; undefined: the same as of all layers. */
    readonly localRopeTheta: number | undefined;
    /** Fields that config.json has in other families, by its names. */
    readonly fields: Readonly<Record<string, number>>;
  };
};

/** Gemma 3's default. */
export const GLOBAL_EVERY = 6;

const LLAMA: Family = {
  biases: 'asked',
  headNorms: false,
  postNorms: false,
  normsFromOne: false,
  activation: 'silu',
  window: 'none',
  ropelessEvery: undefined,
  interleavedInGguf: true,
  stacked: false,
  factors: 'none',
  longropeNames: [],
  otherName: undefined,
  defaults: {
    kvHeadCount: undefined,
    headSize: undefined,
    contextTokens: 2048,
    ropeTheta: 10_000,
    rmsEpsilon: 1e-6,
    windowTokens: undefined,
    tiedEmbeddings: false,
    localRopeTheta: undefined,
    fields: {},
  },
};

export const FAMILIES: Readonly<Record<Architecture, Family>> = {
  llama: LLAMA,
  mistral: {
    ...LLAMA,
    biases: 'none',
    window: 'all',
    defaults: { ...LLAMA.defaults, kvHeadCount: 8, contextTokens: 131_072, windowTokens: 4096 },
  },
  smollm3: {
    ...LLAMA,
    window: 'without-rope',
    ropelessEvery: 4,
    defaults: {
      ...LLAMA.defaults,
      kvHeadCount: 4,
      contextTokens: 32_768,
      ropeTheta: 2_000_000,
      tiedEmbeddings: true,
    },
  },
  qwen2: {
    ...LLAMA,
    biases: 'qkv',
    window: 'upper',
    interleavedInGguf: false,
    defaults: { ...LLAMA.defaults, kvHeadCount: 32, contextTokens: 32_768, windowTokens: 4096 },
  },
  qwen3: {
    ...LLAMA,
    headNorms: true,
    window: 'upper',
    interleavedInGguf: false,
    defaults: {
      ...LLAMA.defaults,
      kvHeadCount: 32,
      headSize: 128,
      contextTokens: 32_768,
      windowTokens: 4096,
    },
  },
  granite: { ...LLAMA, factors: 'asked' },
  phi3: {
    ...LLAMA,
    biases: 'none',
    window: 'all',
    interleavedInGguf: false,
    stacked: true,
    longropeNames: ['su', 'yarn'],
    defaults: { ...LLAMA.defaults, contextTokens: 4096, rmsEpsilon: 1e-5 },
  },
  gemma3_text: {
    ...LLAMA,
    headNorms: true,
    postNorms: true,
    normsFromOne: true,
    activation: 'gelu_pytorch_tanh',
    window: 'between-global',
    interleavedInGguf: false,
    factors: 'gemma',
    otherName: 'gemma3',
    defaults: {
      kvHeadCount: 4,
      headSize: 256,
      contextTokens: 131_072,
      ropeTheta: 1_000_000,
      rmsEpsilon: 1e-6,
      windowTokens: 4096,
      tiedEmbeddings: true,
      localRopeTheta: 10_000,
      fields: { num_attention_heads: 8, vocab_size: 262_208 },
    },
  },
};

/** @throws MaskrouteError `unsupported_model` for a family that is not in the table. */
export function architectureNamed(name: unknown): Architecture {
  for (const [own, { otherName }] of Object.entries(FAMILIES))
    if (name === own || (name !== undefined && name === otherName)) return own as Architecture;
  const what = typeof name === 'string' ? name : 'none';
  throw unsupportedModel(`architecture ${quoted(what)} (supported: ${Object.keys(FAMILIES).join(', ')})`);
}

/* The configuration, whichever file it comes from. */

// The largest models have 16,384 floats a position and 256,000 tokens; rotary tables grow with the context.
const WIDTH_MAX = 1 << 18;
const VOCABULARY_MAX = 1 << 20;
const CONTEXT_TOKENS_MAX = 1 << 20;
/** Most values of all rotary tables, which an import has in memory: a gigabyte. */
const ROTARY_VALUES_MAX = 1 << 28;

/** Checks the schema, bounds, and relations between values. @throws MaskrouteError `corrupt_model`, `unsupported_model`. */
export function checkConfig(config: Record<string, unknown>): ModelConfig {
  const checked = check(modelConfigSchema, config, 'all of it');
  if (checked.kind === 'bad') {
    throw corruptModel(`its configuration makes no sense (${checked.message})`);
  }
  const { value } = checked;
  const atMost = (name: keyof ModelConfig, max: number) => {
    if ((value[name] as number) > max) throw unsupportedModel(`${name} is ${value[name]}, more than ${max}`);
  };
  atMost('hiddenSize', WIDTH_MAX);
  atMost('ffnSize', WIDTH_MAX);
  atMost('headCount', WIDTH_MAX);
  atMost('headSize', WIDTH_MAX);
  atMost('vocabularySize', VOCABULARY_MAX);
  atMost('contextTokens', CONTEXT_TOKENS_MAX);
  const tables = value.localRope ? 2 : 1;
  if (tables * value.contextTokens * value.headSize > ROTARY_VALUES_MAX) {
    throw unsupportedModel(
      `rotary tables of ${value.contextTokens} positions and ${value.headSize} dimensions`,
    );
  }
  if (value.headSize % 2 !== 0)
    throw corruptModel(`a head of ${value.headSize} dimensions cannot be rotated`);
  if (value.headCount % value.kvHeadCount !== 0) {
    throw corruptModel(
      `${value.headCount} heads do not share ${value.kvHeadCount} key and value heads evenly`,
    );
  }
  const { ropeScaling, slidingWindow, localRope, layersWithoutRope = [] } = value;
  if (ropeScaling?.type === 'factors' && ropeScaling.factors.length !== value.headSize / 2) {
    throw corruptModel(
      `it has ${ropeScaling.factors.length} rope factors for ${value.headSize / 2} frequencies`,
    );
  }
  const named = [...layersWithoutRope, ...(slidingWindow?.layers ?? []), ...(localRope?.layers ?? [])];
  if (named.some((layer) => layer >= value.layerCount)) {
    throw corruptModel(`its configuration names a layer beyond its ${value.layerCount} layers`);
  }
  return value;
}

/** Gemma's factors. `scorePart`: what scores are divided by the root of. */
export const gemmaFactors = (hiddenSize: number, scorePart: number): ModelConfig['factors'] => ({
  embedding: Math.sqrt(hiddenSize),
  blocks: 1,
  scores: 1 / Math.sqrt(scorePart),
  logits: 1,
});

/** The sliding window of these layers; undefined when it has no effect: no layers, or not shorter than the context. */
export function slidingWindowOf(
  tokens: number | undefined,
  layers: readonly number[],
  contextTokens: number,
): ModelConfig['slidingWindow'] {
  if (tokens === undefined || tokens >= contextTokens || layers.length === 0) return undefined;
  return { tokens, layers: [...layers] };
}

export const layersOf = (layerCount: number, has: (layer: number) => boolean = () => true): number[] =>
  Array.from({ length: Math.min(Math.max(layerCount, 0), 512) }, (_, layer) => layer).filter(has);

/* The tensors: their names here and in files, and their shapes. */

export type DecoderTensor = {
  /** The name in a `WeightSource`. */
  readonly name: string;
  /** Hugging Face's name; of a tensor in a stack, the stack's. */
  readonly hubName: string;
  /** llama.cpp's name, or the stack's. */
  readonly ggufName: string;
  /** Its first row in the stack; 0 when it is alone. */
  readonly firstRow: number;
  /** `[out, in]` for a projection. */
  readonly shape: readonly number[];
  /** The heads of Q or K when the GGUF file interleaves their rows; else undefined. */
  readonly interleavedHeads: number | undefined;
  /** What is added to its values in files of safetensors, before the factor. */
  readonly hubAdded: number;
  /** The family's factor on its values. */
  readonly scale: number;
};

/** `held`: the names in the file, which say where a stacked family has no stacks; without them it has all. */
export function decoderTensors(
  config: ModelConfig,
  held: ReadonlyMap<string, unknown> = new Map(),
): DecoderTensor[] {
  const { hiddenSize, ffnSize, vocabularySize, headCount, kvHeadCount, headSize, attentionBias } = config;
  const { factors, tiedEmbeddings, headNorms, postNorms } = config;
  // Q is divided by √headSize in all families, so K, or the norm of its heads, has the rest of the factor on scores: with all of
  // it, Q's codes would have scales that are too small for half precision.
  const keyScale = factors && factors.scores * Math.sqrt(headSize);
  const queryWidth = headCount * headSize;
  const keyWidth = kvHeadCount * headSize;
  const { interleavedInGguf, stacked, normsFromOne } = FAMILIES[config.architecture];
  const list: DecoderTensor[] = [];
  type Part = {
    readonly rotaryHeads?: number | undefined;
    readonly scale?: number | undefined;
    readonly kind?: 'weight' | 'bias';
    readonly hubName?: string | undefined;
    readonly stack?: Stack | undefined;
  };
  type Stack = { readonly names: readonly [hub: string, gguf: string]; readonly firstRow: number };
  const add = (
    name: string,
    ggufName: string,
    shape: readonly number[],
    { rotaryHeads, scale = 1, kind = 'weight', hubName = name, stack }: Part = {},
  ) => {
    const { names, firstRow } = stack ?? { names: [hubName, ggufName], firstRow: 0 };
    list.push({
      name: `${name}.${kind}`,
      hubName: `${names[0]}.${kind}`,
      ggufName: `${names[1]}.${kind}`,
      firstRow,
      shape,
      interleavedHeads: interleavedInGguf ? rotaryHeads : undefined,
      // Norms are the only weights with one axis.
      hubAdded: normsFromOne && kind === 'weight' && shape.length === 1 ? 1 : 0,
      scale,
    });
  };

  /** `alone`: a name that the file has if the stack's parts are tensors of their own. */
  const stackOf = (alone: string, names: Stack['names']) => (firstRow: number) =>
    stacked && !held.has(`${alone}.weight`) ? { names, firstRow } : undefined;

  add('model.embed_tokens', 'token_embd', [vocabularySize, hiddenSize], { scale: factors?.embedding });
  for (let i = 0; i < config.layerCount; i++) {
    const layer = `model.layers.${i}`;
    const attention = `${layer}.self_attn`;
    const scale = factors?.blocks;
    add(`${layer}.input_layernorm`, `blk.${i}.attn_norm`, [hiddenSize]);
    const heads = [
      { letter: 'q', width: queryWidth, firstRow: 0, rotaryHeads: headCount },
      {
        letter: 'k',
        width: keyWidth,
        firstRow: queryWidth,
        rotaryHeads: kvHeadCount,
        scale: headNorms ? undefined : keyScale,
      },
      { letter: 'v', width: keyWidth, firstRow: queryWidth + keyWidth },
    ];
    const inQkv = stackOf(`blk.${i}.attn_q`, [`${attention}.qkv_proj`, `blk.${i}.attn_qkv`]);
    for (const { letter, width, firstRow, ...part } of heads) {
      const own = [`${attention}.${letter}_proj`, `blk.${i}.attn_${letter}`] as const;
      add(...own, [width, hiddenSize], { ...part, stack: inQkv(firstRow) });
      if (attentionBias !== undefined) add(...own, [width], { ...part, kind: 'bias' });
    }
    add(`${attention}.o_proj`, `blk.${i}.attn_output`, [hiddenSize, queryWidth], { scale });
    if (attentionBias === 'qkvo')
      add(`${attention}.o_proj`, `blk.${i}.attn_output`, [hiddenSize], { scale, kind: 'bias' });
    if (headNorms) {
      add(`${attention}.q_norm`, `blk.${i}.attn_q_norm`, [headSize]);
      add(`${attention}.k_norm`, `blk.${i}.attn_k_norm`, [headSize], { scale: keyScale });
    }
    if (postNorms) {
      // There, the norm behind attention has the name of a Llama's norm before the FFN.
      add(`${attention}.post_norm`, `blk.${i}.post_attention_norm`, [hiddenSize], {
        hubName: `${layer}.post_attention_layernorm`,
      });
    }
    add(`${layer}.post_attention_layernorm`, `blk.${i}.ffn_norm`, [hiddenSize], {
      hubName: postNorms && `${layer}.pre_feedforward_layernorm`,
    });
    const inGateUp = stackOf(`blk.${i}.ffn_gate`, [`${layer}.mlp.gate_up_proj`, `blk.${i}.ffn_up`]);
    add(`${layer}.mlp.gate_proj`, `blk.${i}.ffn_gate`, [ffnSize, hiddenSize], { stack: inGateUp(0) });
    add(`${layer}.mlp.up_proj`, `blk.${i}.ffn_up`, [ffnSize, hiddenSize], { stack: inGateUp(ffnSize) });
    add(`${layer}.mlp.down_proj`, `blk.${i}.ffn_down`, [hiddenSize, ffnSize], { scale });
    if (postNorms) {
      add(`${layer}.mlp.post_norm`, `blk.${i}.post_ffw_norm`, [hiddenSize], {
        hubName: `${layer}.post_feedforward_layernorm`,
      });
    }
  }
  // The head reads what the last norm writes, so the norm's weights have the factor on logits. A tied head's rows are the
  // embedding's, with the embedding's factor, which is taken back here, too.
  add('model.norm', 'output_norm', [hiddenSize], {
    scale: factors && factors.logits / (tiedEmbeddings ? factors.embedding : 1),
  });
  if (!tiedEmbeddings) add('lm_head', 'output', [vocabularySize, hiddenSize]);
  return list;
}

/** The shapes of the tensors in a file, by their names there. */
export function storedShapes(
  tensors: readonly DecoderTensor[],
  nameOf: (tensor: DecoderTensor) => string,
): Map<string, readonly number[]> {
  const shapes = new Map<string, readonly number[]>();
  // The last part of a stack ends where the stack does.
  for (const tensor of tensors) {
    const [rows, ...columns] = tensor.shape;
    shapes.set(nameOf(tensor), [tensor.firstRow + rows!, ...columns]);
  }
  return shapes;
}

/**
 * Checks that a file has exactly the tensors of its architecture. Another tensor (a bias, experts, an adapter) would be
 * ignored and make answers wrong.
 * @param held shapes of the file's tensors, by the names that `nameOf` returns.
 * @throws MaskrouteError `corrupt_model` for a missing tensor or a wrong shape, `unsupported_model` for another tensor.
 */
export function checkTensors(
  config: ModelConfig,
  held: ReadonlyMap<string, readonly number[]>,
  nameOf: (tensor: DecoderTensor) => string,
): DecoderTensor[] {
  const tensors = decoderTensors(config, held);
  const expected = storedShapes(tensors, nameOf);
  for (const [name, shape] of expected) {
    const found = held.get(name);
    if (found === undefined) throw corruptModel(`tensor ${name} is missing`);
    if (found.join() !== shape.join()) {
      throw corruptModel(`tensor ${name} is [${found.join()}], expected [${shape.join()}]`);
    }
  }
  for (const name of held.keys()) {
    if (!expected.has(name)) {
      throw unsupportedModel(`tensor ${quoted(name)} is no part of the architecture ${config.architecture}`);
    }
  }
  return tensors;
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
