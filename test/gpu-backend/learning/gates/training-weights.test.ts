/** All forms of the copies multiply alike, and machines that share a folder keep each other's. */
import { readFileSync } from 'node:fs';
import { mkdtemp, readdir, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import {
  type CopyForm,
  fastestForm,
  fastestRounding,
} from '../../../../gpu-backend/learning/gates/copy-form.ts';
import {
  multiplyGradient,
  multiplyStored,
  type TrainingLinears,
  trainingLinears,
} from '../../../../gpu-backend/learning/gates/training-weights.ts';
import { readStoredLlama } from '../../../../gpu-backend/model/stored-llama.ts';
import { GraphBuilder } from '../../../../gpu-backend/onnx/graph.ts';
import { createSessionIn, floats, tensor } from '../../../../gpu-backend/onnx/session.ts';
import { emitFromMemory, holding, randomLlama, TINY_CONFIG } from '../../../support/random-llama.ts';

const plain = randomLlama();
/** As in real models, the head's rows have much in common. */
const source: typeof plain = {
  ...plain,
  read: async (name) => {
    const values = await plain.read(name);
    return name.includes('embed_tokens')
      ? values.map((value, i) => value + Math.sin(i % TINY_CONFIG.hiddenSize))
      : values;
  },
};
let folder: string;
const FORMS = {
  i8: { rounding: 'blocks', codes: 'i8' },
  u8: { rounding: 'blocks', codes: 'u8' },
  pairs: { rounding: 'pairs', codes: 'i8' },
  pairsU8: { rounding: 'pairs', codes: 'u8' },
} as const satisfies Record<string, CopyForm>;
type FormName = keyof typeof FORMS;
let linears: Record<FormName, TrainingLinears>;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'maskroute-codes-'));
  await emitFromMemory(source, holding('q8', source.config), folder, () => {});
  const stored = await readStoredLlama(folder, source.config);
  // Of an earlier version.
  for (const name of ['training-v3.bin', 'training-v4-i8.bin', 'training-v5-pairs.json'])
    await writeFile(join(folder, name), '');
  linears = {
    i8: await trainingLinears(folder, source.config, stored, FORMS.i8),
    u8: await trainingLinears(folder, source.config, stored, FORMS.u8),
    pairs: await trainingLinears(folder, source.config, stored, FORMS.pairs),
    pairsU8: await trainingLinears(folder, source.config, stored, FORMS.pairsU8),
  };
});
afterAll(() => rm(folder, { recursive: true }));

type Which = { readonly form: FormName; readonly name: string; readonly direction: 'forward' | 'back' };

/** Rows of very different sizes. */
const someRows = (inputs: number) =>
  Float32Array.from({ length: ROWS * inputs }, (_, i) => Math.sin(i * i) * 10 ** Math.floor(i / inputs));
const ROWS = 4;

/** A matrix of the model times {@link someRows}, or `[ROWS, inputs]` others. */
async function product({ form, name, direction }: Which, rows?: Float32Array): Promise<Float32Array> {
  const { forward, back } = linears[form].get(name)!;
  const [inputs, outputs] =
    direction === 'forward' ? [forward.inputs, forward.outputs] : [forward.outputs, forward.inputs];
  const g = new GraphBuilder(`product_${form}`);
  const x = g.input('x', 'f32', [ROWS, inputs]);
  const y =
    direction === 'forward'
      ? multiplyStored(g, x, 'w', forward)
      : multiplyGradient(g, x, 'w', { forward, back: back! });
  g.output(y, 'f32', [ROWS, outputs]);
  const session = await createSessionIn(folder, g.graph, { threads: 1 });
  const found = await session.run({ x: tensor('f32', rows ?? someRows(inputs), [ROWS, inputs]) }, [y.name]);
  await session.release();
  return floats(found[y.name]!);
}

const hasExactSigned = async () => (await fastestForm('blocks')).codes === 'i8';

test.each([
  ['i8', 'u8', 'layer_0.gate', 'forward'],
  ['pairs', 'pairsU8', 'layer_0.down', 'back'],
  ['pairs', 'pairsU8', 'layer_0.gate', 'back'],
] as const)(
  'both types of codes give the same bits where signed codes are exact: %s, %s, %s, %s',
  async (...asked) => {
    const [form, other, name, direction] = asked;
    const [signed, unsigned] = [
      await product({ form, name, direction }),
      await product({ form: other, name, direction }),
    ];
    expect(unsigned.some((value) => value !== 0)).toBe(true);
    if (await hasExactSigned()) expect(signed).toEqual(unsigned);
  },
);

/** The largest difference of a row, in a row's root mean square. */
function worstDifference(found: Float32Array, expected: Float32Array): number {
  const width = expected.length / ROWS;
  return Math.max(
    ...Array.from({ length: ROWS }, (_, row) => {
      const [a, b] = [found, expected].map((all) => all.subarray(row * width, (row + 1) * width));
      const size = Math.hypot(...b!) / Math.sqrt(width);
      return Math.max(...b!.map((value, i) => Math.abs(value - a![i]!))) / size;
    }),
  );
}

test.each([
  ['output', 'forward'],
  ['down', 'forward'],
  ['qkv', 'back'],
  ['output', 'back'],
  ['gate', 'back'],
] as const)('pairs multiply as blocks do: %s, %s', async (which, direction) => {
  const of = { name: `layer_0.${which}`, direction };
  const found = await product({ form: 'pairs', ...of });
  expect(worstDifference(found, await product({ form: 'i8', ...of }))).toBeLessThan(0.06);
});

test('pairs take normalized rows as they are', async () => {
  const { inputs } = linears.pairs.get('layer_0.gate')!.forward;
  const rows = someRows(inputs);
  for (let row = 0; row < ROWS; row++) {
    const values = rows.subarray(row * inputs, (row + 1) * inputs);
    const size = Math.hypot(...values) / Math.sqrt(inputs);
    for (let i = 0; i < inputs; i++) values[i]! /= size;
  }
  const of = { name: 'layer_0.gate', direction: 'forward' } as const;
  const found = await product({ form: 'pairs', ...of }, rows);
  expect(worstDifference(found, await product({ form: 'i8', ...of }, rows))).toBeLessThan(0.06);
});

test("pairs of the head leave out what all tokens share, as a gradient's sum over all tokens is 0", async () => {
  const rows = new Float32Array(ROWS * linears.pairs.get('head')!.forward.outputs).fill(1);
  const of = { name: 'head', direction: 'back' } as const;
  const [pairs, blocks] = [
    await product({ form: 'pairs', ...of }, rows),
    await product({ form: 'i8', ...of }, rows),
  ];
  expect(Math.hypot(...pairs)).toBeLessThan(0.01 * Math.hypot(...blocks));
});

test.runIf(process.platform === 'linux' && process.arch === 'x64')(
  'codes are signed where the CPU has VNNI, unsigned elsewhere, and in pairs with AMX',
  async () => {
    const flags = readFileSync('/proc/cpuinfo', 'utf8');
    expect(await hasExactSigned()).toBe(/\b(avx512_vnni|avx_vnni)\b/.test(flags));
    expect(await fastestRounding()).toBe(/\bamx_int8\b/.test(flags) ? 'pairs' : 'blocks');
  },
);

test('each form has its own files, and those of earlier versions go', async () => {
  const names = (await readdir(folder)).filter((name) => name.startsWith('training-'));
  const forms = Object.values(FORMS).map(({ rounding, codes }) => `training-v6-${rounding}-${codes}`);
  expect(names.sort()).toEqual(forms.flatMap((form) => [`${form}.bin`, `${form}.json`]).sort());
});
