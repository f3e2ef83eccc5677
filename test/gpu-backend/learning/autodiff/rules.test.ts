/**
 * Every gradient rule against finite differences. The bound of 2e-3 is ten times what step and rounding cost
 * (`finite-differences.ts`); a wrong sign, axis or factor errs by 0.1 and more.
 */
import { describe, expect, test } from 'vitest';
import { gradients } from '../../../../gpu-backend/learning/autodiff/gradients.ts';
import { RULES } from '../../../../gpu-backend/learning/autodiff/rules.ts';
import { transpose } from '../../../../gpu-backend/model/architectures/rotation.ts';
import { PLAIN_8_BITS, packRows, roundRows } from '../../../../gpu-backend/model/quantization/quantize.ts';
import { encodeModel } from '../../../../gpu-backend/onnx/encode.ts';
import type { Attributes, Value } from '../../../../gpu-backend/onnx/graph.ts';
import { GraphBuilder, MICROSOFT } from '../../../../gpu-backend/onnx/graph.ts';
import { createSession, floats, tensor } from '../../../../gpu-backend/onnx/session.ts';
import type { Case } from './finite-differences.ts';
import { weightedSum, worstError } from './finite-differences.ts';

const BOUND = 2e-3;
const i64 = (g: GraphBuilder, ...values: number[]) => g.constant('i64', [values.length], values);

/** Four heads that share two of K and V, of two sequences of five tokens. */
function attended(
  g: GraphBuilder,
  [q, k, v]: readonly [Value, Value | undefined, Value | undefined],
  tables: readonly Value[],
  attributes: Attributes,
): Value {
  const lengths = [g.constant('i32', [2], [4, 4]), g.constant('i32', [1], [5])];
  const heads = { num_heads: 4, kv_num_heads: 2, scale: { float: 1 }, qk_output: 2 };
  return g.ops(
    'GroupQueryAttention',
    [q, k, v, undefined, undefined, ...lengths, ...tables],
    4,
    { ...heads, ...attributes },
    MICROSOFT,
  )[0]!;
}

const CASES: Record<string, Case> = {
  Identity: { inputs: [[3, 4]], build: (g, x) => g.op('Identity', [x]) },
  Add: { inputs: [[3, 4], [4]], build: (g, x, y) => g.op('Add', [x, y]) },
  Sub: {
    inputs: [
      [3, 1, 4],
      [2, 1],
    ],
    build: (g, x, y) => g.op('Sub', [x, y]),
  },
  Mul: { inputs: [[3, 4], [1]], build: (g, x, y) => g.op('Mul', [x, y]) },
  'Mul of a value by itself': { inputs: [[3, 4]], build: (g, x) => g.op('Mul', [x, x]) },
  QuickGelu: { inputs: [[3, 4]], build: (g, x) => g.op('QuickGelu', [x], {}, MICROSOFT) },
  'QuickGelu, alpha 1': {
    inputs: [[3, 4]],
    build: (g, x) => g.op('QuickGelu', [x], { alpha: { float: 1 } }, MICROSOFT),
  },
  FastGelu: { inputs: [[3, 4]], build: (g, x) => g.op('FastGelu', [x], {}, MICROSOFT) },
  Where: {
    inputs: [[3, 4], [4]],
    feeds: { when: tensor('bool', Uint8Array.of(1, 0, 0, 1, 1, 0, 1, 0, 0, 0, 1, 1), [3, 4]) },
    build: (g, x, y) => g.op('Where', [{ name: 'when' }, x, y]),
  },
  MatMul: {
    inputs: [
      [2, 3, 4],
      [4, 5],
    ],
    build: (g, x, y) => g.op('MatMul', [x, y]),
  },
  FusedMatMul: {
    inputs: [
      [2, 3, 4],
      [1, 5, 4],
    ],
    build: (g, x, y) => g.op('FusedMatMul', [x, y], { transB: 1, alpha: { float: 0.7 } }, MICROSOFT),
  },
  Reshape: { inputs: [[2, 3, 4]], build: (g, x) => g.op('Reshape', [x, i64(g, 0, -1)]) },
  Transpose: { inputs: [[2, 3, 4]], build: (g, x) => g.op('Transpose', [x], { perm: [1, 2, 0] }) },
  Split: {
    inputs: [[2, 5]],
    build: (g, x) => {
      const [a, , c] = g.ops('Split', [x, i64(g, 2, 1, 2)], 3, { axis: -1 });
      return g.op('Mul', [a!, c!]);
    },
  },
  Pad: { inputs: [[2, 3]], build: (g, x) => g.op('Pad', [x, i64(g, 0, 0, 0, 2)]) },
  Slice: {
    inputs: [[2, 3, 5]],
    build: (g, x) => g.op('Slice', [x, i64(g, 0), i64(g, 4), i64(g, -1)]),
  },
  Gather: { inputs: [[4, 3]], build: (g, x) => g.op('Gather', [x, i64(g, 2, 0, 2)], { axis: 0 }) },
  SimplifiedLayerNormalization: {
    inputs: [[3, 8], [8]],
    targets: [0],
    build: (g, x, w) => g.op('SimplifiedLayerNormalization', [x, w], { axis: -1, epsilon: { float: 1e-5 } }),
  },
  RotaryEmbedding: {
    inputs: [
      [1, 3, 16],
      [3, 4],
      [3, 4],
    ],
    targets: [0],
    build: (g, x, cos, sin) =>
      g.op(
        'RotaryEmbedding',
        [x, g.constant('i64', [1, 3], [0, 1, 2]), cos, sin],
        { num_heads: 2 },
        MICROSOFT,
      ),
  },
  'GroupQueryAttention, Q, K and V together and turned': {
    inputs: [
      [2, 5, 8 * 16],
      [5, 8],
      [5, 8],
    ],
    targets: [0],
    build: (g, x, cos, sin) => attended(g, [x, undefined, undefined], [cos, sin], { do_rotary: 1 }),
  },
  'GroupQueryAttention, apart and with a window': {
    inputs: [
      [2, 5, 4 * 8],
      [2, 5, 2 * 8],
      [2, 5, 2 * 8],
    ],
    build: (g, q, k, v) => attended(g, [q, k, v], [], { local_window_size: 2 }),
  },
};

test.each(Object.entries(CASES))('%s', async (_name, given) => {
  expect(await worstError(given)).toBeLessThan(BOUND);
});

test.each([
  ['before the last axis', [0, 2, 0, 0], undefined],
  ['along another axis', [0, 2], 0],
])('Pad %s is refused: its rule takes the first of the last axis', (_name, pads, axis) => {
  const g = new GraphBuilder('padded');
  const x = g.input('x', 'f32', [2, 3]);
  const axes = axis === undefined ? undefined : i64(g, axis);
  const padded = g.op('Pad', [x, i64(g, ...pads), undefined, axes]);
  const seed = { value: padded, gradient: g.constant('f32', [1], [1]) };
  expect(() => gradients(g, [seed], [x])).toThrow(/the shape of Pad_\d+ is not known/);
});

/** Activations are quantized too, so the loss is a staircase: 8 bits of an input of size 1 err by 1/254 at most. */
test('MatMulNBits goes back through its transposed copy', async () => {
  const weights = Float32Array.from({ length: 64 * 32 }, (_, i) => Math.sin(i * 1.7));
  const product = (g: GraphBuilder, x: Value, name: string, rows: Float32Array, out: number) => {
    const codes = roundRows(rows, out, rows.length / out, PLAIN_8_BITS);
    const { values, scales, zeroPoints } = packRows(codes);
    const blocks = rows.length / out / 32;
    const bytes = (data: Uint8Array | Float32Array) => ({
      kind: 'inline' as const,
      bytes: new Uint8Array(data.buffer),
    });
    const inputs = [
      g.initializer(name, 'u8', [out, blocks, 32], bytes(values)),
      g.initializer(`${name}.scales`, 'f32', [out, blocks], bytes(scales)),
      g.initializer(`${name}.zeros`, 'u8', [out, blocks], bytes(zeroPoints)),
    ];
    const attributes = { K: rows.length / out, N: out, bits: 8, block_size: 32, accuracy_level: 1 };
    return g.op('MatMulNBits', [x, ...inputs], attributes, MICROSOFT);
  };
  const error = await worstError({
    inputs: [[3, 32]],
    build: (g, x) => product(g, x, 'w', weights, 64),
    options: {
      transposed: new Map([
        ['w', (g, gradient) => product(g, gradient, 'w.transposed', transpose(weights, 64, 32), 32)],
      ]),
    },
  });
  expect(error).toBeLessThan(1e-2);
});

test('DynamicQuantizeMatMul goes back through the product that is given for its weights', async () => {
  const g = new GraphBuilder('columns');
  const codes = Int8Array.from({ length: 32 * 8 }, (_, i) => ((i * 37) % 255) - 127);
  const x = g.input('x', 'f32', [3, 32]);
  const w = g.initializer('w', 'i8', [32, 8], { kind: 'inline', bytes: new Uint8Array(codes.buffer) });
  const y = g.op('DynamicQuantizeMatMul', [x, w, g.constant('f32', [1], [0.02])], {}, MICROSOFT);
  const { seed } = weightedSum(g, y);
  const back = (b: GraphBuilder, gradient: Value) =>
    b.op(
      'FusedMatMul',
      [
        gradient,
        b.constant(
          'f32',
          [32, 8],
          [...codes].map((code) => code * 0.02),
        ),
      ],
      { transB: 1 },
      MICROSOFT,
    );
  const [found] = gradients(g, [seed], [x], { transposed: new Map([['w', back]]) });
  g.output(found!, 'f32', [3, 32]);
  g.output(seed.gradient, 'f32', [3, 8]);
  const session = await createSession(encodeModel(g.graph), { threads: 1 });
  const outputs = await session.run({ x: tensor('f32', new Float32Array(96).fill(1), [3, 32]) }, [
    found!.name,
    seed.gradient.name,
  ]);
  await session.release();
  const c = floats(outputs[seed.gradient.name]!);
  floats(outputs[found!.name]!).forEach((value, i) => {
    const [row, input] = [Math.floor(i / 32), i % 32];
    let expected = 0;
    for (let k = 0; k < 8; k++) expected += c[row * 8 + k]! * codes[input * 8 + k]! * 0.02;
    expect(value).toBeCloseTo(expected, 4);
  });
});

describe('the table', () => {
  test('every rule is tried', () => {
    const tried = new Set(Object.keys(CASES).map((name) => name.split(/[ ,]/)[0]));
    expect(Object.keys(RULES).filter((op) => !tried.has(op))).toEqual([
      'MatMulNBits',
      'DynamicQuantizeMatMul',
    ]);
  });
});
