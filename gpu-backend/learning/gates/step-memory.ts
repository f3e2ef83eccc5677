/**
 * Estimates the memory that learning on a model takes, from the model's shape, and decides whether it is computed as a
 * whole or layer by layer. As a whole, the graphs of the step, the loss, the teacher and the serving engine are open
 * together, each with its own packed weights. Layer by layer (`layered-session.ts`) one piece is open at a time. LOG.md
 * compares both estimates with measurements.
 */
import type { ModelConfig, WeightKind } from '../../model/model-source.ts';
import { QUANT_BLOCK } from '../../model/quantization/quantize.ts';
import { innerKind } from './training-weights.ts';

/** Tokens of a batch for the loss alone, and of a part of a training step. */
export const LOSS_BATCH_TOKENS = 768;
export const STEP_PART_TOKENS = 384;

export type MemoryPlan = {
  readonly kind: 'whole' | 'layers';
  /** Peak memory of the process, including pages of mapped files. */
  readonly memory_bytes: number;
  /** Layer by layer: how many layers stay open in addition to the current piece. */
  readonly layersKept: number;
};

type WeightCounts = {
  readonly head: number;
  /**
   * Weights of a layer: matrices that read the normed stream (q, k, v, gate, up), and matrices that write to the stream
   * (output, down).
   */
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

/** Plans the whole model if it fits into `available_bytes`, else layer by layer with as many open layers as fit. */
export function planMemory(config: ModelConfig, kind: WeightKind, available_bytes: number): MemoryPlan {
  const whole_bytes = wholeMemory(config, kind);
  if (whole_bytes <= available_bytes) return { kind: 'whole', memory_bytes: whole_bytes, layersKept: 0 };
  const { largest_bytes, layer_bytes, serving_bytes } = layeredMemory(config, kind);
  const room = Math.floor((KEPT_SHARE_MAX * (available_bytes - largest_bytes)) / layer_bytes);
  const layersKept = Math.min(config.layerCount, Math.max(0, room));
  const memory_bytes = Math.max(largest_bytes + layersKept * layer_bytes, serving_bytes);
  return { kind: 'layers', memory_bytes, layersKept };
}

/** Share of the remaining memory for layers that stay open; other processes need some, too. */
const KEPT_SHARE_MAX = 0.7;

/** Bytes a weight in the serving graph, including the mapped pages of scales. */
const SERVED: Readonly<Record<WeightKind, number>> = { f32: 4, q8: 1.28, q4: 0.89, 'q8-columns': 1.06 };
/**
 * Bytes a weight of a quantized matrix in a training step: with one scale a column, and in blocks (see
 * `training-weights.ts`). An upper bound with AMX, where these have one scale a column, too.
 */
const [COLUMNS, BLOCKS] = [1, 1.28];
/** Memory of the process without any graph. */
const BASE_BYTES = 150e6;
/** Factor for packing and scratch memory. */
const OVERHEAD = 1.1;
const FLOAT_BYTES = 4;
/** `[R, V]` arrays that each graph holds at a time; `scores`: in comparing the logits of a scored text. */
const LOGITS = { loss: 3.3, teacher: 2.5, step: 6, scores: 12 } as const;
/** Values that gradients need inside a layer, for each token: multiples of the hidden size and of the FFN's size. */
const [KEPT_WIDTHS, KEPT_FFN_WIDTHS] = [10, 5];
/** More multiples of the hidden size where blocks end with a norm. */
const POST_NORM_WIDTHS = 6;
/** Bytes a weight while a matrix's training copies are made: fp32, transposed, and quantized. By block 0.9 less. */
const COPY_BYTES = 10.3;
/** Tokens of one scored text. */
const SCORED_TOKENS = 128;

/** Bytes of packed weights: for a forward pass, and for the backward products in addition. */
function stepBytes({ reads, writes }: { reads: number; writes: number }, kind: WeightKind) {
  const isExact = kind === 'f32';
  const own = SERVED[innerKind(kind)];
  return {
    forward: reads * (isExact ? own : COLUMNS) + writes * own,
    back: isExact ? 0 : reads * BLOCKS + writes * COLUMNS,
  };
}

const logitsBytes = ({ vocabularySize }: ModelConfig, arrays: number, tokens: number): number =>
  FLOAT_BYTES * arrays * tokens * vocabularySize;

/** Bytes of the values that gradients need inside one layer. */
function keptBytes({ hiddenSize, ffnSize, postNorms }: ModelConfig): number {
  const widths = KEPT_WIDTHS + (postNorms ? POST_NORM_WIDTHS : 0);
  return FLOAT_BYTES * STEP_PART_TOKENS * (widths * hiddenSize + KEPT_FFN_WIDTHS * ffnSize);
}

/** Bytes of the serving engine, and of comparing its logits. */
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
  // By block, a head whose vocabulary is no whole number of blocks is in memory once more.
  const filled = config.vocabularySize % QUANT_BLOCK === 0 ? 0 : FLOAT_BYTES * head;
  const copying = kind === 'f32' ? 0 : COPY_BYTES * largestMatrix + filled;
  return {
    layer_bytes: OVERHEAD * layer.forward,
    largest_bytes: BASE_BYTES + Math.max(copying, OVERHEAD * (streams + Math.max(...pieces))),
    serving_bytes: BASE_BYTES + OVERHEAD * servingBytes(config, kind),
  };
}
