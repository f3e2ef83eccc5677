/**
 * What learning on a model takes of memory, from its shape, and whether it is computed as a whole or layer by layer. As a
 * whole the graphs of the step, the loss, the teacher and the server are open together, each with its own packed weights.
 * Layer by layer (`layered-session.ts`) there is one piece at a time. LOG.md has what both were held against.
 */
import type { ModelConfig, WeightKind } from '../../model/model-source.ts';

/** Tokens of a batch that only the loss is taken of, and of a part of a training step. */
export const LOSS_BATCH_TOKENS = 768;
export const STEP_PART_TOKENS = 384;

export type MemoryPlan = {
  readonly kind: 'whole' | 'layers';
  /** The most that the process has, with pages of mapped files. */
  readonly memory_bytes: number;
  /** By layers: how many stay open beside the piece that is computed. */
  readonly layersKept: number;
};

export type WeightCounts = {
  readonly head: number;
  /** Of a layer: what multiplies the normed stream, and what gives the stream's next addend. */
  readonly reads: number;
  readonly writes: number;
  readonly all: number;
};

export function weightCounts(config: ModelConfig): WeightCounts {
  const { hiddenSize: H, ffnSize: F, headCount: N, kvHeadCount: G, headSize: D } = config;
  const head = H * config.vocabularySize;
  const reads = (N + 2 * G) * D * H + 2 * F * H;
  const writes = N * D * H + F * H;
  return { head, reads, writes, all: head + config.layerCount * (reads + writes) };
}

/** The whole where there is room for it, and else as many layers as there is room for. `available_bytes`: of the process. */
export function planMemory(config: ModelConfig, kind: WeightKind, available_bytes: number): MemoryPlan {
  const whole_bytes = wholeMemory(config, kind);
  if (whole_bytes <= available_bytes) return { kind: 'whole', memory_bytes: whole_bytes, layersKept: 0 };
  const { largest_bytes, layer_bytes, serving_bytes } = layeredMemory(config, kind);
  const room = Math.floor((KEPT_SHARE_MAX * (available_bytes - largest_bytes)) / layer_bytes);
  const layersKept = Math.min(config.layerCount, Math.max(0, room));
  const memory_bytes = Math.max(largest_bytes + layersKept * layer_bytes, serving_bytes);
  return { kind: 'layers', memory_bytes, layersKept };
}

/** Of the memory that is left, for layers that stay open: others need some, too. */
const KEPT_SHARE_MAX = 0.7;

/** Bytes a weight as the serving graph multiplies by it, with the pages of scales that stay mapped. */
const SERVED: Readonly<Record<WeightKind, number>> = { f32: 4, q8: 1.28, q4: 0.89 };
/** Codes of a step, with a scale a column, and in blocks; `training-weights.ts` says which goes where. */
const [COLUMNS, BLOCKS] = [1, 1.28];
/** What the process has besides. */
const BASE_BYTES = 150e6;
/** Room for what packing and scratch memory make larger. */
const OVERHEAD = 1.1;
const FLOAT_BYTES = 4;
/** Arrays of `[R, V]` that each graph has at a time, and what compares the logits of a scored text. */
const LOGITS = { loss: 3.3, teacher: 2.5, step: 6, scores: 12 } as const;
/** Floats that a gradient needs of a layer, a token: so many of the stream's width, and of the FFN's. */
const [KEPT_WIDTHS, KEPT_FFN_WIDTHS] = [10, 5];
/** Of a matrix while its training copies are made: as fp32, transposed, and rounded. */
const COPY_BYTES = 9.5;
/** Tokens of a text that is scored alone. */
const SCORED_TOKENS = 128;

/** Packed weights of one graph forward, and of what goes back through them beside. */
function stepBytes({ reads, writes }: { reads: number; writes: number }, kind: WeightKind) {
  const isExact = kind === 'f32';
  const own = SERVED[kind];
  return {
    forward: reads * (isExact ? own : COLUMNS) + writes * own,
    back: isExact ? 0 : reads * BLOCKS + writes * COLUMNS,
  };
}

const logitsBytes = ({ vocabularySize }: ModelConfig, arrays: number, tokens: number): number =>
  FLOAT_BYTES * arrays * tokens * vocabularySize;

/** What the gradient needs of a layer. */
const keptBytes = ({ hiddenSize, ffnSize }: ModelConfig): number =>
  FLOAT_BYTES * STEP_PART_TOKENS * (KEPT_WIDTHS * hiddenSize + KEPT_FFN_WIDTHS * ffnSize);

/** The engine that serves, and what compares its logits. */
const servingBytes = (config: ModelConfig, kind: WeightKind): number =>
  weightCounts(config).all * SERVED[kind] + logitsBytes(config, LOGITS.scores, SCORED_TOKENS);

function wholeMemory(config: ModelConfig, kind: WeightKind): number {
  const { head, reads, writes } = weightCounts(config);
  const layers = config.layerCount;
  const { forward, back } = stepBytes({ reads: head + layers * reads, writes: layers * writes }, kind);
  const scratch =
    logitsBytes(config, LOGITS.loss + LOGITS.teacher, LOSS_BATCH_TOKENS) +
    logitsBytes(config, LOGITS.step, STEP_PART_TOKENS) +
    layers * keptBytes(config);
  return BASE_BYTES + OVERHEAD * (servingBytes(config, kind) + 3 * forward + back + scratch);
}

function layeredMemory(config: ModelConfig, kind: WeightKind) {
  const { head, reads, writes } = weightCounts(config);
  const layer = stepBytes({ reads, writes }, kind);
  const ends = stepBytes({ reads: head, writes: 0 }, kind);
  const largestMatrix = Math.max(head, config.ffnSize * config.hiddenSize);
  const streams = FLOAT_BYTES * (config.layerCount + 1) * LOSS_BATCH_TOKENS * config.hiddenSize;
  const pieces = [
    layer.forward + layer.back + keptBytes(config),
    ends.forward + ends.back + logitsBytes(config, LOGITS.step, STEP_PART_TOKENS),
    ends.forward + logitsBytes(config, LOGITS.loss, LOSS_BATCH_TOKENS),
  ];
  const copying = kind === 'f32' ? 0 : COPY_BYTES * largestMatrix;
  return {
    layer_bytes: OVERHEAD * layer.forward,
    largest_bytes: BASE_BYTES + Math.max(copying, OVERHEAD * (streams + Math.max(...pieces))),
    serving_bytes: BASE_BYTES + OVERHEAD * servingBytes(config, kind),
  };
}
