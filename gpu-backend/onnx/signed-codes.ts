/**
 * Products of signed codes of weights, on CPUs that do not multiply them exactly. Those with AVX2 and without VNNI add up pairs of
 * products in 16 bits, which overflow for codes of 8 bits. A graph that is opened there gets unsigned codes, whose products
 * all CPUs add up in 32 bits; so all compute the same bits. VNNI and AMX need signed codes for their speed.
 *
 * The runtime has an option for this (`session.x64quantprecision`), but it leaves out weights that branches read, and also turns
 * codes on CPUs with VNNI.
 */
import { encodeModel } from './encode.ts';
import {
  type Attribute,
  ELEMENT_TYPES,
  type Graph,
  GraphBuilder,
  type Initializer,
  MICROSOFT,
  type Node,
} from './graph.ts';
import { createSession, floats, tensor } from './session.ts';

/** The graph, as this CPU multiplies it exactly. */
export const exactHere = async (graph: Graph): Promise<Graph> =>
  (await multipliesSignedExactly()) ? graph : withUnsignedCodes(graph);

/** Whether this CPU does. It is tried once. */
export function multipliesSignedExactly(): Promise<boolean> {
  areSignedExact ??= multipliesLargest();
  return areSignedExact;
}
let areSignedExact: Promise<boolean> | undefined;

/** Multiplies the largest codes that there are: if anything overflows, they do. */
async function multipliesLargest(): Promise<boolean> {
  const [rows, inputs, outputs] = [8, 64, 16];
  const [activation, weight] = [255, 127];
  const g = new GraphBuilder('signed_codes');
  const x = g.input('x', 'u8', [rows, inputs]);
  const bytes = new Uint8Array(inputs * outputs).fill(weight);
  const weights = g.initializer('w', 'i8', [inputs, outputs], { kind: 'inline', bytes });
  const one = g.constant('f32', [], [1]);
  const y = g.op('MatMulIntegerToFloat', [x, weights, one, one], {}, MICROSOFT);
  g.output(y, 'f32', [rows, outputs]);
  const session = await createSession(encodeModel(g.graph), { threads: 1, spinning: false });
  try {
    const codes = new Uint8Array(rows * inputs).fill(activation);
    const found = await session.run({ x: tensor('u8', codes, [rows, inputs]) }, [y.name]);
    return floats(found[y.name]!).every((value) => value === inputs * activation * weight);
  } finally {
    await session.release();
  }
}

/** Products whose second input is codes of weights, and the input that is their code of 0. */
const ZERO_INPUTS: Readonly<Record<string, number>> = { MatMulIntegerToFloat: 5, DynamicQuantizeMatMul: 3 };
const [SIGN, ZERO] = [0x80, 128];

/** The runtime computes the codes once, when it opens the graph. */
export function withUnsignedCodes(graph: Graph): Graph {
  const isCodes = ({ type }: Initializer) => type === 'i8';
  const codes = graph.initializers.filter(isCodes);
  const branches = (value: Attribute): Attribute =>
    typeof value === 'object' && 'graph' in value ? { graph: withUnsignedCodes(value.graph) } : value;
  const turned = graph.nodes.map((node) => {
    const attributes = Object.fromEntries(
      Object.entries(node.attributes).map(([name, value]) => [name, branches(value)]),
    );
    const at = ZERO_INPUTS[node.op];
    if (at === undefined) return { ...node, attributes };
    const inputs = [...node.inputs, ...Array<string>(at).fill('')].slice(0, at);
    return { ...node, attributes, inputs: [...inputs, zeroOf(graph)] };
  });
  const hasProducts = graph.nodes.some(({ op }) => op in ZERO_INPUTS);
  const constant = (name: string, type: 'i8' | 'u8', value: number) => ({
    name,
    type,
    shape: [],
    data: { kind: 'inline' as const, bytes: Uint8Array.of(value) },
  });
  return {
    ...graph,
    nodes: [...codes.flatMap(({ name }) => turning(graph, name)), ...turned],
    initializers: [
      ...graph.initializers.map((one) => (isCodes(one) ? { ...one, name: signed(one.name) } : one)),
      ...(codes.length > 0 ? [constant(signOf(graph), 'i8', SIGN)] : []),
      ...(hasProducts ? [constant(zeroOf(graph), 'u8', ZERO)] : []),
    ],
  };
}

const signed = (name: string) => `${name}.signed`;
const [signOf, zeroOf] = ['sign', 'zero'].map(
  (what) =>
    ({ name }: Graph) =>
      `${name}.${what}`,
) as [(graph: Graph) => string, (graph: Graph) => string];

/** Flipping the sign adds 128 to a code of two's complement. */
const turning = (graph: Graph, name: string): Node[] => [
  node('BitwiseXor', [signed(name), signOf(graph)], `${name}.flipped`),
  { ...node('Cast', [`${name}.flipped`], name), attributes: { to: ELEMENT_TYPES.u8 } },
];

const node = (op: string, inputs: readonly string[], output: string): Node => ({
  op,
  domain: '',
  inputs,
  outputs: [output],
  attributes: {},
});
