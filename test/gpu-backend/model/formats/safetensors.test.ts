/** Safetensors files and folders: what they give, and what is refused. */
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import fc from 'fast-check';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { openSafetensorsFolder } from '../../../../gpu-backend/model/formats/hf-folder.ts';
import { openSafetensors } from '../../../../gpu-backend/model/formats/safetensors.ts';
import { tokenizerFromFolder } from '../../../../gpu-backend/model/tokenizer/hf-tokenizer.ts';
import { MaskrouteError } from '../../../../shared/wire/errors.ts';
import type { TensorEntry } from '../../../support/safetensors.ts';
import { TINY_CONFIG_JSON, tinyFolder, tinyWeights, writeSafetensors } from '../../../support/safetensors.ts';

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(path.join(tmpdir(), 'maskroute-safetensors-'));
});
afterEach(() => rm(folder, { recursive: true }));

async function openBytes(bytes: Uint8Array) {
  const file = path.join(folder, 'x.safetensors');
  await writeFile(file, bytes);
  return openSafetensors(file);
}

const two = new Map([
  ['a', { shape: [2, 3], data: Float32Array.of(1, 2, 3, 4, 5, 6) }],
  ['b', { shape: [2], data: Float32Array.of(7, 8) }],
]);
const lying = (changes: Record<string, Partial<TensorEntry>>) => writeSafetensors(two, changes);
/** A file whose header is this text. */
function withHeader(text: string, announced = BigInt(text.length)): Uint8Array {
  const bytes = new Uint8Array(8 + text.length + 32);
  new DataView(bytes.buffer).setBigUint64(0, announced, true);
  bytes.set(new TextEncoder().encode(text), 8);
  return bytes;
}

describe('openSafetensors', () => {
  test('gives names, shapes and values', async () => {
    const file = await openBytes(writeSafetensors(two));
    expect(file.names).toEqual(['a', 'b']);
    expect(file.shape('a')).toEqual([2, 3]);
    expect([file.has('b'), file.has('c')]).toEqual([true, false]);
    expect([...(await file.read('a')), ...(await file.read('b'))]).toEqual([1, 2, 3, 4, 5, 6, 7, 8]);
    await file.close();
  });

  test.each([
    ['BF16', 0x3fc0, 1.5],
    ['F16', 0x3e00, 1.5],
  ])('reads %s', async (dtype, bits, value) => {
    const bytes = lying({ a: { dtype, shape: [4, 3] } });
    const start = bytes.length - 32;
    new DataView(bytes.buffer).setUint16(start, bits, true);
    const file = await openBytes(bytes);
    expect((await file.read('a'))[0]).toBe(value);
    await file.close();
  });

  test.each<[string, Uint8Array, RegExp]>([
    ['an empty file', new Uint8Array(0), /inside its header/],
    ['a header of 2^63 bytes', withHeader('{}', 2n ** 63n), /header claims/],
    ['a header longer than the file', withHeader('{}', 100n), /header claims/],
    ['a header that is not JSON', withHeader('{"a":'), /not JSON/],
    ['a header that is a list', withHeader('[1]'), /not a JSON object/],
    [
      'a deeply nested header',
      withHeader(`${'['.repeat(100_000)}${']'.repeat(100_000)}`),
      /not JSON|not a JSON object/,
    ],
    ['an entry without offsets', withHeader('{"a":{"dtype":"F32","shape":[1]}}'), /malformed/],
    ['a negative dimension', lying({ a: { shape: [-2, -3] } }), /malformed/],
    ['a dimension of 1e300', lying({ a: { shape: [1e300] } }), /malformed/],
    ['dimensions that overflow', lying({ a: { shape: [2 ** 31, 2 ** 31] } }), /elements/],
    ['a shape that is not its bytes', lying({ a: { shape: [3, 3] } }), /not its shape/],
    ['offsets past the end', lying({ b: { data_offsets: [24, 40] } }), /outside the file/],
    ['offsets in reverse', lying({ b: { data_offsets: [32, 24] } }), /outside the file/],
    ['tensors that overlap', lying({ b: { data_offsets: [16, 24] } }), /overlap/],
    ['a truncated file', writeSafetensors(two).subarray(0, -4), /truncated/],
  ])('refuses %s', async (_, bytes, reason) => {
    await expect(openBytes(bytes)).rejects.toMatchObject({
      code: 'corrupt_model',
      message: expect.stringMatching(reason),
    });
  });

  test('lists other types and refuses to read them', async () => {
    const file = await openBytes(lying({ a: { dtype: 'I32' }, b: { dtype: 'constructor' } }));
    expect(file.names).toContain('a');
    await expect(file.read('a')).rejects.toMatchObject({ code: 'unsupported_model' });
    await file.close();
  });

  test('with bytes changed, what is read is as long as the file says, and everything else has a code', async () => {
    const whole = writeSafetensors(two);
    const outcomes = { read: 0, refused: 0 };
    const change = fc.record({ at: fc.nat(whole.length - 1), byte: fc.nat(255) });
    await fc.assert(
      fc.asyncProperty(fc.array(change, { minLength: 1, maxLength: 3 }), async (changes) => {
        const bytes = whole.slice();
        for (const { at, byte } of changes) bytes[at] = byte;
        try {
          const file = await openBytes(bytes);
          for (const name of file.names) {
            const elements = file.shape(name).reduce((product, length) => product * length, 1);
            expect(await file.read(name)).toHaveLength(elements);
          }
          await file.close();
          outcomes.read++;
        } catch (error) {
          if (!(error instanceof MaskrouteError)) throw error;
          outcomes.refused++;
        }
      }),
      { seed: 3, numRuns: 300 },
    );
    // Most of this small file is its header.
    expect(outcomes.read).toBeGreaterThan(10);
    expect(outcomes.refused).toBeGreaterThan(10);
  });
});

async function writeFolder(changes: Record<string, unknown> = {}): Promise<void> {
  for (const [name, value] of Object.entries({ ...(await tinyFolder()), ...changes })) {
    if (value === undefined) continue;
    await writeFile(path.join(folder, name), value instanceof Uint8Array ? value : JSON.stringify(value));
  }
}

describe('openSafetensorsFolder', () => {
  test('reads several files by their index, whatever the order', async () => {
    const weights = [...tinyWeights()];
    const parts = [weights.slice(10), weights.slice(0, 10)];
    const names = ['model-00002-of-00002.safetensors', 'model-00001-of-00002.safetensors'];
    const map = Object.fromEntries(parts.flatMap((part, i) => part.map(([name]) => [name, names[i]])));
    await writeFolder({
      'model.safetensors': undefined,
      'model.safetensors.index.json': { weight_map: map },
      [names[0]!]: writeSafetensors(new Map(parts[0])),
      [names[1]!]: writeSafetensors(new Map(parts[1])),
    });
    const model = await openSafetensorsFolder(folder);
    expect(model.weightFiles.map((file) => path.basename(file))).toEqual(names.toSorted());
    expect(await model.read('model.norm.weight')).toEqual(tinyWeights().get('model.norm.weight')!.data);
    await model.close();
  });

  test('ignores what a tied head and old files repeat', async () => {
    const weights = tinyWeights();
    weights.set('lm_head.weight', weights.get('model.embed_tokens.weight')!);
    weights.set('model.layers.0.self_attn.rotary_emb.inv_freq', { shape: [8], data: new Float32Array(8) });
    await writeFolder({ 'model.safetensors': writeSafetensors(weights) });
    const model = await openSafetensorsFolder(folder);
    expect(() => model.shape('lm_head.weight')).toThrow('no tensor lm_head.weight');
    await model.close();
  });

  const sharded = (index: object) => ({
    'model.safetensors': undefined,
    'model.safetensors.index.json': index,
  });
  const config = (change: object) => ({ 'config.json': { ...TINY_CONFIG_JSON, ...change } });
  type Tensor = { shape: readonly number[]; data: Float32Array };
  const withHead = (change: (embedding: Tensor) => Tensor) => {
    const weights = tinyWeights();
    weights.set('lm_head.weight', change(weights.get('model.embed_tokens.weight')!));
    return writeSafetensors(weights);
  };
  test.each<[string, Record<string, unknown>, string, RegExp]>([
    [
      'another architecture',
      config({ model_type: 'gemma2' }),
      'unsupported_model',
      /"gemma2" \(supported: llama, mistral/,
    ],
    [
      'rope scaling of another kind',
      config({ rope_scaling: { rope_type: 'longrope', factor: 8 } }),
      'unsupported_model',
      /"longrope"/,
    ],
    [
      'rope scaling without its figures',
      config({ rope_parameters: { rope_type: 'yarn', factor: 'x' } }),
      'corrupt_model',
      /factor/,
    ],
    [
      'rope settings of an older and a newer file, which differ',
      config({
        rope_parameters: { rope_type: 'default', rope_theta: 1e6 },
        rope_scaling: { rope_type: 'yarn', factor: 4 },
      }),
      'unsupported_model',
      /rope_scaling and rope_parameters/,
    ],
    [
      'partial rotary in an older file',
      config({ rope_scaling: { rope_type: 'linear', factor: 2, partial_rotary_factor: 0.5 } }),
      'unsupported_model',
      /partial_rotary_factor 0.5/,
    ],
    [
      'a tied head with weights of its own',
      { 'model.safetensors': withHead(({ shape, data }) => ({ shape, data: data.with(-1, 7) })) },
      'unsupported_model',
      /head and its embedding differ/,
    ],
    [
      'a tied head with fewer rows',
      {
        'model.safetensors': withHead(({ shape: [rows, width], data }) => ({
          shape: [rows! - 1, width!],
          data: data.slice(width),
        })),
      },
      'unsupported_model',
      /head and its embedding differ/,
    ],
    [
      'longrope by an older name',
      config({ model_type: 'phi3', rope_scaling: { type: 'su', short_factor: [1], long_factor: [2] } }),
      'unsupported_model',
      /rope scaling "longrope"/,
    ],
    [
      'partial rotary',
      config({ model_type: 'phi3', partial_rotary_factor: 0.75 }),
      'unsupported_model',
      /partial_rotary_factor 0.75/,
    ],
    [
      'logits divided by 0',
      config({ model_type: 'granite', logits_scaling: 0 }),
      'corrupt_model',
      /factors\.logits/,
    ],
    [
      'soft-capping',
      config({ model_type: 'gemma3_text', final_logit_softcapping: 30 }),
      'unsupported_model',
      /soft-capping \(final_logit_softcapping\)/,
    ],
    [
      'attention to later tokens, as of embedding models',
      config({ model_type: 'gemma3_text', use_bidirectional_attention: true }),
      'unsupported_model',
      /later tokens/,
    ],
    [
      'a Gemma with another activation',
      config({ model_type: 'gemma3_text', hidden_activation: 'silu' }),
      'unsupported_model',
      /the activation "silu"/,
    ],
    [
      'scaled rotary in layers with a window',
      config({ model_type: 'gemma3_text', rope_parameters: { sliding_attention: { rope_type: 'linear' } } }),
      'unsupported_model',
      /"linear" in layers with a sliding window/,
    ],
    [
      'partial rotary in some layers',
      config({
        model_type: 'gemma3_text',
        rope_parameters: { full_attention: { partial_rotary_factor: 0.25 } },
      }),
      'unsupported_model',
      /partial_rotary_factor 0.25/,
    ],
    [
      'a stack that is not there',
      config({ model_type: 'phi3' }),
      'corrupt_model',
      /qkv_proj.weight is missing/,
    ],
    ['biases of the FFN', config({ mlp_bias: true }), 'unsupported_model', /biases/],
    ['a bias that is not there', config({ attention_bias: true }), 'corrupt_model', /q_proj.bias is missing/],
    [
      'weights quantized otherwise',
      config({ quantization_config: {} }),
      'unsupported_model',
      /quantization_config/,
    ],
    ['another activation', config({ hidden_act: 'gelu' }), 'unsupported_model', /"gelu"/],
    ['a width that is text', config({ hidden_size: '64' }), 'corrupt_model', /hidden_size/],
    ['a width that is not the weights’', config({ hidden_size: 32 }), 'corrupt_model', /expected \[/],
    ['no configuration', { 'config.json': [1] }, 'corrupt_model', /not a JSON object/],
    ['no weights', sharded({ weight_map: {} }), 'corrupt_model', /names no files/],
    [
      'an index that points out of the folder',
      sharded({ weight_map: { x: '../../etc/model.safetensors' } }),
      'corrupt_model',
      /which is not there/,
    ],
  ])('refuses %s', async (_, changes, code, reason) => {
    await writeFolder(changes);
    await expect(openSafetensorsFolder(folder)).rejects.toMatchObject({
      code,
      message: expect.stringMatching(reason),
    });
  });
});

describe('tokenizerFromFolder', () => {
  test('takes the template and the ends of answers from wherever they stand', async () => {
    await writeFolder({
      'generation_config.json': { eos_token_id: [2, 5] },
      'tokenizer_config.json': {
        bos_token: '<|im_start|>',
        chat_template: [
          { name: 'tool_use', template: 'tools' },
          { name: 'default', template: 'plain' },
        ],
      },
    });
    const imported = await tokenizerFromFolder(folder, 265);
    expect(imported).toMatchObject({
      chatTemplate: 'plain',
      eosTokenIds: [2, 5, 0],
      bosTokenId: 1,
      addBos: false,
    });
    await writeFile(path.join(folder, 'chat_template.jinja'), 'from its own file');
    expect((await tokenizerFromFolder(folder, 265)).chatTemplate).toBe('from its own file');
  });

  test('takes an empty template for none', async () => {
    for (const chat_template of ['', [{ name: 'default', template: '' }]]) {
      await writeFolder({ 'tokenizer_config.json': { chat_template } });
      await writeFile(path.join(folder, 'chat_template.jinja'), '');
      expect((await tokenizerFromFolder(folder, 265)).chatTemplate).toBe(null);
    }
  });

  test('the end that the tokenizer names comes first: templates write it, and rows to learn from end with it', async () => {
    await writeFolder({
      'generation_config.json': { eos_token_id: [0, 5, 2] },
      'tokenizer_config.json': { eos_token: { content: '<|im_end|>' } },
    });
    expect((await tokenizerFromFolder(folder, 265)).eosTokenIds).toEqual([2, 0, 5]);
  });

  test('takes BOS and EOS from special_tokens_map.json where tokenizer_config.json is silent', async () => {
    await writeFolder({
      'tokenizer_config.json': { eos_token: '<|im_end|>' },
      'special_tokens_map.json': { bos_token: { content: '<|im_start|>' }, eos_token: '<|im_start|>' },
    });
    expect(await tokenizerFromFolder(folder, 265)).toMatchObject({
      bosTokenId: 1,
      eosTokenIds: [2, 0],
    });
  });

  test('refuses a kind of merging that it does not know, by its name', async () => {
    const json = JSON.parse(Buffer.from((await tinyFolder())['tokenizer.json']!).toString());
    json.model.end_of_word_suffix = '</w>';
    await writeFolder({ 'tokenizer.json': json });
    await expect(tokenizerFromFolder(folder, 265)).rejects.toMatchObject({
      code: 'unsupported_model',
      message: expect.stringContaining('ends of words'),
    });
  });

  test('refuses a pre-tokenizer that is a sequence of nothing', async () => {
    const json = JSON.parse(Buffer.from((await tinyFolder())['tokenizer.json']!).toString());
    json.pre_tokenizer = { type: 'Sequence', pretokenizers: 5 };
    await writeFolder({ 'tokenizer.json': json });
    await expect(tokenizerFromFolder(folder, 265)).rejects.toMatchObject({
      code: 'unsupported_model',
      message: expect.stringContaining('a sequence without parts'),
    });
  });

  test('a Gemma that reads text alone has no row for the token of images', async () => {
    const json = JSON.parse(Buffer.from((await tinyFolder())['tokenizer.json']!).toString());
    const withToken = (content: string) => ({
      'tokenizer.json': {
        ...json,
        added_tokens: [...json.added_tokens, { ...json.added_tokens[0], id: 265, content }],
      },
    });
    await writeFolder(withToken('<image_soft_token>'));
    const { tokenizerJson } = await tokenizerFromFolder(folder, 265);
    expect(tokenizerJson.added_tokens).toEqual(json.added_tokens);
    expect((await tokenizerFromFolder(folder, 266)).tokenizerJson.added_tokens).toHaveLength(
      json.added_tokens.length + 1,
    );
    await writeFolder(withToken('<another>'));
    await expect(tokenizerFromFolder(folder, 265)).rejects.toThrow(/id 265, its embedding 265 rows/);
  });

  test('refuses a tokenizer with more ids than rows, of another kind, or none', async () => {
    await writeFolder();
    await expect(tokenizerFromFolder(folder, 200)).rejects.toThrow(/id 264, its embedding 200 rows/);
    await writeFolder({ 'tokenizer.json': { model: { type: 'Unigram', vocab: [] }, decoder: null } });
    await expect(tokenizerFromFolder(folder, 265)).rejects.toMatchObject({ code: 'unsupported_model' });
    await rm(path.join(folder, 'tokenizer.json'));
    await expect(tokenizerFromFolder(folder, 265)).rejects.toThrow(/no tokenizer.json/);
  });
});
