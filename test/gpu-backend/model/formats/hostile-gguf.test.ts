/**
 * Files that lie. Whatever a file says, the answer is a MaskrouteError or a model, within two seconds and within
 * memory in proportion to the file; any other exception is a bug.
 */
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { decoderTensors } from '../../../../gpu-backend/model/families.ts';
import { openGguf } from '../../../../gpu-backend/model/formats/gguf.ts';
import { tokenizerFromGguf } from '../../../../gpu-backend/model/tokenizer/gguf-tokenizer.ts';
import { MaskrouteError } from '../../../../shared/wire/errors.ts';
import { appendBytes } from '../../../support/bytes.ts';
import type { GgufParts, Value } from '../../../support/gguf.ts';
import { floats, tinyLlama, writeGguf } from '../../../support/gguf.ts';

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(path.join(tmpdir(), 'maskroute-hostile-'));
});
afterAll(() => rm(folder, { recursive: true }));

let count = 0;
/** What an import would read of a file. Resolves with the error that it met, if any. */
async function readAll(bytes: Uint8Array): Promise<MaskrouteError | undefined> {
  const file = path.join(folder, `${count++}.gguf`);
  await writeFile(file, bytes);
  const before = process.cpuUsage();
  try {
    const model = await openGguf(file);
    try {
      for (const tensor of decoderTensors(model.config)) await model.read(tensor.name);
      tokenizerFromGguf(model.metadata, model.config.vocabularySize);
    } finally {
      await model.close();
    }
    return undefined;
  } catch (error) {
    if (error instanceof MaskrouteError) return error;
    throw error;
  } finally {
    const { user, system } = process.cpuUsage(before);
    expect((user + system) / 1000, 'ms of the processor').toBeLessThan(2000);
    await rm(file);
  }
}

/** A header written by hand, followed by `tail` zeros. */
function header(write: (to: ReturnType<typeof appendBytes>) => void, tail = 0): Uint8Array {
  const bytes: number[] = [0x47, 0x47, 0x55, 0x46];
  write(appendBytes(bytes));
  return Uint8Array.from([...bytes, ...new Uint8Array(tail)]);
}

const tiny = (changes?: Parameters<typeof tinyLlama>[0], parts: Partial<GgufParts> = {}) =>
  writeGguf({ ...tinyLlama(changes), ...parts });
const with_ = (key: string, value: Value | undefined) => tiny({ metadata: { [key]: value } });
const u32 = (value: number): Value => ({ type: 'u32', value });
const text = (value: string): Value => ({ type: 'string', value });

/** The tiny file as a Granite's. */
function granite(more: Readonly<Record<string, Value>>): Uint8Array {
  const { metadata, tensors } = tinyLlama();
  const own = Array.from(metadata, ([key, value]) => [key.replace(/^llama\./, 'granite.'), value] as const);
  const changed = new Map([...own, ['general.architecture', text('granite')], ...Object.entries(more)]);
  return writeGguf({ metadata: changed, tensors });
}

/** The tiny file with one tensor changed. */
function withTensor(name: string, change: Partial<GgufParts['tensors'][number]>): Uint8Array {
  const { metadata, tensors } = tinyLlama();
  return writeGguf({
    metadata,
    tensors: tensors.map((tensor) => (tensor.name === name ? { ...tensor, ...change } : tensor)),
  });
}

const ropeFactors = (value: number) => ({
  name: 'rope_freqs.weight',
  shape: [8],
  type: 0,
  data: floats(new Float32Array(8).fill(value)),
});

describe('a header that lies', () => {
  test.each<[string, Uint8Array, RegExp]>([
    ['an empty file', new Uint8Array(0), /not a GGUF file/],
    ['another kind of file', new TextEncoder().encode('PK\u0003\u0004'.repeat(20)), /not a GGUF file/],
    ['version 1', header((to) => to.u32(1), 40), /version 1/],
    ['version 99', header((to) => to.u32(99), 40), /version 99/],
    ['big-endian', header((to) => to.u32(0x03000000), 40), /big-endian/],
    ['2^63 tensors', header((to) => to.u32(3).u64(2n ** 63n), 40), /number of tensors/],
    ['more tensors than bytes', header((to) => to.u32(3).u64(5000).u64(0), 40), /number of tensors/],
    [
      '2^60 entries',
      header(
        (to) =>
          to
            .u32(3)
            .u64(0)
            .u64(2n ** 60n),
        40,
      ),
      /number of metadata/,
    ],
    ['a key of gigabytes', header((to) => to.u32(3).u64(0).u64(1).u64(4e9), 40), /length of a metadata key/],
    [
      'a value of gigabytes',
      header((to) => to.u32(3).u64(0).u64(1).text('general.name').u32(8).u64(3e9), 40),
      /length of the metadata value "general.name"/,
    ],
    [
      'an array of 2^40 numbers',
      header(
        (to) =>
          to
            .u32(3)
            .u64(0)
            .u64(1)
            .text('x')
            .u32(9)
            .u32(0)
            .u64(2n ** 40n),
        40,
      ),
      /length of "x"/,
    ],
    [
      'arrays in arrays',
      header((to) => to.u32(3).u64(0).u64(1).text('x').u32(9).u32(9).u64(1), 40),
      /nests arrays/,
    ],
    [
      'an unknown value type',
      header((to) => to.u32(3).u64(0).u64(1).text('x').u32(77), 40),
      /unknown type 77/,
    ],
    [
      'a key twice',
      header((to) => {
        to.u32(3);
        to.u64(0);
        to.u64(2);
        for (let i = 0; i < 2; i++) to.text('x').u32(4).u32(1);
      }, 40),
      /"x" comes twice/,
    ],
    ['alignment 0', with_('general.alignment', u32(0)), /general.alignment/],
    ['alignment 48', with_('general.alignment', u32(48)), /general.alignment/],
    ['alignment 2^40', with_('general.alignment', { type: 'u64', value: 2n ** 40n }), /general.alignment/],
    ['a dimension of 0', withTensor('output_norm.weight', { shape: [0] }), /0 elements/],
    ['a dimension of 2^33', withTensor('output_norm.weight', { shape: [2 ** 33] }), /dimension of tensor/],
    ['dimensions that overflow', withTensor('output_norm.weight', { shape: [2 ** 31, 2 ** 31] }), /elements/],
    ['five dimensions', withTensor('output_norm.weight', { shape: [1, 1, 1, 1, 64] }), /5 dimensions/],
    ['an offset past the end', withTensor('output_norm.weight', { offset: 2n ** 30n }), /truncated/],
    ['an offset of 2^63', withTensor('output_norm.weight', { offset: 2n ** 63n }), /offset of tensor/],
    ['an offset that is not aligned', withTensor('output_norm.weight', { offset: 4n }), /not aligned/],
    ['tensors that overlap', withTensor('output_norm.weight', { offset: 0n }), /overlap/],
    [
      'a type that does not exist',
      withTensor('output_norm.weight', { type: 250 }),
      /number 250 \(supported: F32/,
    ],
    ['a type that we do not read', withTensor('output_norm.weight', { type: 16 }), /IQ2_XXS/],
    [
      'rows that do not fill blocks',
      withTensor('output_norm.weight', { type: 12 }),
      /do not fill Q4_K blocks/,
    ],
  ])('%s', async (_, bytes, reason) => {
    const error = await readAll(bytes);
    expect(error?.message).toMatch(reason);
    expect(['corrupt_model', 'unsupported_model']).toContain(error?.code);
  });
});

describe('a model that contradicts itself or asks for what we do not compute', () => {
  test.each<[string, Uint8Array, string, RegExp]>([
    [
      'another architecture',
      with_('general.architecture', text('gemma2')),
      'unsupported_model',
      /"gemma2" \(supported: llama, mistral/,
    ],
    [
      'soft-capping',
      with_('llama.final_logit_softcapping', { type: 'f32', value: 30 }),
      'unsupported_model',
      /soft-capping \(final_logit_softcapping\)/,
    ],
    ['no architecture', with_('general.architecture', undefined), 'unsupported_model', /"none"/],
    [
      'a missing width',
      with_('llama.embedding_length', undefined),
      'corrupt_model',
      /embedding_length is missing/,
    ],
    [
      'a width of 10^9',
      with_('llama.embedding_length', u32(1e9)),
      'unsupported_model',
      /hiddenSize is 1000000000/,
    ],
    ['no layers', with_('llama.block_count', u32(0)), 'corrupt_model', /layerCount/],
    [
      'more layers than tensors',
      with_('llama.block_count', u32(3)),
      'corrupt_model',
      /blk\.2\..* is missing/,
    ],
    ['a context of 2^31', with_('llama.context_length', u32(2 ** 31)), 'unsupported_model', /contextTokens/],
    ['heads that do not divide', with_('llama.attention.head_count_kv', u32(3)), 'corrupt_model', /evenly/],
    ['zero heads', with_('llama.attention.head_count', u32(0)), 'corrupt_model', /headSize|headCount/],
    [
      'longrope',
      with_('llama.rope.scaling.type', text('longrope')),
      'unsupported_model',
      /rope scaling "longrope"/,
    ],
    [
      'longrope by its factors',
      tiny(
        {},
        { tensors: [...tinyLlama().tensors, { ...ropeFactors(2), name: 'rope_factors_long.weight' }] },
      ),
      'unsupported_model',
      /longrope/,
    ],
    [
      'a Granite without rotary',
      granite({ 'granite.rope.scaling.finetuned': { type: 'bool', value: false } }),
      'unsupported_model',
      /rope.scaling.finetuned/,
    ],
    ['a Granite without its divisor', granite({}), 'corrupt_model', /granite.logit_scale is missing/],
    [
      'partial rotary',
      with_('llama.rope.dimension_count', u32(8)),
      'unsupported_model',
      /8 of 16 dimensions/,
    ],
    ['experts', with_('llama.expert_count', u32(8)), 'unsupported_model', /8 experts/],
    [
      'one part of several under another name',
      with_('split.count', u32(3)),
      'corrupt_model',
      /one of 3 parts/,
    ],
    [
      'rope factors of zero',
      tiny({}, { tensors: [...tinyLlama().tensors, ropeFactors(0)] }),
      'corrupt_model',
      /ropeScaling/,
    ],
    [
      'rope factors and a rope scaling',
      tiny(
        { metadata: { 'llama.rope.scaling.factor': { type: 'f32', value: 4 } } },
        { tensors: [...tinyLlama().tensors, ropeFactors(2)] },
      ),
      'unsupported_model',
      /rope factors and the rope scaling "linear"/,
    ],
    [
      'a missing tensor',
      tiny({ tensors: tinyLlama().tensors.slice(0, -1) }),
      'corrupt_model',
      /output_norm.weight is missing/,
    ],
    [
      'a misshapen tensor',
      withTensor('blk.0.attn_v.weight', { shape: [64, 32] }),
      'corrupt_model',
      /\[64,32\], expected \[32,64\]/,
    ],
    [
      'a weight that is NaN',
      withTensor('output_norm.weight', { data: floats(new Float32Array(64).fill(Number.NaN)) }),
      'corrupt_model',
      /not finite/,
    ],
    [
      'an infinite weight',
      withTensor('output_norm.weight', { data: floats(new Float32Array(64).fill(Infinity)) }),
      'corrupt_model',
      /not finite/,
    ],
    ['no tokenizer', with_('tokenizer.ggml.model', undefined), 'unsupported_model', /no tokenizer/],
    [
      'a tokenizer of another kind',
      with_('tokenizer.ggml.model', text('rwkv')),
      'unsupported_model',
      /"rwkv"/,
    ],
    [
      'an unknown pre-tokenizer',
      with_('tokenizer.ggml.pre', text('nobody')),
      'unsupported_model',
      /"nobody" \(supported: gpt-2/,
    ],
    [
      'a token twice',
      with_('tokenizer.ggml.tokens', { type: 'strings', value: ['a', 'a'] }),
      'corrupt_model',
      /has the ids 0 and 1/,
    ],
    [
      'more tokens than rows',
      with_('tokenizer.ggml.tokens', {
        type: 'strings',
        value: Array.from({ length: 266 }, (_, i) => `t${i}`),
      }),
      'corrupt_model',
      /266 tokens/,
    ],
    [
      'a merge into nothing',
      with_('tokenizer.ggml.merges', { type: 'strings', value: ['q z'] }),
      'corrupt_model',
      /"q z"/,
    ],
    [
      'an end outside the vocabulary',
      with_('tokenizer.ggml.eos_token_id', u32(9999)),
      'corrupt_model',
      /eos_token_id/,
    ],
  ])('%s', async (_, bytes, code, reason) => {
    const error = await readAll(bytes);
    expect(error?.message).toMatch(reason);
    expect(error?.code).toBe(code);
  });

  test('a token of that name does no harm', async () => {
    const { metadata } = tinyLlama();
    const tokens = [...(metadata.get('tokenizer.ggml.tokens') as { value: readonly string[] }).value];
    tokens[264] = '__proto__';
    metadata.set('tokenizer.ggml.tokens', { type: 'strings', value: tokens });
    metadata.set('tokenizer.ggml.merges', { type: 'strings', value: [] });
    metadata.set('__proto__', text('x'));
    expect(await readAll(writeGguf({ ...tinyLlama(), metadata }))).toBeUndefined();
  });
});

describe('a damaged file', () => {
  const whole = tiny();

  test('whole, it is read', async () => {
    expect(await readAll(whole)).toBeUndefined();
  });

  test('cut anywhere, it is refused', async () => {
    for (let end = 0; end < whole.length; end = Math.ceil(end * 1.15) + 1) {
      expect((await readAll(whole.subarray(0, end)))?.code, `cut at ${end}`).toBe('corrupt_model');
    }
    expect((await readAll(whole.subarray(0, whole.length - 1)))?.message).toMatch(/truncated/);
  });

  const headerEnd = 12_000;
  const mutation = fc.record({
    at: fc.nat(headerEnd),
    bytes: fc.oneof(
      fc.uint8Array({ minLength: 1, maxLength: 8 }),
      // Sizes: the extremes of 32 and 64 bits are what loops and allocations trip over.
      fc
        .constantFrom(0n, 1n, 2n ** 31n, 2n ** 32n - 1n, 2n ** 53n, 2n ** 63n, 2n ** 64n - 1n)
        .map((value) => {
          const bytes = new Uint8Array(8);
          new DataView(bytes.buffer).setBigUint64(0, value, true);
          return bytes;
        }),
    ),
  });

  test('with bytes changed, it is refused or read', async () => {
    await fc.assert(
      fc.asyncProperty(fc.array(mutation, { minLength: 1, maxLength: 4 }), async (mutations) => {
        const bytes = whole.slice();
        for (const { at, bytes: change } of mutations) bytes.set(change.subarray(0, bytes.length - at), at);
        await readAll(bytes);
      }),
      { seed: 20240817, numRuns: 400 },
    );
    expect(process.resourceUsage().maxRSS / 1024).toBeLessThan(1024);
  });
});
