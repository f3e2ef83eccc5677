/**
 * Estimates the memory and time of a learning run before it begins. Memory follows from the shapes of the graphs that
 * are open together (`gates/step-memory.ts`); time from the most positions that a run may compute and this machine's
 * speed of matrix products. LOG.md compares both with measurements.
 */
import { totalmem } from 'node:os';
import { sumOf, times_ms } from '../measure.ts';
import { type Columns, multiplyPairs, multiplyTensor } from '../model/architectures/column-products.ts';
import { type Linear, multiply } from '../model/architectures/projections.ts';
import type { ModelConfig, WeightKind } from '../model/model-source.ts';
import { blocksOf, FOUR_BITS, PLAIN_8_BITS } from '../model/quantization/quantize.ts';
import type { InstalledModel } from '../model/store.ts';
import { openModelText } from '../model/tokenizer/model-text.ts';
import { encodeModel } from '../onnx/encode.ts';
import { GraphBuilder, type Value } from '../onnx/graph.ts';
import { createSession, exactHere, tensor } from '../onnx/session.ts';
import { createRandom } from '../random.ts';
import { type DataFiles, type DataSize, readRows } from './data/read-data.ts';
import { createSampler, scoredPositions } from './data/samples.ts';
import type { Rounding } from './gates/rounding.ts';
import {
  LOSS_BATCH_TOKENS,
  type MemoryPlan,
  planMemory,
  STEP_PART_TOKENS,
  weightCounts,
} from './gates/step-memory.ts';
import { innerKind } from './gates/training-weights.ts';
import { effortFor, type LearnEffort, STEP_PARTS } from './search/effort.ts';

export type Forecast = {
  /** Whether the model is computed as a whole or layer by layer. */
  readonly plan: MemoryPlan['kind'];
  /** Peak memory of the process, including pages of mapped files. */
  readonly memory_bytes: number;
  /** Upper bound; searches often end earlier. */
  readonly time_s: number;
};

/**
 * Multiply-adds a second of this machine, by the form of the weights. By column there are three: `q8-columns` has a scale for each
 * row of activations, `pairs` has two codes for each of them, and `columns`, in training steps alone, has one scale for all rows.
 * CPUs differ in all: codes in blocks have 0.7 times the pace of fp32 with AMX and 1.2 times with VNNI alone, `columns` 7 and 2.8
 * times.
 */
export type Paces = Readonly<Record<WeightKind | 'columns' | 'pairs', number>> & {
  /** Of a training step. */
  readonly rounding: Rounding;
};

/** Measures products on `threads` threads, under the machine's present load. `rounding`: the run's. */
export async function measurePaces(threads: number, rounding: Rounding): Promise<Paces> {
  const kind = (weights: WeightKind) => paceOf(threads, (g, x) => multiply(g, x, someWeights(g, weights)));
  return {
    rounding,
    f32: await kind('f32'),
    q8: await kind('q8'),
    q4: await kind('q4'),
    'q8-columns': await kind('q8-columns'),
    columns: await paceOf(threads, (g, x) => multiplyTensor(g, x, someColumns(g))),
    pairs: await paceOf(threads, (g, x) => multiplyPairs(g, x, someColumns(g))),
  };
}

const [PACE_ROWS, PACE_WIDTH, PACE_RUNS] = [384, 1024, 5];

async function paceOf(threads: number, product: (g: GraphBuilder, x: Value) => Value): Promise<number> {
  const g = new GraphBuilder('pace');
  const y = product(g, g.input('x', 'f32', [PACE_ROWS, PACE_WIDTH]));
  g.output(y, 'f32', [PACE_ROWS, PACE_WIDTH]);
  const graph = await exactHere(g.graph);
  const session = await createSession(encodeModel(graph), { threads, spinning: false });
  try {
    const x = tensor('f32', new Float32Array(PACE_ROWS * PACE_WIDTH).fill(0.5), [PACE_ROWS, PACE_WIDTH]);
    const times = await times_ms(PACE_RUNS, () => session.run({ x }, [y.name]));
    return (PACE_ROWS * PACE_WIDTH * PACE_WIDTH) / (Math.min(...times) / 1000);
  } finally {
    await session.release();
  }
}

/** Square weights of zeros: the time does not depend on the values. */
function someWeights(g: GraphBuilder, kind: WeightKind): Linear {
  const size = { outputs: PACE_WIDTH, inputs: PACE_WIDTH };
  if (kind === 'f32') return { kind, ...size, values: someTensor(g, kind, [PACE_WIDTH, PACE_WIDTH]) };
  if (kind === 'q8-columns') return { kind, ...someColumns(g) };
  const form = kind === 'q8' ? PLAIN_8_BITS : FOUR_BITS;
  const blocks = blocksOf(PACE_WIDTH, form);
  return {
    kind: 'nbits',
    ...form,
    ...size,
    values: someTensor(g, 'u8', [PACE_WIDTH, blocks, (form.blockSize * form.bits) / 8]),
    scales: someTensor(g, 'f32', [PACE_WIDTH, blocks]),
    zeroPoints: someTensor(g, 'u8', [PACE_WIDTH, (blocks * form.bits) / 8]),
  };
}

const someColumns = (g: GraphBuilder): Columns => ({
  outputs: PACE_WIDTH,
  inputs: PACE_WIDTH,
  values: someTensor(g, 'i8', [PACE_WIDTH, PACE_WIDTH]),
  scales: someTensor(g, 'f32', [PACE_WIDTH]),
});

function someTensor(g: GraphBuilder, type: 'f32' | 'u8' | 'i8', shape: readonly number[]): Value {
  const count = shape.reduce((product, size) => product * size, 1);
  const bytes = new Uint8Array(type === 'f32' ? 4 * count : count);
  return g.initializer(g.fresh('some'), type, shape, { kind: 'inline', bytes });
}

/** Tokens for each scored position at least: batches are padded, and templates begin with a few tokens. */
const TOKENS_A_POSITION_MIN = 1.5;
/** Rows, about, that tell how many tokens are scored. */
const MEASURED_ROWS = 256;

/**
 * Tokens for each scored position: system prompts are computed but not scored, and with `--score answers` nor are questions. Some
 * rows from all over the files stand for all, since the first ones may be of one kind. The others are not parsed, which takes a
 * second where there are half a million. @throws MaskrouteError as `readData` and `encodeRow`. Rejects when `signal` aborts.
 */
export async function tokensAPosition(
  { folder, manifest }: InstalledModel,
  { files, rowsMax, lines }: DataFiles & Pick<DataSize, 'lines'>,
  { tokensMax, scored }: Pick<LearnEffort, 'tokensMax' | 'scored'>,
  signal?: AbortSignal,
): Promise<number> {
  const text = await openModelText(folder, manifest);
  const sampling = { tokensMax, scored, contextTokens: manifest.config.contextTokens };
  const sampleOf = createSampler(text, manifest.eosTokenIds[0]!, sampling);
  const random = createRandom(1);
  const reads = () => random.next() * lines < MEASURED_ROWS;
  const { rows } = await readRows(files, { rowsMax, reads, signal });
  const samples = rows.flatMap((row) => sampleOf(row) ?? []);
  if (samples.length === 0) return TOKENS_A_POSITION_MIN;
  const tokens = sumOf(samples.map(({ tokenIds }) => tokenIds.length));
  return Math.max(TOKENS_A_POSITION_MIN, tokens / sumOf(samples.map(scoredPositions)));
}

/**
 * Bytes of memory for each byte and each row of the data: a row's texts, and its vector, twice while all are packed. Measured on
 * 150 MB of short rows (320 bytes), which take 1.6 GB, and of long ones (5 KB), which take 0.4 GB.
 */
const [BYTES_A_DATA_BYTE, BYTES_A_ROW] = [2, 2800];
/** Bytes of a data file for each token at least: tokens are longer in most languages, and rows name their fields. */
const BYTES_A_TOKEN = 4 / 3;

/** Bytes that the data take while masks are learned on them. */
export const memoryOfData = ({ bytes, lines }: DataSize): number =>
  BYTES_A_DATA_BYTE * bytes + BYTES_A_ROW * lines;

/** Weights a second that are read and packed when a piece is opened. */
const PACK_PACE = 3.5e8;
/** Weights a second that are quantized for training, once a model. */
const ROUND_PACE = 1.2e7;

type ForecastOptions = {
  /** One, or several that are compared. */
  readonly clusterCounts: readonly number[];
  /** Requested number of masks; undefined: as many as pay off. */
  readonly maskCount?: number | undefined;
  readonly paces: Paces;
  /** Memory that the work may use, beside the data. */
  readonly available_bytes: number;
  readonly data: DataSize;
  /** As {@link tokensAPosition} measures it. */
  readonly positionTokens: number;
};

export function forecastLearning(
  config: ModelConfig,
  weights: WeightKind,
  fullEffort: LearnEffort,
  { clusterCounts, maskCount, paces, available_bytes, data, positionTokens }: ForecastOptions,
): Forecast {
  const tokens = data.bytes / BYTES_A_TOKEN;
  const plan = planMemory(config, weights, available_bytes);
  const effort = effortOn(fullEffort, tokens / positionTokens);
  const batchTokens = Math.min(LOSS_BATCH_TOKENS, Math.max(1, tokens));
  const batch = batchTimes(config, weights, plan, paces, batchTokens);
  const { all } = weightCounts(config);
  const served_s = servingTime(config, weights, paces);
  const timeFor = (clusterCount: number) => {
    const { losses, stepParts, scored } = workOf(
      config,
      effort,
      { clusterCount, maskCount },
      { batchTokens, positionTokens },
    );
    return losses * batch.loss_s + stepParts * batch.step_s + scored * served_s;
  };
  // All numbers of clusters share the mask for everybody.
  const shared_s = (clusterCounts.length - 1) * timeFor(1);
  return {
    plan: plan.kind,
    memory_bytes: plan.memory_bytes + memoryOfData(data),
    time_s: sumOf(clusterCounts.map(timeFor)) - shared_s + (weights === 'f32' ? 0 : all / ROUND_PACE),
  };
}

/** The effort on data of so many scored positions: no stage computes more of them than there are. */
function effortOn(full: LearnEffort, positions: number): LearnEffort {
  const effort = effortFor(full, positions);
  const few = (count: number) => Math.min(count, positions);
  return {
    ...effort,
    one: { ...effort.one, searchPositions: few(effort.one.searchPositions) },
    group: { ...effort.group, searchPositions: few(effort.group.searchPositions) },
    compose: { ...effort.compose, positions: few(effort.compose.positions) },
    choicePositions: few(effort.choicePositions),
    sharePositions: few(effort.sharePositions),
    heldOutPositions: few(effort.heldOutPositions),
  };
}

/**
 * Seconds for the loss of a batch of `batchTokens`, and for a part of a training step of `STEP_PART_TOKENS`, or of
 * `batchTokens` if these are fewer: the matrix products and, layer by layer, packing the pieces that do not stay open.
 * (Scoring uses the serving graph, which stays open.)
 */
export function batchTimes(
  config: ModelConfig,
  weights: WeightKind,
  { kind, layersKept }: Pick<MemoryPlan, 'kind' | 'layersKept'>,
  paces: Paces,
  batchTokens: number,
): { readonly loss_s: number; readonly step_s: number } {
  const { head, reads, writes, all } = weightCounts(config);
  const { forward_s, back_s } = productTimes(config, weights, paces);
  const stepTokens = Math.min(STEP_PART_TOKENS, batchTokens);
  if (kind === 'whole') return { loss_s: batchTokens * forward_s, step_s: stepTokens * (forward_s + back_s) };
  const opened = all - layersKept * (reads + writes);
  // The backward pass computes every layer forward again, with its weights for both directions.
  const openedForStep = opened - head + 2 * all;
  return {
    loss_s: batchTokens * forward_s + opened / PACK_PACE,
    step_s: stepTokens * (2 * forward_s + back_s) + openedForStep / PACK_PACE,
  };
}

/** Seconds a token for the products of the serving graph. `projections.ts` says which matrices have which form. */
function servingTime(config: ModelConfig, weights: WeightKind, paces: Paces): number {
  const { head, reads, writes, all } = weightCounts(config);
  if (weights !== 'q8-columns') return all / paces[weights];
  return (config.layerCount * (reads + writes)) / paces[weights] + head / paces.pairs;
}

/**
 * Seconds a token for the products of a training step, of both directions. `training-weights.ts` says which matrices have which
 * form.
 */
function productTimes(config: ModelConfig, weights: WeightKind, paces: Paces) {
  const { head, reads, writes, all } = weightCounts(config);
  const [read, written] = [config.layerCount * reads, config.layerCount * writes];
  if (weights === 'f32') return { forward_s: all / paces.f32, back_s: all / paces.f32 };
  const { columns, pairs, 'q8-columns': rows } = paces;
  if (paces.rounding === 'pairs') {
    return {
      forward_s: head / columns + (read + written) / pairs,
      back_s: head / pairs + (read + written) / rows,
    };
  }
  return {
    forward_s: (head + read) / columns + written / paces[innerKind(weights)],
    back_s: (head + read) / paces.q8 + written / columns,
  };
}

/**
 * Over all stages: batches whose loss is computed, parts of training steps, and tokens that the serving graph scores.
 */
function workOf(
  { layerCount }: ModelConfig,
  effort: LearnEffort,
  { clusterCount, maskCount }: { readonly clusterCount: number; readonly maskCount: number | undefined },
  { batchTokens, positionTokens }: { readonly batchTokens: number; readonly positionTokens: number },
) {
  const blocks = 2 * layerCount;
  const batches = (positions: number) => (positionTokens * positions) / batchTokens;
  const search = ({ searchPositions, glanceParts, rounds, exchanges }: LearnEffort['one' | 'group']) =>
    (1 + rounds) * (glanceParts * blocks + exchanges * batches(searchPositions));
  const { one, group, turns } = effort;
  const masks = Math.min(clusterCount, maskCount ?? effort.masksMax);
  // A single mask for all clusters has neither groups nor other sizes.
  const groups = masks > 1 ? masks : 0;
  // The dense model needs no search.
  const sizes = groups > 0 ? effort.sizes.filter((size) => size > 0).length : 0;
  const scoredWithMasks = (groups + sizes + 1) * (effort.sharePositions + effort.heldOutPositions);
  const { compose } = effort;
  const composed = compose.masks === 0 ? 0 : Math.min(clusterCount, maskCount ?? compose.masks);
  const scoredToCompose = (compose.blocks + 1) * compose.positions + composed * effort.sharePositions;
  return {
    losses:
      search(one) +
      one.glanceParts * one.greedyEvaluations +
      groups * turns * search(group) +
      sizes * (blocks + effort.sizeExchanges * batches(one.searchPositions)) +
      6 * batches(effort.choicePositions),
    stepParts: STEP_PARTS * (one.gateSteps + groups * turns * group.gateSteps),
    scored: positionTokens * (scoredWithMasks + (groups > 0 ? scoredToCompose : 0)),
  };
}

const LONG_s = 86_400;

/** A run with less work, and the flags that ask for it. */
type SmallerRun = { readonly flags: string; readonly forecast: Forecast };

/** The machine's memory, or a container's limit. Without a limit Node says 0, or more than the machine has. */
const wholeMemory = (): number => Math.min(totalmem(), process.constrainedMemory() || Infinity);

/** Lines for the terminal before a run. `smaller`: smaller runs to suggest, the largest first. */
export function forecastLines(
  forecast: Forecast,
  smaller: readonly SmallerRun[],
  whole_bytes = wholeMemory(),
): string[] {
  const { memory_bytes, time_s, plan } = forecast;
  const how = plan === 'layers' ? ', layer by layer, for the whole model does not fit' : '';
  const lines = [
    `Learning takes about ${gigabytes(memory_bytes)} of memory${how}, and up to ${hours(time_s)} on this machine.`,
  ];
  if (memory_bytes > whole_bytes)
    lines.push(`This machine has only ${gigabytes(whole_bytes)} of memory: the run will not fit.`);
  if (time_s > LONG_s) lines.push(wayOut(time_s, smaller));
  return lines;
}

/** Suggests the largest run that fits into a day, or else the smallest. */
function wayOut(time_s: number, smaller: readonly SmallerRun[]): string {
  const less = smaller.filter(({ forecast }) => forecast.time_s < time_s);
  const found = less.find(({ forecast }) => forecast.time_s <= LONG_s);
  if (found !== undefined)
    return `That takes days. With ${found.flags} it takes up to ${hours(found.forecast.time_s)}.`;
  const least = less.toSorted((a, b) => a.forecast.time_s - b.forecast.time_s)[0];
  if (least === undefined) return 'That takes days, and there is no smaller run: use a faster machine.';
  return `That takes days. The smallest run, ${least.flags}, takes up to ${hours(least.forecast.time_s)}; --queue spreads the work over several machines.`;
}

const gigabytes = (bytes: number): string => `${(bytes / 1e9).toFixed(1)} GB`;

function hours(seconds: number): string {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 2 * LONG_s ? `${(seconds / 3600).toFixed(1)} h` : `${(seconds / LONG_s).toFixed(1)} days`;
}
