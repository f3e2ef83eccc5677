/**
 * Configurations that lie: whatever stands in config.json, the answer is a configuration or a MaskrouteError, at once. And what
 * files of Gemma 3 say and leave out.
 */
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { decoderTensors } from '../../../../gpu-backend/model/families.ts';
import { configFromGguf } from '../../../../gpu-backend/model/formats/gguf-config.ts';
import type { GgufValue } from '../../../../gpu-backend/model/formats/gguf-header.ts';
import { configFromHuggingFace } from '../../../../gpu-backend/model/formats/hf-config.ts';
import { openSafetensorsFolder } from '../../../../gpu-backend/model/formats/hf-folder.ts';
import { MaskrouteError } from '../../../../shared/wire/errors.ts';
import { hubConfig, safetensorsFiles, storedTensors } from '../../../support/family-files.ts';
import { furthest } from '../../../support/furthest.ts';
import { asGemma, randomLlama } from '../../../support/random-llama.ts';
import figures from '../architectures/fixtures/families.json' with { type: 'json' };

const hostile = fc.oneof(
  fc.constantFrom<unknown>(null, -1, 0, 1, 7, 1e308, 2 ** 53, 0.5, '', 'x', true, false, [], {}, [1e9], [-1]),
  fc.constantFrom({ rope_type: 'yarn' }, { rope_type: 'llama3', factor: 0 }, { type: 'linear', factor: -1 }),
  fc.jsonValue(),
);
const change = fc.record({ at: fc.nat(60), value: hostile });

test('with fields changed, it is read or refused with a reason', () => {
  const outcomes = { read: 0, refused: 0 };
  const before = process.cpuUsage();
  fc.assert(
    fc.property(
      fc.constantFrom(...figures.variants.map(({ config }) => config)),
      fc.array(change, { minLength: 1, maxLength: 3 }),
      (config, changes) => {
        const keys = Object.keys(config);
        const changed = Object.fromEntries(changes.map(({ at, value }) => [keys[at % keys.length]!, value]));
        try {
          decoderTensors(configFromHuggingFace({ ...config, ...changed }));
          outcomes.read++;
        } catch (error) {
          if (!(error instanceof MaskrouteError)) throw error;
          expect(['corrupt_model', 'unsupported_model']).toContain(error.code);
          outcomes.refused++;
        }
      },
    ),
    { seed: 8, numRuns: 1500 },
  );
  const { user, system } = process.cpuUsage(before);
  expect((user + system) / 1000 / 1500, 'ms of the processor each').toBeLessThan(20);
  expect(outcomes.read).toBeGreaterThan(100);
  expect(outcomes.refused).toBeGreaterThan(100);
});

test('what a file leaves out is as transformers has it for the family', () => {
  const least = (model_type: string) =>
    configFromHuggingFace({
      ...{ model_type, hidden_size: 64, intermediate_size: 96, num_hidden_layers: 2 },
      ...{ num_attention_heads: 4, vocab_size: 100 },
    });
  const common = { kvHeadCount: 4, headSize: 16, ropeTheta: 10_000, tiedEmbeddings: false };
  const none = { embedding: 1, blocks: 1, scores: 1, logits: 1 };
  expect(least('llama')).toMatchObject({ ...common, contextTokens: 2048, rmsEpsilon: 1e-6 });
  expect(least('granite')).toMatchObject({ ...common, contextTokens: 2048, factors: none });
  expect(least('phi3')).toMatchObject({ ...common, contextTokens: 4096, rmsEpsilon: 1e-5 });
  expect(least('phi3').slidingWindow).toBeUndefined();
});

describe('Gemma 3', () => {
  /** What config.json says of 4B on the hub, and of 1B. */
  const READS_IMAGES = {
    model_type: 'gemma3',
    eos_token_id: [1, 106],
    text_config: {
      model_type: 'gemma3_text',
      hidden_size: 2560,
      intermediate_size: 10_240,
      num_hidden_layers: 34,
      rope_scaling: { factor: 8.0, rope_type: 'linear' },
      sliding_window: 1024,
    },
    vision_config: { model_type: 'siglip_vision_model', hidden_size: 1152 },
  };
  const READS_TEXT = {
    model_type: 'gemma3_text',
    ...{ head_dim: 256, hidden_activation: 'gelu_pytorch_tanh', hidden_size: 1152, intermediate_size: 6912 },
    ...{ num_attention_heads: 4, num_hidden_layers: 26, num_key_value_heads: 1, query_pre_attn_scalar: 256 },
    ...{ rms_norm_eps: 1e-6, rope_local_base_freq: 10_000, rope_scaling: null, rope_theta: 1_000_000 },
    ...{
      max_position_embeddings: 32_768,
      sliding_window: 512,
      sliding_window_pattern: 6,
      vocab_size: 262_144,
    },
  };

  /** 27B, with these fields, too. */
  function fromGguf(fields: Record<string, number | string>) {
    const metadata = new Map<string, GgufValue>([
      ['general.architecture', 'gemma3'],
      ...Object.entries({
        ...{ block_count: 62, context_length: 131_072, embedding_length: 5376, feed_forward_length: 21_504 },
        ...{ 'attention.head_count': 32, 'attention.head_count_kv': 16, 'attention.key_length': 128 },
        ...{ 'attention.layer_norm_rms_epsilon': Math.fround(1e-6), 'attention.sliding_window': 1024 },
        ...{ 'rope.scaling.type': 'linear', 'rope.scaling.factor': 8, ...fields },
      }).map(([key, value]) => [`gemma3.${key}`, value] as const),
    ]);
    const embedding = { name: 'token_embd.weight', shape: [262_208, 5376], type: 1, offset: 0, bytes: 0 };
    return configFromGguf({ metadata, tensors: new Map([[embedding.name, embedding]]) }, undefined);
  }

  test('4B says little of itself: the rest is as transformers has it', () => {
    const config = configFromHuggingFace(READS_IMAGES);
    expect(config).toMatchObject({
      ...{ architecture: 'gemma3_text', layerCount: 34, headCount: 8, kvHeadCount: 4, headSize: 256 },
      ...{ vocabularySize: 262_208, contextTokens: 131_072, tiedEmbeddings: true, ropeTheta: 1e6 },
      ropeScaling: { type: 'linear', factor: 8 },
      factors: { embedding: Math.sqrt(2560), blocks: 1, scores: 1 / 16, logits: 1 },
    });
    const { slidingWindow, localRope } = config;
    expect(slidingWindow?.tokens).toBe(1024);
    expect(localRope).toEqual({ theta: 10_000, layers: slidingWindow!.layers });
    expect([0, 4, 5, 6, 11, 33].map((layer) => localRope!.layers.includes(layer))).toEqual([
      ...[true, true, false, true, false, true],
    ]);
  });

  test('1B says it as older files do, and as newer ones', () => {
    const { rope_local_base_freq: _, rope_theta: __, rope_scaling: ___, ...rest } = READS_TEXT;
    const newer = {
      ...rest,
      rope_parameters: {
        full_attention: { rope_type: 'default', rope_theta: 1_000_000 },
        sliding_attention: { rope_type: 'default', rope_theta: 10_000 },
      },
    };
    expect(configFromHuggingFace(newer)).toEqual(configFromHuggingFace(READS_TEXT));
    const dense = { sliding_window: null, layer_types: Array(26).fill('full_attention') };
    const config = configFromHuggingFace({ ...newer, ...dense });
    expect([config.slidingWindow, config.localRope]).toEqual([undefined, undefined]);
  });

  test('27B is the same from GGUF, which does not say by what scores are divided', () => {
    const sizes = { hidden_size: 5376, intermediate_size: 21_504, num_hidden_layers: 62, head_dim: 128 };
    const text_config = {
      ...{ ...READS_IMAGES.text_config, ...sizes, num_attention_heads: 32, num_key_value_heads: 16 },
      query_pre_attn_scalar: 168,
    };
    expect(fromGguf({ 'rope.freq_base': 1e6 })).toEqual(
      configFromHuggingFace({ ...READS_IMAGES, text_config }),
    );
  });

  test('the bases of rotary embedding are the same in GGUF whoever wrote it, and 1,000,000 and 10,000 unless it has them', () => {
    const bases = (names: Record<string, number>) => {
      const { ropeTheta, localRope } = fromGguf(names);
      return [ropeTheta, localRope?.theta];
    };
    expect(bases({ 'rope.freq_base': 5e5, 'rope.freq_base_swa': 2e4 })).toEqual([5e5, 2e4]);
    expect(bases({ 'rope.global.freq_base': 5e5, 'rope.local.freq_base': 2e4 })).toEqual([5e5, 2e4]);
    expect(bases({})).toEqual([1e6, 1e4]);
  });

  test("YaRN's factors are the same in GGUF whoever wrote them, and other names beside them are refused", () => {
    const yarn = { 'rope.scaling.type': 'yarn', 'rope.scaling.original_context_length': 32_768 };
    const scaled = (fields: Record<string, number>) => fromGguf({ ...yarn, ...fields }).ropeScaling;
    const expected = { type: 'yarn', factor: 8, originalContextTokens: 32_768, betaFast: 64, betaSlow: 2 };
    expect(scaled({ 'rope.scaling.yarn_beta_fast': 64, 'rope.scaling.yarn_beta_slow': 2 })).toMatchObject(
      expected,
    );
    const byOllama = {
      ...{ 'rope.scaling.beta_fast': 64, 'rope.scaling.beta_slow': 2 },
      'rope.scaling.extrapolation_factor': 1,
    };
    expect(scaled(byOllama)).toMatchObject(expected);
    expect(scaled({})).toMatchObject({ betaFast: 32, betaSlow: 1 });
    expect(() => scaled({ ...byOllama, 'rope.scaling.extrapolation_factor': 0.5 })).toThrow(
      'rope scaling with extrapolation_factor',
    );
    expect(() => scaled({ 'rope.scaling.mscale_all_dim': 1 })).toThrow('rope scaling with mscale_all_dim');
  });

  test.each([
    ['as on the hub', (name: string) => `language_model.${name}`, 'vision_tower.x.weight'],
    [
      'as transformers writes them now',
      (name: string) => name.replace(/^model\./, 'model.language_model.'),
      'model.multi_modal_projector.x.weight',
    ],
  ])('the part that reads text is read alone, with names %s', async (_, nameOf, ofImages) => {
    const folder = await mkdtemp(path.join(tmpdir(), 'maskroute-gemma-'));
    try {
      const source = randomLlama(asGemma());
      const named = new Map(
        [...(await storedTensors(source))].map(([name, tensor]) => [nameOf(name), tensor] as const),
      );
      named.set(ofImages, { shape: [1], data: Float32Array.of(1) });
      for (const [name, bytes] of Object.entries(safetensorsFiles(named, 2)))
        await writeFile(path.join(folder, name), bytes);
      const json = { model_type: 'gemma3', text_config: hubConfig(source.config) };
      await writeFile(path.join(folder, 'config.json'), JSON.stringify(json));
      await using opened = await openFolder(folder);
      expect(opened.config).toEqual(source.config);
      for (const { name } of decoderTensors(source.config))
        expect(furthest(await opened.read(name), await source.read(name)), name).toBeLessThan(1e-6);
    } finally {
      await rm(folder, { recursive: true });
    }
  });
});

async function openFolder(folder: string) {
  const opened = await openSafetensorsFolder(folder);
  return { ...opened, [Symbol.asyncDispose]: () => opened.close() };
}

test('rotary tables of gigabytes are refused: a small file can ask for them', () => {
  const config = { ...figures.variants[0]!.config, hidden_size: 16, num_attention_heads: 1 };
  const asking = (head_dim: number) =>
    configFromHuggingFace({ ...config, num_key_value_heads: 1, head_dim, max_position_embeddings: 2 ** 20 });
  expect(asking(256).headSize).toBe(256);
  expect(() => asking(512)).toThrow(/rotary tables of 1048576 positions and 512 dimensions/);
});
