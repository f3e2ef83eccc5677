/**
 * The forms that copies of a model's matrices have for training (`training-weights.ts`), and which of them this machine multiplies
 * fastest.
 */
import { readFile } from 'node:fs/promises';
import { COLUMN_CODE_MAX } from '../../model/quantization/quantize.ts';
import { encodeModel } from '../../onnx/encode.ts';
import { GraphBuilder, MICROSOFT, type Value } from '../../onnx/graph.ts';
import { createSession, floats, tensor } from '../../onnx/session.ts';

/** Types of columns' codes. */
export const CODE_TYPES = ['i8', 'u8'] as const;
export type CodeType = (typeof CODE_TYPES)[number];
/**
 * Forms of all copies of a model: blocks and columns with codes of a type, or `pairs`, rows and columns with signed codes. Each has its
 * own files, since machines may share a folder.
 */
export const COPY_FORMS = [...CODE_TYPES, 'pairs'] as const;
export type CopyForm = (typeof COPY_FORMS)[number];
export const codesOf = (form: CopyForm): CodeType => (form === 'pairs' ? 'i8' : form);

/**
 * The form that this machine multiplies fastest. Codes are signed wherever it multiplies them exactly; both types give the same
 * bits then. Only signed codes use AMX, with seven times the multiply-adds a second; VNNI computes both alike
 * (`mlas/lib/platform.cpp`). CPUs with AVX2 and without VNNI add up products of signed codes in 16 bits, which overflow: the
 * gradients' cosine falls by 0.01.
 *
 * Pairs give other bits than blocks. So the CPU's flags decide, which are the same on every day: by the time of a product, a
 * busy machine decided otherwise than the idle one.
 */
export const fastestForm = (): Promise<CopyForm> => {
  found ??= findForm();
  return found;
};
let found: Promise<CopyForm> | undefined;

async function findForm(): Promise<CopyForm> {
  if (!(await multipliesSignedExactly())) return 'u8';
  return (await hasAmx()) ? 'pairs' : 'i8';
}

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
  const zero = codes === 'u8' ? g.constant(codes, [1], [ZERO_CODE[codes]]) : undefined;
  return g.op('DynamicQuantizeMatMul', [x, values, scales, zero], {}, MICROSOFT);
}

/** The code of 0, and the codes on each side of it, of a row's activations. */
const [ROW_ZERO, ROW_STEPS] = [128, 127];
/** Far below the largest value of any row that matters; rows of zeros stay zeros. */
const ROW_MIN = 1e-30;

/**
 * x `[..., inputs]` times signed codes `[inputs, outputs]` with a scale for each output. Activations have codes of 8 bits with a scale
 * for each row, which the result is multiplied by.
 */
export function multiplyRows(
  g: GraphBuilder,
  x: Value,
  inputs: number,
  { values, scales }: { readonly values: Value; readonly scales: Value },
): Value {
  const last = g.constant('i64', [1], [-1]);
  const [most, least] = ['ReduceMax', 'ReduceMin'].map((op) => g.op(op, [x, last], { keepdims: 1 }));
  const size = g.op('Max', [most, g.op('Neg', [least]), g.constant('f32', [1], [ROW_MIN])]);
  const step = g.op('Div', [size, g.constant('f32', [1], [ROW_STEPS])]);
  const steps = g.op('Reshape', [step, last]);
  const zeros = g.op('Expand', [g.constant('u8', [1], [ROW_ZERO]), g.op('Shape', [steps])]);
  const rows = g.op('Reshape', [x, g.constant('i64', [2], [-1, inputs])]);
  const codes = g.op('Reshape', [
    g.op('QuantizeLinear', [rows, steps, zeros], { axis: 0 }),
    g.op('Shape', [x]),
  ]);
  const [one, zero] = [g.constant('f32', [], [1]), g.constant('u8', [], [ROW_ZERO])];
  return g.op('Mul', [g.op('MatMulIntegerToFloat', [codes, values, one, scales, zero], {}, MICROSOFT), step]);
}
