/**
 * What learning will take of memory and time, before it begins. Memory follows from the shapes of the graphs that are open
 * together; time from the positions that a run computes at the most, at the pace of this machine's products. LOG.md has what
 * both were held against.
 */
import { totalmem } from 'node:os';
import type { ModelConfig, WeightKind } from '../model/model-source.ts';
import { openProducts } from '../model/quantization/products.ts';
import type { LearnEffort } from './search/effort.ts';
import { LOSS_BATCH_TOKENS, STEP_PART_TOKENS } from './search/workbench.ts';

export type Forecast = {
  /** The most that the process has, with pages of mapped files. */
  readonly memory_bytes: number;
  /** At the most; searches often end earlier. */
  readonly time_s: number;
};

/** Multiply-adds a second of products in fp32, by so many threads, at the moment. */
export async function measurePace(threads: number): Promise<number> {
  const [rows, inner] = [384, 1024];
  await using products = await openProducts(threads);
  const [a, b] = [new Float32Array(rows * inner).fill(0.5), new Float32Array(inner * inner).fill(0.5)];
  const times: number[] = [];
  for (let run = 0; run < 5; run++) {
    const begun_ms = performance.now();
    await products.multiply(a, b, inner);
    times.push(performance.now() - begun_ms);
  }
  return (rows * inner * inner) / (Math.min(...times) / 1000);
}

/** Backward products, with the forward ones that are computed once more. */
const BACKWARD = 3;
/** How much faster products of codes are: a training step of the default model makes 336e9 multiply-adds a second where fp32 has 110. */
const CODES_PACE = 3;
/** Tokens a scored position: beginnings that prompts share are computed and not scored. */
const TOKENS_A_POSITION = 1.5;

/** `pace`: multiply-adds a second in fp32. */
export function forecastLearning(
  config: ModelConfig,
  weights: WeightKind,
  effort: LearnEffort,
  clusterCount: number,
  pace: number,
): Forecast {
  const positions = positionsOf(config, effort, clusterCount);
  return {
    memory_bytes: memoryOf(config, weights),
    time_s:
      (positions * TOKENS_A_POSITION * weightsOf(config).all) /
      (weights === 'f32' ? pace : CODES_PACE * pace),
  };
}

function weightsOf({
  hiddenSize: H,
  ffnSize: F,
  headCount: N,
  kvHeadCount: G,
  headSize: D,
  ...config
}: ModelConfig) {
  const head = H * config.vocabularySize;
  const reads = config.layerCount * ((N + 2 * G) * D * H + 2 * F * H);
  const writes = config.layerCount * (N * D * H + F * H);
  return { head, reads, writes, all: head + reads + writes };
}

/** Bytes a weight as each graph multiplies by it. */
const BYTES: Readonly<Record<WeightKind, number>> = { f32: 4, q8: 1.16, q4: 0.7 };
/** Codes with a scale a column, and in blocks; `training-weights.ts` says which goes where. */
const [COLUMNS, BLOCKS] = [1, 1.16];
/** What the process has besides; and by how much packing and scratch memory make the rest larger, as the default model shows. */
const BASE_BYTES = 400e6;
const OVERHEAD = 1.25;

/** The serving graph, the step's, the loss's and the teacher's are open together, each with its own packed weights. */
function memoryOf(config: ModelConfig, kind: WeightKind): number {
  const { head, reads, writes } = weightsOf(config);
  const own = BYTES[kind];
  const isExact = kind === 'f32';
  const forward = (head + reads) * (isExact ? own : COLUMNS) + writes * own;
  const back = isExact ? 0 : (head + reads) * BLOCKS + writes * COLUMNS;
  const serving = (head + reads + writes) * own;
  const logits = 4 * LOSS_BATCH_TOKENS * config.vocabularySize * 4;
  const kept = 4 * STEP_PART_TOKENS * config.layerCount * (6 * config.hiddenSize + 3 * config.ffnSize);
  return BASE_BYTES + OVERHEAD * (serving + 3 * forward + back + logits + kept);
}

/** Positions times passes, of all stages. */
function positionsOf({ layerCount }: ModelConfig, effort: LearnEffort, clusterCount: number): number {
  const blocks = 2 * layerCount;
  const search = ({
    searchPositions,
    glanceParts,
    rounds,
    exchanges,
    gateSteps,
  }: LearnEffort['one' | 'group']) =>
    LOSS_BATCH_TOKENS * glanceParts * blocks * (1 + rounds) +
    searchPositions * exchanges * (1 + rounds) +
    STEP_PART_TOKENS * 2 * gateSteps * BACKWARD;
  const { one, group, turns } = effort;
  const groups = clusterCount > 1 ? Math.min(clusterCount, effort.masksMax) : 0;
  return (
    search(one) +
    LOSS_BATCH_TOKENS * one.glanceParts * one.greedyEvaluations +
    groups * turns * search(group) +
    6 * effort.choicePositions +
    (groups + 1) * (effort.sharePositions + effort.heldOutPositions)
  );
}

const LONG_s = 86_400;

/** What a person is told before the work; `quick`: the same run with less work, where that is another one. */
export function forecastLines(forecast: Forecast, quick: Forecast | undefined): string[] {
  const { memory_bytes, time_s } = forecast;
  const lines = [
    `Learning takes about ${gigabytes(memory_bytes)} of memory and up to ${hours(time_s)} on this machine.`,
  ];
  if (memory_bytes > totalmem())
    lines.push(
      `That is more memory than the ${gigabytes(totalmem())} that this machine has: it will not fit.`,
    );
  if (time_s > LONG_s && quick !== undefined)
    lines.push(
      `That is days. With --quick it is up to ${hours(quick.time_s)}; --clusters 1 searches for one mask alone.`,
    );
  return lines;
}

const gigabytes = (bytes: number): string => `${(bytes / 1e9).toFixed(1)} GB`;

function hours(seconds: number): string {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 2 * LONG_s ? `${(seconds / 3600).toFixed(1)} h` : `${(seconds / LONG_s).toFixed(1)} days`;
}
