/**
 * What learning will take of memory and time, before it begins. Memory follows from the shapes of the graphs that are open
 * together (`gates/step-memory.ts`); time from the positions that a run computes at the most, at the pace of this machine's
 * products. LOG.md has what both were held against.
 */
import { totalmem } from 'node:os';
import type { ModelConfig, WeightKind } from '../model/model-source.ts';
import { openProducts } from '../model/quantization/layer-steps.ts';
import {
  LOSS_BATCH_TOKENS,
  type MemoryPlan,
  planMemory,
  STEP_PART_TOKENS,
  weightCounts,
} from './gates/step-memory.ts';
import type { LearnEffort } from './search/effort.ts';

export type Forecast = {
  /** Whether the model is computed as a whole or layer by layer. */
  readonly plan: MemoryPlan['kind'];
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

/** Weights a second that are packed when a piece is opened: as fast as memory is read and written. */
const PACK_PACE = 4e8;
/** Weights a second that are rounded for training, once a model. */
const ROUND_PACE = 1.2e7;

type ForecastOptions = {
  readonly clusterCount: number;
  /** Multiply-adds a second in fp32. */
  readonly pace: number;
  /** What the process may have of memory. */
  readonly available_bytes: number;
};

export function forecastLearning(
  config: ModelConfig,
  weights: WeightKind,
  effort: LearnEffort,
  { clusterCount, pace, available_bytes }: ForecastOptions,
): Forecast {
  const plan = planMemory(config, weights, available_bytes);
  const positions = positionsOf(config, effort, clusterCount);
  const { reads, writes, all } = weightCounts(config);
  const opened = plan.kind === 'whole' ? 0 : all - plan.layersKept * (reads + writes);
  // Every batch of a search goes through the pieces that do not stay open; scoring has the serving graph, which does.
  const batches = (TOKENS_A_POSITION * positions.searched) / LOSS_BATCH_TOKENS;
  const products = (positions.searched + positions.scored) * TOKENS_A_POSITION * all;
  const isExact = weights === 'f32';
  return {
    plan: plan.kind,
    memory_bytes: plan.memory_bytes,
    time_s:
      products / (isExact ? pace : CODES_PACE * pace) +
      (batches * opened) / PACK_PACE +
      (isExact ? 0 : all / ROUND_PACE),
  };
}

/** Positions times passes, of all stages: by training graphs, and by the serving one. */
function positionsOf({ layerCount }: ModelConfig, effort: LearnEffort, clusterCount: number) {
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
  // The dense model needs no search.
  const sizes = clusterCount > 1 ? effort.sizes.filter((size) => size > 0).length : 0;
  return {
    searched:
      search(one) +
      LOSS_BATCH_TOKENS * one.glanceParts * one.greedyEvaluations +
      groups * turns * search(group) +
      sizes * (LOSS_BATCH_TOKENS * blocks + one.searchPositions * effort.sizeExchanges) +
      6 * effort.choicePositions,
    scored: (groups + sizes + 1) * (effort.sharePositions + effort.heldOutPositions),
  };
}

const LONG_s = 86_400;

/** A run with less work, and the flags that ask for it. */
type SmallerRun = { readonly flags: string; readonly forecast: Forecast };

/** What a person is told before the work. `smaller`: runs that may be asked for instead, the most work first. */
export function forecastLines(forecast: Forecast, smaller: readonly SmallerRun[]): string[] {
  const { memory_bytes, time_s, plan } = forecast;
  const how = plan === 'layers' ? ', layer by layer, for the whole model does not fit' : '';
  const lines = [
    `Learning takes about ${gigabytes(memory_bytes)} of memory${how}, and up to ${hours(time_s)} on this machine.`,
  ];
  if (memory_bytes > totalmem())
    lines.push(
      `That is more memory than the ${gigabytes(totalmem())} that this machine has: it will not fit.`,
    );
  if (time_s > LONG_s) lines.push(wayOut(time_s, smaller));
  return lines;
}

/** The most work that fits into a day, or the least that there is. */
function wayOut(time_s: number, smaller: readonly SmallerRun[]): string {
  const less = smaller.filter(({ forecast }) => forecast.time_s < time_s);
  const found = less.find(({ forecast }) => forecast.time_s <= LONG_s);
  if (found !== undefined)
    return `That is days. With ${found.flags} it is up to ${hours(found.forecast.time_s)}.`;
  const least = less.toSorted((a, b) => a.forecast.time_s - b.forecast.time_s)[0];
  if (least === undefined) return 'That is days, and there is no smaller run: it takes a faster machine.';
  return `That is days. The least, ${least.flags}, is up to ${hours(least.forecast.time_s)}; --queue hands the work to several machines.`;
}

const gigabytes = (bytes: number): string => `${(bytes / 1e9).toFixed(1)} GB`;

function hours(seconds: number): string {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 2 * LONG_s ? `${(seconds / 3600).toFixed(1)} h` : `${(seconds / LONG_s).toFixed(1)} days`;
}
