/** Matrices of different bits in one model: what is chosen, what lies on the disk, and what comes out of the runtime. */
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { llamaGraph } from '../../../../gpu-backend/model/architectures/one-mask-llama.ts';
import {
  embed,
  formOf,
  headLogits,
  linear,
  multiply,
  type StoredCodes,
  storeCodes,
  storedRows,
  withExactProducts,
} from '../../../../gpu-backend/model/architectures/projections.ts';
import { type Holding, MODEL_FILE, WEIGHTS_FILE } from '../../../../gpu-backend/model/emit.ts';
import { chooseEightBits, rareRows } from '../../../../gpu-backend/model/quantization/four-bits.ts';
import {
  dequantize,
  type QuantCodes,
  type QuantForm,
  roundRows,
} from '../../../../gpu-backend/model/quantization/quantize.ts';
import { readStoredLlama } from '../../../../gpu-backend/model/stored-llama.ts';
import { WeightsFile } from '../../../../gpu-backend/model/weights-file.ts';
import { encodeModel } from '../../../../gpu-backend/onnx/encode.ts';
import { GraphBuilder } from '../../../../gpu-backend/onnx/graph.ts';
import { createSession, floats, tensor } from '../../../../gpu-backend/onnx/session.ts';
import { createRandom } from '../../../../gpu-backend/random.ts';
import { calibrated, emitFromMemory, randomLlama, TINY_CONFIG } from '../../../support/random-llama.ts';

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'maskroute-four-bits-'));
});
afterAll(() => rm(folder, { recursive: true }));

const random = createRandom(31);
const normals = (count: number) => Float32Array.from({ length: count }, () => random.normal());

describe('a product in the runtime', () => {
  const [T, K, N] = [3, 192, 20];

  test.each<QuantForm>([
    { bits: 4, blockSize: 32 },
    { bits: 4, blockSize: 64 },
    { bits: 8, blockSize: 32 },
    { bits: 8, blockSize: 64 },
  ])('$bits bits in blocks of $blockSize is the naive one, and of some of its rows, too', async (form) => {
    const codes = roundRows(normals(N * K), N, K, form);
    const name = `product-${form.bits}-${form.blockSize}`;
    const file = new WeightsFile(join(folder, `${name}.bin`), `${name}.bin`);
    const stored = storeCodes(file, codes);
    file.close();
    const g = new GraphBuilder('product');
    const x = g.input('x', 'f32', ['T', K]);
    multiply(g, x, linear(g, 'all', stored), 'y');
    multiply(g, x, linear(g, 'some', storedRows(stored, 7, 17)), 'z');
    g.output({ name: 'y' }, 'f32', ['T', N]);
    g.output({ name: 'z' }, 'f32', ['T', 10]);
    const path = join(folder, `${name}.onnx`);
    await writeFile(path, encodeModel(g.graph));
    const session = await createSession(path, { threads: 1 });
    const inputs = normals(T * K);
    const outputs = await session.run({ x: tensor('f32', inputs, [T, K]) }, ['y', 'z']);
    await session.release();
    const [y, z] = [floats(outputs.y!), floats(outputs.z!)];
    const weights = dequantize(codes);
    for (let t = 0; t < T; t++) {
      for (let n = 0; n < N; n++) {
        let expected = 0;
        for (let k = 0; k < K; k++) expected += inputs[t * K + k]! * weights[n * K + k]!;
        // The runtime quantizes inputs to 8 bits, too: an error of 1/254 of the largest for each of K of them.
        expect(Math.abs(y[t * N + n]! - expected)).toBeLessThan(0.35);
        if (n >= 7 && n < 17) expect(z[t * 10 + n - 7]!).toBeCloseTo(y[t * N + n]!, 4);
      }
    }
  });
});

test('rows of the vocabulary in stretches are embedded and multiplied as rows of one matrix', async () => {
  const H = 64;
  const stretches = (
    [
      [5, 8],
      [40, 4],
      [3, 8],
    ] as const
  ).map(([rows, bits]) => roundRows(normals(rows * H), rows, H, { bits, blockSize: 32 }));
  const V = 48;
  const file = new WeightsFile(join(folder, 'stretches.bin'), 'stretches.bin');
  const stored = stretches.map((codes) => storeCodes(file, codes));
  file.close();
  const g = new GraphBuilder('stretches');
  const rows = embed(g, g.input('ids', 'i64', ['B', 'S']), { rows: stored, correction: undefined });
  g.output(rows, 'f32', ['B', 'S', H]);
  g.output(headLogits(g, rows, stored), 'f32', ['B', 'S', V]);
  const path = join(folder, 'stretches.onnx');
  await writeFile(path, encodeModel(withExactProducts(g.graph)));
  const session = await createSession(path, { threads: 1 });
  // The first and the last token of each stretch, and others between them, in any order.
  const ids = [45, 0, 44, 4, 5, 47, 20, 46];
  const given = { ids: tensor('i64', BigInt64Array.from(ids, BigInt), [2, 4]) };
  const outputs = await session.run(given, [rows.name, 'logits']);
  await session.release();
  const weights = Float32Array.from(stretches.flatMap((codes) => [...dequantize(codes)]));
  const row = (token: number) => weights.subarray(token * H, (token + 1) * H);
  expect(floats(outputs[rows.name]!)).toEqual(Float32Array.from(ids.flatMap((token) => [...row(token)])));
  const logits = floats(outputs.logits!);
  for (const [at, token] of ids.entries()) {
    for (let other = 0; other < V; other++) {
      const expected = row(other).reduce((sum, value, i) => sum + value * row(token)[i]!, 0);
      expect(logits[at * V + other]!).toBeCloseTo(expected, 3);
    }
  }
});

test('the matrices that cost most a weight get eight bits, as far as their share goes', () => {
  const config = { ...TINY_CONFIG, layerCount: 2 };
  const kls = { qkv: [0.3, 0.01], output: [0.02, 0.02], gateUp: [0.2, 0.1], down: [0.01, 0.9] };
  const sensitivities = Object.entries(kls).flatMap(([name, values]) =>
    values.map((kl, layer) => ({ layer, name: name as keyof typeof kls, kl })),
  );
  // Weights of a layer: qkv 15,360, output 9,216, gateUp 30,720, down 15,360; of both 141,312.
  const choose = (share: number, more = 0) => [...chooseEightBits(config, sensitivities, share, more)].sort();
  expect(choose(0.11)).toEqual(['1.down']);
  expect(choose(0.22)).toEqual(['0.qkv', '1.down']);
  expect(choose(0.11, 15_360)).toEqual(['0.qkv', '1.down']);
  // gateUp of layer 0 is next and does not fit; the outputs do.
  expect(choose(0.36)).toEqual(['0.output', '0.qkv', '1.down', '1.output']);
  expect(choose(1)).toHaveLength(8);
});

test('rare tokens are the last of a vocabulary; where the text is full of the last, they stand before these', () => {
  const [vocabularySize, hiddenSize] = [32_000, 576];
  const rare = (...tokenIds: number[]) =>
    rareRows({ vocabularySize, hiddenSize }, { tokenIds: Int32Array.from(tokenIds) });
  expect(rare()).toEqual({ from: 10_688, to: 31_488 });
  // Other stretches have as many of these tokens, or more.
  expect(rare(0, 300, 10_000, 20_000, 31_900)).toEqual({ from: 10_688, to: 31_488 });
  // Letters and commas of Llama 2 are from 29,871 on.
  expect(rare(29_871, 29_892, 29_889, 9_100, 15_000)).toEqual({ from: 9_024, to: 29_824 });
  // The first rows are never rare, whatever the text has.
  expect(rare(...Array.from({ length: 30_000 }, (_, i) => 700 + i))).toEqual({ from: 10_688, to: 31_488 });
  expect(rareRows({ vocabularySize: 768, hiddenSize }, { tokenIds: new Int32Array() })).toBeUndefined();
  expect(rareRows({ vocabularySize, hiddenSize: 96 }, { tokenIds: new Int32Array() })).toBeUndefined();
});

describe('a model of four bits', () => {
  const config = { layerCount: 2, hiddenSize: 64, ffnSize: 192, headSize: 16, headCount: 4, kvHeadCount: 2 };

  test('says of each matrix how it is held, and the same text comes to the same bytes', async () => {
    const source = randomLlama(config);
    const bytes: Buffer[] = [];
    for (const run of ['a', 'b']) {
      const out = await mkdtemp(join(folder, run));
      await emitFromMemory(source, calibrated('q4', source.config), out, () => {});
      bytes.push(await readFile(join(out, WEIGHTS_FILE)), await readFile(join(out, MODEL_FILE)));
      const stored = await readStoredLlama(out, source.config);
      const kinds = stored.layers.flatMap(({ qkv, output, gateUp, down }) =>
        [qkv, output, gateUp, down].map(({ kind }) => kind),
      );
      expect(new Set(kinds)).toEqual(new Set(['q4', 'q8']));
      expect(stored.head.map(({ kind }) => kind)).toEqual(['q8']);
      expect(stored.embedding.rows).toEqual(stored.head);
      // Written anew from what was read, the graph is the same.
      expect(Buffer.from(encodeModel(llamaGraph(source.config, stored)))).toEqual(bytes.at(-1));
    }
    expect(bytes[0]).toEqual(bytes[2]);
    expect(bytes[1]).toEqual(bytes[3]);
  });

  test('a large vocabulary has four bits for rare tokens, and none for common and special ones', async () => {
    const source = randomLlama({ ...config, vocabularySize: 2000 });
    const out = await mkdtemp(join(folder, 'vocabulary'));
    const given = calibrated('q4', source.config) as Extract<Holding, object>;
    const tokenIds = given.text.tokenIds.map((id) => id % 640);
    await emitFromMemory(source, { ...given, text: { ...given.text, tokenIds } }, out, () => {});
    const stored = await readStoredLlama(out, source.config);
    const stretches = stored.head.map(({ kind, outputs }) => [kind, outputs]);
    expect(stretches).toEqual([
      ['q8', 704],
      ['q4', 768],
      ['q8', 528],
    ]);
    expect(stored.embedding.rows).toEqual(stored.head);
    const written = await readFile(join(out, MODEL_FILE));
    expect(Buffer.from(encodeModel(llamaGraph(source.config, stored)))).toEqual(written);
  });

  test('a matrix of one block is read back with its own bits', async () => {
    const file = new WeightsFile(join(folder, 'narrow.bin'), 'narrow.bin');
    const source = randomLlama({
      ...config,
      hiddenSize: 32,
      headSize: 16,
      headCount: 2,
      kvHeadCount: 1,
      ffnSize: 32,
    });
    const narrow = (outputs: number, bits: 4 | 8): StoredCodes =>
      storeCodes(file, roundRows(normals(outputs * 32), outputs, 32, { bits, blockSize: 32 }) as QuantCodes);
    const vector = (count: number) => file.append(normals(count));
    const rows = narrow(source.config.vocabularySize, 8);
    const layers = Array.from({ length: source.config.layerCount }, (_, i) => ({
      qkv: narrow(64, i % 2 ? 4 : 8),
      output: narrow(32, 4),
      gateUp: narrow(64, 8),
      down: narrow(32, 4),
      attentionNorm: vector(32),
      ffnNorm: vector(32),
    }));
    const rope = vector((source.config.contextTokens * 16) / 2);
    const stored = {
      layers,
      head: [rows],
      embedding: { rows: [rows], correction: undefined },
      finalNorm: vector(32),
      ropeCos: rope,
      ropeSin: rope,
    };
    file.close();
    const out = await mkdtemp(join(folder, 'narrow'));
    await writeFile(join(out, MODEL_FILE), encodeModel(llamaGraph(source.config, stored)));
    const back = await readStoredLlama(out, source.config);
    expect(back).toEqual(stored);
    expect(formOf(back.layers[1]!.qkv as StoredCodes)).toEqual({ bits: 4, blockSize: 32 });
  });

  test.each([
    { part: 'the layers', after: 0, stopped: [0.31] },
    // All layers have their four bits after 0.62 of the work, the head after 0.68; it has two blocks.
    { part: 'the head', after: 0.62, stopped: [0.31, 0.62, expect.closeTo(0.65, 9)] },
  ])('told to stop while it rounds $part, it stops', async ({ after, stopped }) => {
    const source = randomLlama({ ...config, vocabularySize: 2000 });
    const out = await mkdtemp(join(folder, 'stopped'));
    const seen: number[] = [];
    const onProgress = (fraction: number) => {
      seen.push(fraction);
      if (fraction > after) throw new Error('enough');
    };
    await expect(emitFromMemory(source, calibrated('q4', source.config), out, onProgress)).rejects.toThrow(
      'enough',
    );
    expect(seen).toEqual(stopped);
  });
});
