/**
 * When a training step computes what its gradients need of a block once more instead of keeping it (gradient
 * checkpointing): when memory asks for it. What is kept grows with tokens and with the model's width; computed again it
 * is one block's at a time, for the price of another forward pass. The numbers are the same to the last bit, so a run
 * may go on on a machine that decides otherwise.
 */
import type { Graph } from '../onnx/graph.ts';

/** What a step of learning takes at most: 6 sequences of 128 tokens. */
const STEP_SIZES = { B: 6, S: 128 } as const;
/** Of the memory that the process may still have; the rest is for weights, which are packed once more when they load. */
const KEPT_SHARE_MAX = 1 / 3;
const FLOAT_BYTES = 4;

/** Whether `graph`, which keeps everything, would keep too much. `available_bytes`: what the process may still have. */
export const asksForRecompute = (graph: Graph, available_bytes = process.availableMemory()): boolean =>
  keptBytes(graph, STEP_SIZES) > KEPT_SHARE_MAX * available_bytes;

/**
 * Bytes of what branches give beside their own value: what they hand on for their gradients, all of it f32, and the few
 * gradients that are not by the stream. `sizes`: of the free dimensions, by name.
 */
export function keptBytes(graph: Graph, sizes: Readonly<Record<string, number>>): number {
  let floats = 0;
  for (const { op, attributes } of graph.nodes) {
    const branch = attributes.then_branch;
    if (op !== 'If' || typeof branch !== 'object' || !('graph' in branch)) continue;
    // The first output is the branch's own.
    for (const { shape } of branch.graph.outputs.slice(1)) {
      floats += shape.reduce<number>(
        (all, size) => all * (typeof size === 'number' ? size : sizeOf(size, sizes)),
        1,
      );
    }
  }
  return FLOAT_BYTES * floats;
}

function sizeOf(name: string, sizes: Readonly<Record<string, number>>): number {
  const size = sizes[name];
  if (size === undefined) throw new RangeError(`the size of ${name} is not known`);
  return size;
}
