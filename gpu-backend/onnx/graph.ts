/**
 * A small typed builder of ONNX graphs. A graph is plain data (nodes, initializers, inputs, outputs), which the builder
 * appends to and `encode.ts` encodes to protobuf.
 */

/** ONNX `TensorProto.DataType` numbers of the element types in use. */
export const ELEMENT_TYPES = { f32: 1, u8: 2, i8: 3, i32: 6, i64: 7, bool: 9, f16: 10, u4: 21 } as const;
export type ElementType = keyof typeof ELEMENT_TYPES;

/** Float types of a GPU's computations and its KV cache. */
export const FLOAT_TYPES = ['f32', 'f16'] as const;
export type FloatType = (typeof FLOAT_TYPES)[number];

/** A number is a fixed size, a string a symbolic dimension. */
export type Dimension = number | string;

/** A tensor inside the graph, known by its name. */
export type Value = { readonly name: string };

export type ValueInfo = {
  readonly name: string;
  readonly type: ElementType;
  readonly shape: readonly Dimension[];
  /** A sequence of such tensors. */
  readonly isSequence?: boolean;
};

/** An initializer's bytes: in the graph itself, or in a file beside it. */
export type InitializerData =
  | { readonly kind: 'inline'; readonly bytes: Uint8Array }
  | { readonly kind: 'external'; readonly file: string; readonly offset: number; readonly bytes: number };

export type Initializer = ValueInfo & { readonly shape: readonly number[]; readonly data: InitializerData };

export type Attribute =
  | number
  | string
  | readonly number[]
  | { readonly float: number }
  | { readonly graph: Graph };
export type Attributes = { readonly [name: string]: Attribute };

/** The domain of ONNX Runtime's contrib operators (MatMulNBits, RotaryEmbedding, …). */
export const MICROSOFT = 'com.microsoft';

export type Node = {
  readonly op: string;
  readonly domain: string;
  /** Names; `''` for an optional input that is left out. */
  readonly inputs: readonly string[];
  readonly outputs: readonly string[];
  readonly attributes: Attributes;
  /** Set where several nodes compute one product, at the last of them; gradients take them for one. */
  readonly product?: Product;
};

/** The output is `input` `[..., n]` times frozen weights: `[..., outputs]`. */
export type Product = {
  readonly input: string;
  /** The name of the weights' values. */
  readonly weights: string;
  readonly outputs: number;
};

export type Graph = {
  readonly name: string;
  readonly nodes: Node[];
  readonly initializers: Initializer[];
  readonly inputs: ValueInfo[];
  readonly outputs: ValueInfo[];
  /** Inner values whose shape the runtime cannot infer. */
  readonly described: ValueInfo[];
};

const emptyGraph = (name: string): Graph => ({
  name,
  nodes: [],
  initializers: [],
  inputs: [],
  outputs: [],
  described: [],
});

/**
 * Appends to one graph; subgraphs (branches of `If`) share the counter, so names are unique in the model. A constant or node that
 * the graph has already is not appended again, so whoever builds a part need not know what other parts compute.
 */
export class GraphBuilder {
  readonly graph: Graph;
  readonly #names: { next: number };
  /** Values of constants and outputs of nodes, by what they are computed from. */
  readonly #made = new Map<string, readonly Value[]>();

  constructor(name: string, names: { next: number } = { next: 0 }) {
    this.graph = emptyGraph(name);
    this.#names = names;
  }

  /** A graph input. */
  input(name: string, type: ElementType, shape: readonly Dimension[]): Value {
    this.graph.inputs.push({ name, type, shape });
    return { name };
  }

  /** Declares a value computed by this graph as its output. */
  output(value: Value, type: ElementType, shape: readonly Dimension[]): void {
    this.graph.outputs.push({ name: value.name, type, shape });
  }

  /** Says what shape an inner value has. */
  describe(value: Value, type: ElementType, shape: readonly Dimension[]): void {
    this.graph.described.push({ name: value.name, type, shape });
  }

  /** Declares a sequence computed by this graph as its output. */
  outputSequence(value: Value, type: ElementType): void {
    this.graph.outputs.push({ name: value.name, type, shape: [], isSequence: true });
  }

  initializer(name: string, type: ElementType, shape: readonly number[], data: InitializerData): Value {
    this.graph.initializers.push({ name, type, shape, data });
    return { name };
  }

  /** A small constant, stored in the graph. A scalar has shape `[]`. */
  constant(type: ConstantType, shape: readonly number[], values: readonly number[]): Value {
    const make = () => {
      const bytes = constantBytes(type, values);
      return [this.initializer(this.fresh('const'), type, shape, { kind: 'inline', bytes })];
    };
    // JSON has no infinities.
    return this.#once([type, shape, values.map(String)], make)[0]!;
  }

  /** A list of whole numbers, as operators take shapes, axes and sizes. */
  ints(...values: readonly number[]): Value {
    return this.constant('i64', [values.length], values);
  }

  reshape(value: Value, ...shape: readonly number[]): Value {
    return this.op('Reshape', [value, this.ints(...shape)]);
  }

  /** Pieces of these sizes along `axis`, which is the first unless given. */
  split(value: Value, sizes: readonly number[], axis?: number): readonly Value[] {
    const attributes = axis === undefined ? {} : { axis };
    return this.ops('Split', [value, this.ints(...sizes)], sizes.length, attributes);
  }

  /** One node with one output. `undefined` leaves an optional input out. */
  op(op: string, inputs: readonly (Value | undefined)[], attributes: Attributes = {}, domain = ''): Value {
    return this.ops(op, inputs, 1, attributes, domain)[0]!;
  }

  /** One node with several outputs. */
  ops(
    op: string,
    inputs: readonly (Value | undefined)[],
    outputCount: number,
    attributes: Attributes = {},
    domain = '',
  ): readonly Value[] {
    const make = () => {
      const outputs = Array.from({ length: outputCount }, () => this.fresh(op));
      this.node(op, inputs, outputs, attributes, domain);
      return outputs.map((name) => ({ name }));
    };
    // Branches are never equal: they have names of their own.
    return op === 'If' ? make() : this.#once([op, inputs, outputCount, attributes, domain], make);
  }

  #once(what: readonly unknown[], make: () => readonly Value[]): readonly Value[] {
    const key = JSON.stringify(what);
    const made = this.#made.get(key) ?? make();
    this.#made.set(key, made);
    return made;
  }

  /** One node with given output names, such as graph outputs; `''` leaves an output out. */
  node(
    op: string,
    inputs: readonly (Value | undefined)[],
    outputs: readonly string[],
    attributes: Attributes = {},
    domain = '',
  ): void {
    const names = inputs.map((input) => input?.name ?? '');
    while (names.at(-1) === '') names.pop();
    this.graph.nodes.push({ op, domain, inputs: names, outputs, attributes });
  }

  /** Says that the last node ends a product. */
  endProduct(product: Product): void {
    this.graph.nodes.push({ ...this.graph.nodes.pop()!, product });
  }

  /** A branch: `build` appends to it and names its outputs. Values of the outer graph are visible inside. */
  subgraph(name: string, build: (branch: GraphBuilder) => void): Graph {
    const branch = new GraphBuilder(this.fresh(name), this.#names);
    build(branch);
    return branch.graph;
  }

  fresh(prefix: string): string {
    return `${prefix}_${this.#names.next++}`;
  }
}

export const NOTHING_BACK = 'nothing_back';

/**
 * Declares a first output for `Session.runInPlace`: a sequence of `any` tensor of the graph. It prevents copies: after a run,
 * onnxruntime-node 1.30 copies each output in order, even outputs in our own memory, such as whole caches. It cannot copy a
 * sequence, and stops there. Versions that can, or that copy nothing, give the same results.
 */
export function giveNothingBack(g: GraphBuilder, any: Value, type: ElementType): void {
  g.node('SequenceConstruct', [any], [NOTHING_BACK]);
  g.outputSequence({ name: NOTHING_BACK }, type);
}

type ConstantType = 'f32' | 'f16' | 'i64' | 'i32' | 'u8' | 'bool';

function constantBytes(type: ConstantType, values: readonly number[]): Uint8Array {
  switch (type) {
    case 'f32':
      return new Uint8Array(Float32Array.from(values).buffer);
    case 'f16':
      return new Uint8Array(Float16Array.from(values).buffer);
    case 'i32':
      return new Uint8Array(Int32Array.from(values).buffer);
    case 'i64':
      return new Uint8Array(BigInt64Array.from(values.map(BigInt)).buffer);
    case 'u8':
    case 'bool':
      return Uint8Array.from(values);
  }
}

/**
 * The graph in half precision: everything in fp32 becomes fp16, and the outputs `kept` are cast back. Weights stay fp32 in
 * their file; ONNX Runtime casts them once, when it opens the graph.
 */
export function inHalves(graph: Graph, kept: readonly string[]): Graph {
  const halved = halfGraph(graph);
  const outputs = graph.outputs.filter(({ name }) => kept.includes(name));
  const renamed = new Map(outputs.map(({ name }) => [name, `${name}.f16`]));
  return {
    ...halved,
    nodes: [
      ...halved.nodes.map((node) => ({
        ...node,
        outputs: node.outputs.map((name) => renamed.get(name) ?? name),
      })),
      ...outputs.map(({ name }) => castNode(renamed.get(name)!, name, 'f32')),
    ],
    outputs: halved.outputs.map((output) => outputs.find(({ name }) => name === output.name) ?? output),
  };
}

function halfGraph({ name, nodes, initializers, inputs, outputs, described }: Graph): Graph {
  const half = <T extends ValueInfo>(info: T): T => (info.type === 'f32' ? { ...info, type: 'f16' } : info);
  const isWeight = ({ type, data }: Initializer) => type === 'f32' && data.kind === 'external';
  const source = (weight: string) => `${weight}.f32`;
  return {
    name,
    nodes: [
      ...initializers.filter(isWeight).map((weight) => castNode(source(weight.name), weight.name, 'f16')),
      ...nodes.map((node) => ({ ...node, attributes: withBranches(node.attributes, halfGraph) })),
    ],
    initializers: initializers.map((one) =>
      isWeight(one) ? { ...one, name: source(one.name) } : halfConstant(one),
    ),
    inputs: inputs.map(half),
    outputs: outputs.map(half),
    described: described.map(half),
  };
}

function halfConstant(initializer: Initializer): Initializer {
  const { type, data } = initializer;
  if (type !== 'f32' || data.kind !== 'inline') return initializer;
  const { buffer, byteOffset, byteLength } = data.bytes;
  const bytes = new Uint8Array(
    Float16Array.from(new Float32Array(buffer, byteOffset, byteLength / 4)).buffer,
  );
  return { ...initializer, type: 'f16', data: { kind: 'inline', bytes } };
}

const castNode = (from: string, to: string, type: ElementType): Node => ({
  op: 'Cast',
  domain: '',
  inputs: [from],
  outputs: [to],
  attributes: { to: ELEMENT_TYPES[type] },
});

/** A node's attributes with `change` of its branches. */
export const withBranches = (attributes: Attributes, change: (branch: Graph) => Graph): Attributes =>
  Object.fromEntries(
    Object.entries(attributes).map(([name, value]) => [
      name,
      typeof value === 'object' && 'graph' in value ? { graph: change(value.graph) } : value,
    ]),
  );
