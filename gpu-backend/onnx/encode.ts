/** A graph as the bytes of an ONNX model file. */
import type { Attribute, Dimension, Graph, Initializer, Node, ValueInfo } from './graph.ts';
import { ELEMENT_TYPES, MICROSOFT } from './graph.ts';
import { ATTRIBUTE_TYPES, DATA_LOCATION_EXTERNAL, ModelProto } from './schema.ts';

/** Opset 24 brings the `Attention` that reads a padded cache; IR 11 is the version that goes with it. */
export const OPSET_VERSION = 24;
const IR_VERSION = 11;

export function encodeModel(graph: Graph): Uint8Array {
  return ModelProto.encode({
    ir_version: IR_VERSION,
    producer_name: 'maskroute',
    producer_version: '1',
    graph: encodeGraph(graph),
    opset_import: [
      { domain: '', version: OPSET_VERSION },
      { domain: MICROSOFT, version: 1 },
    ],
  }).finish();
}

const encodeGraph = (graph: Graph): object => ({
  name: graph.name,
  node: graph.nodes.map(encodeNode),
  initializer: graph.initializers.map(encodeInitializer),
  input: graph.inputs.map(encodeValueInfo),
  output: graph.outputs.map(encodeValueInfo),
});

const encodeNode = (node: Node): object => ({
  input: node.inputs,
  output: node.outputs,
  name: node.outputs.find((name) => name !== '') ?? '',
  op_type: node.op,
  domain: node.domain,
  attribute: Object.entries(node.attributes).map(([name, value]) => encodeAttribute(name, value)),
});

/** A plain number is an integer attribute; `{ float }` says otherwise, so that 1 and 1.0 are never mixed up. */
function encodeAttribute(name: string, value: Attribute): object {
  if (typeof value === 'number') return { name, type: ATTRIBUTE_TYPES.int, i: integer(value, name) };
  if (typeof value === 'string')
    return { name, type: ATTRIBUTE_TYPES.string, s: new TextEncoder().encode(value) };
  if ('float' in value) return { name, type: ATTRIBUTE_TYPES.float, f: value.float };
  if ('graph' in value) return { name, type: ATTRIBUTE_TYPES.graph, g: encodeGraph(value.graph) };
  return { name, type: ATTRIBUTE_TYPES.ints, ints: value.map((item) => integer(item, name)) };
}

function integer(value: number, name: string): number {
  if (!Number.isSafeInteger(value)) throw new RangeError(`attribute ${name} is ${value}, not an integer`);
  return value;
}

function encodeInitializer(initializer: Initializer): object {
  const { data } = initializer;
  const head = {
    dims: initializer.shape,
    data_type: ELEMENT_TYPES[initializer.type],
    name: initializer.name,
  };
  switch (data.kind) {
    case 'inline':
      return { ...head, raw_data: data.bytes };
    case 'external':
      return {
        ...head,
        data_location: DATA_LOCATION_EXTERNAL,
        external_data: [
          { key: 'location', value: data.file },
          { key: 'offset', value: String(data.offset) },
          { key: 'length', value: String(data.bytes) },
        ],
      };
  }
}

const encodeValueInfo = (info: ValueInfo): object => ({
  name: info.name,
  type: {
    tensor_type: { elem_type: ELEMENT_TYPES[info.type], shape: { dim: info.shape.map(encodeDimension) } },
  },
});

const encodeDimension = (dimension: Dimension): object =>
  typeof dimension === 'number' ? { dim_value: dimension } : { dim_param: dimension };
