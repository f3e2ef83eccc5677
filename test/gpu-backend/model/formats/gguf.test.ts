/** What GGUF files give: checked against the tiny file's known content and, for the real one, another reader. */
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { gguf } from '@huggingface/gguf';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { decoderTensors, toHalfSplitRotary } from '../../../../gpu-backend/model/families.ts';
import { openGguf } from '../../../../gpu-backend/model/formats/gguf.ts';
import { ggufParts, readAll } from '../../../support/family-files.ts';
import { type GgufParts, splitGguf, type Tensor, tinyLlama, writeGguf } from '../../../support/gguf.ts';
import { testModelFile } from '../../../support/installed-model.ts';
import { asGemma, randomLlama } from '../../../support/random-llama.ts';

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(path.join(tmpdir(), 'maskroute-gguf-'));
});
afterAll(() => rm(folder, { recursive: true }));

async function openBytes(bytes: Uint8Array) {
  const file = path.join(folder, 'model.gguf');
  await writeFile(file, bytes);
  return openGguf(file);
}

describe('openGguf', () => {
  test.each([2, 3])('reads configuration, names and shapes of version %i', async (version) => {
    const model = await openBytes(writeGguf({ ...tinyLlama(), version }));
    expect(model.config).toEqual({
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
    });
    expect(model.shape('model.layers.1.mlp.down_proj.weight')).toEqual([64, 128]);
    expect(() => model.shape('lm_head.weight')).toThrow('no tensor lm_head.weight');
    await model.close();
  });

  test.each([
    [0, undefined],
    [16, { tokens: 16, layers: [0, 1] }],
    [128, undefined],
  ])('a sliding window of %i tokens where the context has 128', async (value, slidingWindow) => {
    const metadata = { 'llama.attention.sliding_window': { type: 'u32', value } } as const;
    const model = await openBytes(writeGguf(tinyLlama({ metadata })));
    expect(model.config.slidingWindow).toEqual(slidingWindow);
    await model.close();
  });

  test('gives Q and K in half-split order and everything else as it is stored', async () => {
    const model = await openBytes(writeGguf(tinyLlama()));
    const q = await model.read('model.layers.0.self_attn.q_proj.weight');
    const v = await model.read('model.layers.0.self_attn.v_proj.weight');
    const stored = (i: number) => Math.fround(((i * 7919) % 1013) / 1013 - 0.5);
    // Head 1, pair 3: its first row is stored at 16 + 6 and comes out at 16 + 3, its second at 16 + 8 + 3.
    expect(q[(16 + 3) * 64 + 5]).toBe(stored((16 + 6) * 64 + 5));
    expect(q[(16 + 8 + 3) * 64 + 5]).toBe(stored((16 + 7) * 64 + 5));
    expect(v[7 * 64 + 5]).toBe(stored(7 * 64 + 5));
    await model.close();
  });

  test('reads an untied output matrix', async () => {
    const parts = tinyLlama();
    const embedding = parts.tensors[0]!;
    const model = await openBytes(
      writeGguf({ ...parts, tensors: [...parts.tensors, { ...embedding, name: 'output.weight' }] }),
    );
    expect(model.config.tiedEmbeddings).toBe(false);
    expect((await model.read('lm_head.weight')).length).toBe(265 * 64);
    await model.close();
  });
});

describe('a Phi-3', () => {
  /** The tensors, each cut into parts of these rows and names where `cuts` has its name. */
  const cut = (tensors: readonly Tensor[], cuts: Record<string, readonly [string, number][]>): Tensor[] =>
    tensors.flatMap((tensor) => {
      const [, layer, name] = /^(blk\.\d+\.)(\w+)\.weight$/.exec(tensor.name) ?? [];
      let from = 0;
      return (
        cuts[name ?? '']?.map(([part, rows]): Tensor => {
          const columns = tensor.shape[1]!;
          const data = tensor.data.slice(from, from + 4 * rows * columns);
          from += data.length;
          return { ...tensor, name: `${layer}${part}.weight`, shape: [rows, columns], data };
        }) ?? [tensor]
      );
    });

  const source = randomLlama({ architecture: 'phi3' });
  const { headCount, kvHeadCount, headSize, ffnSize } = source.config;
  const keyWidth = kvHeadCount * headSize;
  const attention: [string, number][] = [
    ['attn_q', headCount * headSize],
    ['attn_k', keyWidth],
    ['attn_v', keyWidth],
  ];
  const ffn: [string, number][] = [
    ['ffn_gate', ffnSize],
    ['ffn_up', ffnSize],
  ];
  test.each([
    ['Q, K and V', { attn_qkv: attention }],
    ['gate and up', { ffn_up: ffn }],
    ['all of them', { attn_qkv: attention, ffn_up: ffn }],
  ])('has the same weights where %s are tensors of their own', async (_, cuts) => {
    const parts = await ggufParts(source);
    const stacked = await openBytes(writeGguf(parts));
    const expected = await readAll(stacked);
    await stacked.close();
    const alone = await openBytes(writeGguf({ ...parts, tensors: cut(parts.tensors, cuts) }));
    expect(alone.config).toEqual(stacked.config);
    expect(await readAll(alone)).toEqual(expected);
    await alone.close();
  });

  test('without V is refused by its name', async () => {
    const parts = await ggufParts(source);
    const tensors = cut(parts.tensors, { attn_qkv: attention.slice(0, 2) });
    await expect(openBytes(writeGguf({ ...parts, tensors }))).rejects.toThrow(
      /blk.0.attn_v.weight is missing/,
    );
  });
});

describe('layers of a Gemma 3 that have a sliding window', () => {
  const { layerCount } = asGemma();
  const open = async (value: boolean[]) => {
    const parts = await ggufParts(randomLlama(asGemma()));
    const pattern = ['gemma3.attention.sliding_window_pattern', { type: 'bools', value }] as const;
    return openBytes(writeGguf({ ...parts, metadata: new Map([...parts.metadata, pattern]) }));
  };

  test('are listed by some converters', async () => {
    const model = await open(Array.from({ length: layerCount }, (_, layer) => layer < 1));
    expect([model.config.slidingWindow?.layers, model.config.localRope?.layers]).toEqual([[0], [0]]);
    await model.close();
  });

  test('are listed one by one, or the file is refused', async () => {
    await expect(open([true])).rejects.toThrow(/sliding_window_pattern is no list of \d+ booleans/);
  });
});

describe('a file in parts', () => {
  const whole = tinyLlama();
  const write = async (parts: Record<string, Uint8Array | undefined>) => {
    for (const [name, bytes] of Object.entries(parts)) {
      if (bytes === undefined) await rm(path.join(folder, name), { force: true });
      else await writeFile(path.join(folder, name), bytes);
    }
    return path.join(folder, 'tiny-00001-of-00003.gguf');
  };

  test('is read as one, whichever part is named', async () => {
    const first = await write(splitGguf(whole, 3));
    const [one, parts] = [await openBytes(writeGguf(whole)), await openGguf(first)];
    const third = await openGguf(first.replace('00001-of', '00003-of'));
    expect(parts.config).toEqual(one.config);
    expect(parts.weightFiles.map((file) => path.basename(file))).toEqual(Object.keys(splitGguf(whole, 3)));
    expect(third.weightFiles).toEqual(parts.weightFiles);
    for (const { name } of decoderTensors(one.config)) {
      const expected = Buffer.from((await one.read(name)).buffer);
      for (const other of [parts, third]) {
        expect(Buffer.compare(Buffer.from((await other.read(name)).buffer), expected), name).toBe(0);
      }
    }
    await Promise.all([one.close(), parts.close(), third.close()]);
  });

  const u32 = (value: number) => ({ type: 'u32', value }) as const;
  test.each<[string, Record<string, Uint8Array | undefined>, RegExp]>([
    [
      'a part is missing',
      { ...splitGguf(whole, 3), 'tiny-00002-of-00003.gguf': undefined },
      /its part tiny-00002-of-00003.gguf is missing/,
    ],
    [
      'a part is another one',
      splitGguf(whole, 3, (part) => (part === 1 ? { 'split.no': u32(2) } : {})),
      /tiny-00002-of-00003.gguf says that it is part 3 of 3/,
    ],
    [
      'a part belongs to another file',
      splitGguf(whole, 3, (part) => (part === 1 ? { 'split.count': u32(4) } : {})),
      /says that it is part 2 of 4/,
    ],
    ['the count lies', splitGguf(whole, 3, () => ({ 'split.count': u32(2) })), /of 2 parts/],
    [
      'the count is no number',
      splitGguf(whole, 3, () => ({ 'split.count': { type: 'string', value: 'x' } })),
      /split.count is/,
    ],
    [
      'a tensor is in two parts',
      { ...splitGguf(whole, 3), ...secondPart(whole.tensors.slice(0, 2)) },
      /"token_embd.weight" is in two parts/,
    ],
    [
      'a part has lost a tensor',
      { ...splitGguf(whole, 3), ...secondPart(whole.tensors.slice(7, 12)) },
      /its parts hold \d+ tensors, not 20/,
    ],
  ])('is refused when %s', async (_, parts, reason) => {
    const first = await write(parts);
    await expect(openGguf(first)).rejects.toMatchObject({
      code: 'corrupt_model',
      message: expect.stringMatching(reason),
    });
  });

  function secondPart(tensors: GgufParts['tensors']): Record<string, Uint8Array> {
    const metadata = new Map([
      ['split.no', u32(1)],
      ['split.count', u32(3)],
    ]);
    return { 'tiny-00002-of-00003.gguf': writeGguf({ metadata, tensors }) };
  }
});

test('half-split order is the inverse of the converter’s permutation', () => {
  // LlamaModel.permute of convert_hf_to_gguf.py: reshape(heads, 2, D/2, columns).swapaxes(1, 2).
  const heads = 3;
  const size = 8;
  const columns = 2;
  const original = Float32Array.from({ length: heads * size * columns }, (_, i) => i);
  const permuted = new Float32Array(original.length);
  for (let h = 0; h < heads; h++)
    for (let j = 0; j < 2; j++)
      for (let i = 0; i < size / 2; i++)
        for (let c = 0; c < columns; c++) {
          const from = (h * size + j * (size / 2) + i) * columns + c;
          permuted[(h * size + 2 * i + j) * columns + c] = original[from]!;
        }
  expect(toHalfSplitRotary(permuted, heads, columns)).toEqual(original);
});

test('agrees with @huggingface/gguf on the real file', async () => {
  const [ours, theirs] = [await openGguf(testModelFile), await gguf(testModelFile, { allowLocalFile: true })];
  const metadata = Object.fromEntries(ours.metadata);
  const { version, tensor_count, kv_count, ...expected } = theirs.metadata as Record<string, unknown>;
  expect([version, tensor_count]).toEqual([3, BigInt(theirs.tensorInfos.length)]);
  expect(Number(kv_count)).toBe(ours.metadata.size);
  expect(metadata).toEqual(expected);
  await ours.close();
});
