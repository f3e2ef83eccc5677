/**
 * The forms that copies of a model's matrices have for training (`training-weights.ts`), and which of them this machine multiplies
 * fastest.
 */
import { readFile } from 'node:fs/promises';
import { COLUMN_CODE_MAX } from '../../model/quantization/quantize.ts';
import { encodeModel } from '../../onnx/encode.ts';
import { GraphBuilder, MICROSOFT, type Value } from '../../onnx/graph.ts';
import { createSession, floats, tensor } from '../../onnx/session.ts';

/** Types of codes by column. */
export const CODE_TYPES = ['i8', 'u8'] as const;
export type CodeType = (typeof CODE_TYPES)[number];
/**
 * How the copies of a model are rounded: codes in blocks and by column, or `pairs` of codes, rows and columns. It decides the bits
 * of a step, so a run keeps the rounding that it began with, on whichever machine it goes on. Its journal has the index here.
 */
export const ROUNDINGS = ['blocks', 'pairs'] as const;
export type Rounding = (typeof ROUNDINGS)[number];
/** The form of all copies of a model. Each form has its own files, since machines may share a folder. */
export type CopyForm = { readonly rounding: Rounding; readonly codes: CodeType };

/**
 * The rounding that this machine multiplies fastest: pairs with AMX, whose products are of signed codes by column alone, and seven
 * times as fast. The CPU's flags decide, which are the same on every day: by the time of a product, a busy machine decided
 * otherwise than the idle one.
 */
export const fastestRounding = async (): Promise<Rounding> => ((await hasAmx()) ? 'pairs' : 'blocks');

/**
 * The form of a rounding that this machine multiplies fastest. Codes by column are signed wherever it multiplies them exactly;
 * both types give the same bits then. VNNI computes both alike (`mlas/lib/platform.cpp`). CPUs with AVX2 and without VNNI add
 * up products of signed codes in 16 bits, which overflow: the gradients' cosine falls by 0.01.
 */
export async function fastestForm(rounding: Rounding): Promise<CopyForm> {
  areSignedExact ??= multipliesSignedExactly();
  return { rounding, codes: (await areSignedExact) ? 'i8' : 'u8' };
}
let areSignedExact: Promise<boolean> | undefined;

/** Linux alone tells. */
const hasAmx = async (): Promise<boolean> =>
  process.platform === 'linux' && /\bamx_int8\b/.test(await readFile('/proc/cpuinfo', 'utf8'));

/** Multiplies the largest codes that there are: if anything overflows, they do. */
async function multipliesSignedExactly(): Promise<boolean> {
  const [rows, inputs, outputs] = [8, 64, 16];
  const [activation, weight] = [255, COLUMN_CODE_MAX];
  const g = new GraphBuilder('signed_codes');
  const x = g.input('x', 'f32', [rows, inputs]);
  const bytes = new Uint8Array(inputs * outputs).fill(weight);
  const values = g.initializer('w', 'i8', [inputs, outputs], { kind: 'inline', bytes });
  const y = multiplyColumns(g, x, { codes: 'i8', values, scales: g.constant('f32', [1], [1]) });
  g.output(y, 'f32', [rows, outputs]);
  const session = await createSession(encodeModel(g.graph), { threads: 1, spinning: false });
  try {
    // Their least value is 0, so the runtime's scale is 1 and their code 255.
    const activations = new Float32Array(rows * inputs).fill(activation);
    const found = await session.run({ x: tensor('f32', activations, [rows, inputs]) }, [y.name]);
    return floats(found[y.name]!).every((value) => value === inputs * activation * weight);
  } finally {
    await session.release();
  }
}

/** The code of weight 0. */
export const ZERO_CODE: Readonly<Record<CodeType, number>> = { i8: 0, u8: 128 };

type Columns = { readonly codes: CodeType; readonly values: Value; readonly scales: Value };

/** x `[..., inputs]` times codes `[inputs, outputs]` with a scale for each output. */
export function multiplyColumns(g: GraphBuilder, x: Value, { codes, values, scales }: Columns): Value {
  return g.op('DynamicQuantizeMatMul', [x, values, scales, zeroOf(g, codes)], {}, MICROSOFT);
}

const zeroOf = (g: GraphBuilder, codes: CodeType): Value | undefined =>
  codes === 'u8' ? g.constant(codes, [1], [ZERO_CODE[codes]]) : undefined;

/** The code of 0, and the codes on each side of it, of a row's activations. */
const [ROW_ZERO, ROW_STEPS] = [128, 127];
/** Far below the largest value of any row that matters; rows of zeros stay zeros. */
const ROW_MIN = 1e-30;

/**
 * x `[..., inputs]` times codes `[inputs, outputs]` with a scale for each output. Activations have codes of 8 bits with a scale for
 * each row, which the result is multiplied by.
 */
export function multiplyRows(
  g: GraphBuilder,
  x: Value,
  { inputs, codes, values, scales }: Columns & { readonly inputs: number },
): Value {
  const last = g.constant('i64', [1], [-1]);
  const [most, least] = ['ReduceMax', 'ReduceMin'].map((op) => g.op(op, [x, last], { keepdims: 1 }));
  const size = g.op('Max', [most, g.op('Neg', [least]), g.constant('f32', [1], [ROW_MIN])]);
  const step = g.op('Div', [size, g.constant('f32', [1], [ROW_STEPS])]);
  const zeros = g.op('Expand', [g.constant('u8', [1], [ROW_ZERO]), g.op('Shape', [step])]);
  // One block a row: by `axis` of the rows, the runtime starts its threads anew for each of them.
  const rounded = g.op('QuantizeLinear', [x, step, zeros], { axis: -1, block_size: inputs });
  const [one, zero] = [g.constant('f32', [], [1]), g.constant('u8', [], [ROW_ZERO])];
  const operands = [rounded, values, one, scales, zero, zeroOf(g, codes)];
  return g.op('Mul', [g.op('MatMulIntegerToFloat', operands, {}, MICROSOFT), step]);
}
