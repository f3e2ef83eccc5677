/** A graph as the bytes of an ONNX model file. */
import protobuf from 'protobufjs';
import {
  type Attribute,
  type Dimension,
  ELEMENT_TYPES,
  type Graph,
  type Initializer,
  MICROSOFT,
  type Node,
  type ValueInfo,
} from './graph.ts';

/*
 * The part of the ONNX protobuf schema (onnx.proto3) that our graphs use. The field numbers are ONNX's, so that readers of the
 * full schema read our files.
 */

const SCHEMA = `
syntax = "proto3";
package onnx;
message AttributeProto {
  string name = 1; float f = 2; int64 i = 3; bytes s = 4; TensorProto t = 5; GraphProto g = 6;
  repeated float floats = 7; repeated int64 ints = 8; repeated bytes strings = 9; int32 type = 20;
}
message ValueInfoProto { string name = 1; TypeProto type = 2; }
message NodeProto {
  repeated string input = 1; repeated string output = 2; string name = 3; string op_type = 4;
  repeated AttributeProto attribute = 5; string domain = 7;
}
message ModelProto {
  int64 ir_version = 1; string producer_name = 2; string producer_version = 3; GraphProto graph = 7;
  repeated OperatorSetIdProto opset_import = 8;
}
message StringStringEntryProto { string key = 1; string value = 2; }
message GraphProto {
  repeated NodeProto node = 1; string name = 2; repeated TensorProto initializer = 5;
  repeated ValueInfoProto input = 11; repeated ValueInfoProto output = 12; repeated ValueInfoProto value_info = 13;
}
message TensorProto {
  repeated int64 dims = 1; int32 data_type = 2; string name = 8; bytes raw_data = 9;
  repeated StringStringEntryProto external_data = 13; int32 data_location = 14;
}
message TensorShapeProto { repeated Dimension dim = 1;
  message Dimension { oneof value { int64 dim_value = 1; string dim_param = 2; } } }
message TypeProto { oneof value { Tensor tensor_type = 1; Sequence sequence_type = 4; }
  message Sequence { TypeProto elem_type = 1; }
  message Tensor { int32 elem_type = 1; TensorShapeProto shape = 2; } }
message OperatorSetIdProto { string domain = 1; int64 version = 2; }
`;

export const ModelProto = protobuf.parse(SCHEMA, { keepCase: true }).root.lookupType('onnx.ModelProto');

/** `AttributeProto.AttributeType`. */
const ATTRIBUTE_TYPES = { float: 1, int: 2, string: 3, graph: 5, ints: 7 } as const;
const DATA_LOCATION_EXTERNAL = 1;

/** Opset 24 has the `Attention` that reads a padded cache; IR version 11 belongs to it. */
const OPSET_VERSION = 24;
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
  value_info: graph.described.map(encodeValueInfo),
});

const encodeNode = (node: Node): object => ({
  input: node.inputs,
  output: node.outputs,
  name: node.outputs.find((name) => name !== '') ?? '',
  op_type: node.op,
  domain: node.domain,
  attribute: Object.entries(node.attributes).map(([name, value]) => encodeAttribute(name, value)),
});

/** A plain number is an integer attribute; a float is `{ float }`, so that 1 and 1.0 are never mixed up. */
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

const encodeValueInfo = ({ name, type, shape, isSequence = false }: ValueInfo): object => {
  const element = { elem_type: ELEMENT_TYPES[type] };
  if (isSequence) return { name, type: { sequence_type: { elem_type: { tensor_type: element } } } };
  return { name, type: { tensor_type: { ...element, shape: { dim: shape.map(encodeDimension) } } } };
};

const encodeDimension = (dimension: Dimension): object =>
  typeof dimension === 'number' ? { dim_value: dimension } : { dim_param: dimension };
