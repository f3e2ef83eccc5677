/**
 * Products of signed codes of weights, for CPUs that do not multiply them exactly. Those with AVX2 and without VNNI add up pairs of
 * products in 16 bits, which overflow for codes of 8 bits. There `session.ts` opens a graph with unsigned codes, whose products all
 * CPUs add up in 32 bits; so all compute the same bits. VNNI and AMX need signed codes for their speed.
 *
 * The runtime has an option for this (`session.x64quantprecision`), but it leaves out weights that branches read, and also turns
 * codes on CPUs with VNNI.
 */
import { readFile } from 'node:fs/promises';
import { type Graph, type Initializer, type Node, withBranches } from './graph.ts';

/** Products whose second input is codes of weights, and which of their inputs is the code of 0. */
const ZERO_INPUTS: Readonly<Record<string, number>> = { MatMulIntegerToFloat: 5, DynamicQuantizeMatMul: 3 };

/** The code of 0, and the highest bit: flipping it in two's complement adds 128. */
const ZERO = 128;

/** Whether the CPU has AMX, which multiplies matrices of signed codes many times as fast as codes in blocks. Linux alone tells. */
export const hasAmx = (): Promise<boolean> => hasFlag(/\bamx_int8\b/);

/** Whether the CPU multiplies many rows by codes by column faster than by codes in blocks (docs/models.md). Linux alone tells. */
export const isFastByColumn = (): Promise<boolean> => hasFlag(/\b(amx_int8|avx512_vnni)\b/);

const hasFlag = async (flag: RegExp): Promise<boolean> =>
  process.platform === 'linux' && flag.test(await readFile('/proc/cpuinfo', 'utf8'));

/** The same graph with 128 more in each code. The runtime computes the codes once, when it opens the graph. */
export function withUnsignedCodes(graph: Graph): Graph {
  const zero = `${graph.name}.zero`;
  const codes = graph.initializers.filter(isSigned);
  const hasProducts = graph.nodes.some(({ op }) => op in ZERO_INPUTS);
  return {
    ...graph,
    nodes: [
      ...codes.map(({ name }) => flipped(name, zero)),
      ...graph.nodes.map((node) => withZero(node, zero)),
    ],
    initializers: [
      ...graph.initializers.map((one) => (isSigned(one) ? asBytes(one) : one)),
      ...(codes.length > 0 || hasProducts ? [constant(zero, ZERO)] : []),
    ],
  };
}

const isSigned = ({ type }: Initializer): boolean => type === 'i8';
const signed = (name: string) => `${name}.signed`;

/** The same bytes, under another name. */
const asBytes = (codes: Initializer): Initializer => ({ ...codes, name: signed(codes.name), type: 'u8' });

const flipped = (name: string, zero: string): Node => ({
  op: 'BitwiseXor',
  domain: '',
  inputs: [signed(name), zero],
  outputs: [name],
  attributes: {},
});

function withZero(node: Node, zero: string): Node {
  const attributes = withBranches(node.attributes, withUnsignedCodes);
  const at = ZERO_INPUTS[node.op];
  if (at === undefined) return { ...node, attributes };
  const leftOut = Array<string>(at - node.inputs.length).fill('');
  return { ...node, attributes, inputs: [...node.inputs, ...leftOut, zero] };
}

const constant = (name: string, byte: number): Initializer => ({
  name,
  type: 'u8',
  shape: [],
  data: { kind: 'inline', bytes: Uint8Array.of(byte) },
});
