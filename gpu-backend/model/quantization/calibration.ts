/**
 * Quantizes a model layer by layer on calibration text: every matrix is quantized for the inputs that it gets from the
 * quantized layers before it. `error-feedback.ts` has the method.
 *
 * The activations of the whole text are in memory: at most 4·T·(3·H + F) bytes, T = tokens.
 */
import type { Basis, Matrix } from '../architectures/rotation.ts';
import { type LayerMatrices, type LayerProduct, layerMatrices } from '../matrices.ts';
import type { WeightSource } from '../model-source.ts';
import { endsOfBlocks, type LayerSteps, openLayerSteps } from './layer-steps.ts';
import { dequantize, type MatrixCodes } from './quantize.ts';

/** Tokens of one run: few enough for the CPU's caches, enough to keep all threads busy. */
const CHUNK_TOKENS = 2048;

export type CalibrationText = {
  /** Sequences of equal length, one after the other. */
  readonly tokenIds: Int32Array;
  readonly sequenceTokens: number;
};

/** What quantizes on text. */
export type TextOptions = {
  readonly text: CalibrationText;
  readonly threads: number;
};

/** The quantization of a model on text, ready to give the codes of its matrices. */
export type Quantizer = {
  /** The share of the import's work that is done when the quantizer is open. */
  readonly progress: number;
  /** Codes of the head's stretches of rows, in their order. */
  head(matrix: Matrix): readonly MatrixCodes[];
  /** Codes of a layer's matrices. */
  layer(index: number, matrices: LayerMatrices): LayerCodes<MatrixCodes>;
};

export type LayerCodes<Codes> = Readonly<Record<LayerProduct, Codes>>;

/** Quantizes a matrix for inputs with these second moments, `[K, K]`. */
type Round<Codes> = (matrix: Matrix, moments: Float64Array) => Promise<Codes>;

type QuantizedLayers<Codes> = {
  readonly codes: readonly LayerCodes<Codes>[];
  /** The streams after the last layer. */
  readonly streams: readonly Float32Array[];
};

/**
 * The codes of all layers, a byte a weight in memory. `onProgress` gets the fraction of layers done.
 * @throws RangeError when the text is shorter than one sequence.
 */
export async function quantizeLayers<Codes extends MatrixCodes>(
  source: WeightSource,
  basis: Basis,
  { text, threads }: TextOptions,
  round: Round<Codes>,
  onProgress: (fraction: number) => void,
): Promise<QuantizedLayers<Codes>> {
  await using steps = await openLayerSteps(source.config, basis, text.sequenceTokens, threads);
  let streams = await embedText(source, basis, text);
  const codes: LayerCodes<Codes>[] = [];
  for (let layer = 0; layer < source.config.layerCount; layer++) {
    const matrices = await layerMatrices(source, basis, layer);
    const rounded = await quantizeLayer({ steps, round, streams }, matrices);
    codes.push(rounded.codes);
    streams = rounded.streams;
    onProgress((layer + 1) / source.config.layerCount);
  }
  return { codes, streams };
}

type CalibrationState<Codes> = {
  readonly steps: LayerSteps;
  readonly round: Round<Codes>;
  /** The residual stream before the layer, `[T, H]` for each chunk of sequences. */
  readonly streams: readonly Float32Array[];
};

/** The streams before the first layer. @throws RangeError when there is no whole sequence. */
export async function embedText(
  source: WeightSource,
  basis: Basis,
  text: CalibrationText,
): Promise<Float32Array[]> {
  const { hiddenSize: H } = source.config;
  if (text.tokenIds.length === 0 || text.tokenIds.length % text.sequenceTokens !== 0)
    throw new RangeError(`${text.tokenIds.length} tokens are no sequences of ${text.sequenceTokens}`);
  const table = await source.read('model.embed_tokens.weight');
  // At least two chunks, as `shrink` compares two halves.
  const half = Math.ceil(text.tokenIds.length / text.sequenceTokens / 2);
  const perRun = Math.max(1, Math.floor(CHUNK_TOKENS / text.sequenceTokens));
  const perChunk = Math.min(half, perRun) * text.sequenceTokens;
  const chunks: Float32Array[] = [];
  for (let start = 0; start < text.tokenIds.length; start += perChunk) {
    const ids = text.tokenIds.subarray(start, start + perChunk);
    const rows = new Float32Array(ids.length * H);
    for (const [i, id] of ids.entries()) rows.set(table.subarray(id * H, (id + 1) * H), i * H);
    chunks.push(basis.embeds({ rows, outputs: ids.length, inputs: H }).rows);
  }
  return chunks;
}

/** The layer's codes, and the streams after the quantized layer. */
async function quantizeLayer<Codes extends MatrixCodes>(
  state: CalibrationState<Codes>,
  matrices: LayerMatrices,
): Promise<{ codes: LayerCodes<Codes>; streams: Float32Array[] }> {
  const { steps } = state;
  const { attentionNorm, ffnNorm } = matrices;
  const quantize = (name: LayerProduct, inputs: readonly Float32Array[], shares: readonly Float32Array[]) =>
    quantizeMatrix(state, matrices[name], inputs, shares);
  const before = state.streams;
  const attentionInputs = await inOrder(before, (h) => steps.normalize(h, attentionNorm));
  const qkv = await quantize('qkv', attentionInputs, before.map(equalShares(attentionNorm.length)));
  const attended = await inOrder(attentionInputs, (x) => steps.attend(x, matrices, restored(qkv)));
  const output = await quantize('output', attended, before.map(streamShares(attentionNorm.length)));
  const ends = endsOfBlocks(matrices);
  const between = await inOrder(before, (h, i) =>
    steps.add(h, attended[i]!, restored(output), ends.attention),
  );
  const ffnInputs = await inOrder(between, (h) => steps.normalize(h, ffnNorm));
  const gateUp = await quantize('gateUp', ffnInputs, between.map(equalShares(ffnNorm.length)));
  const activated = await inOrder(ffnInputs, (x) => steps.activate(x, restored(gateUp)));
  const down = await quantize('down', activated, between.map(streamShares(ffnNorm.length)));
  const streams = await inOrder(between, (h, i) => steps.add(h, activated[i]!, restored(down), ends.ffn));
  return { codes: { qkv, output, gateUp, down }, streams };
}

export const restored = (codes: MatrixCodes): Matrix => ({
  rows: dequantize(codes),
  outputs: codes.rows,
  inputs: codes.columns,
});

async function inOrder<T>(
  streams: readonly Float32Array[],
  make: (stream: Float32Array, chunk: number) => Promise<T>,
): Promise<T[]> {
  const made: T[] = [];
  for (const [chunk, stream] of streams.entries()) made.push(await make(stream, chunk));
  return made;
}

async function quantizeMatrix<Codes>(
  { steps, round }: CalibrationState<Codes>,
  matrix: Matrix,
  inputs: readonly Float32Array[],
  shares: readonly Float32Array[],
): Promise<Codes> {
  return round(matrix, await momentsOf(steps, matrix.inputs, inputs, shares));
}

/** Second moments `[K, K]` of all chunks of inputs `[T, K]`, weighted by position, shrunk for other text. */
async function momentsOf(
  steps: LayerSteps,
  K: number,
  inputs: readonly Float32Array[],
  shares: readonly Float32Array[],
): Promise<Float64Array> {
  const halves = [0, 1].map(() => new Float64Array(K * K));
  for (const [chunk, x] of inputs.entries()) {
    const half = halves[chunk % 2]!;
    const sums = await steps.moments(x, shares[chunk]!);
    for (let i = 0; i < sums.length; i++) half[i]! += sums[i]!;
  }
  return shrink(halves[0]!, halves[1]!, K);
}

/** Second moments of the head's inputs, from the streams after the last layer; `norm` is the last one. */
export async function headMoments(
  steps: LayerSteps,
  streams: readonly Float32Array[],
  norm: Float32Array,
): Promise<Float64Array> {
  const inputs = await inOrder(streams, (h) => steps.normalize(h, norm));
  return momentsOf(steps, norm.length, inputs, inputs.map(equalShares(norm.length)));
}

/** Equal weights of positions, for matrices whose outputs are not added to the stream. */
const equalShares =
  (width: number) =>
  (stream: Float32Array): Float32Array =>
    new Float32Array(stream.length / width).fill(1);

/**
 * Weights of positions, 1 / mean h², for matrices whose outputs are added to the stream h. An error counts by the change of
 * the next norm's output, so the few positions whose stream is a hundred times larger do not dominate.
 */
const streamShares =
  (width: number) =>
  (stream: Float32Array): Float32Array =>
    Float32Array.from({ length: stream.length / width }, (_, t) => {
      let square = 0;
      for (let i = t * width; i < (t + 1) * width; i++) square += stream[i]! * stream[i]!;
      // A stream of zeros has weight 0.
      return square === 0 ? 0 : width / square;
    });

/**
 * The shrinkage of moments off the diagonal: least + perChance · (share of sampling noise), at most `most`. Chosen by the
 * error on other text (LOG.md): noise costs several times its share, as error feedback exploits it.
 */
const SHRINKING = { least: 0.05, perChance: 4, most: 0.6 } as const;

/**
 * The sum of the moments of a text's two halves, `[K, K]`, shrunk towards the diagonal (after Ledoit and Wolf, 2004). The
 * less the halves agree, the stronger the shrinkage. A few thousand tokens are too few to estimate the correlations of
 * 1,536 inputs, and errors that cancel only through sampling noise add up on other text.
 */
export function shrink(a: Float64Array, b: Float64Array, K: number): Float64Array {
  const sizes = [a, b].map((half) => Float64Array.from({ length: K }, (_, i) => Math.sqrt(half[i * K + i]!)));
  const [sizeA, sizeB] = sizes as [Float64Array, Float64Array];
  let [common, apart] = [0, 0];
  for (let i = 0; i < K; i++) {
    for (let j = 0; j < i; j++) {
      const scaleA = sizeA[i]! * sizeA[j]!;
      const scaleB = sizeB[i]! * sizeB[j]!;
      if (scaleA === 0 || scaleB === 0) continue;
      const [inA, inB] = [a[i * K + j]! / scaleA, b[i * K + j]! / scaleB];
      common += inA * inB;
      apart += (inA - inB) ** 2;
    }
  }
  // The variance of a half is half of the difference's variance, and the mean of both halves has half of that.
  const chance = apart / 4;
  const chanceShare = common > 0 ? chance / (common + chance) : 1;
  const { least, perChance, most } = SHRINKING;
  const kept = 1 - Math.min(most, least + perChance * chanceShare);
  const moments = new Float64Array(K * K);
  for (let i = 0; i < K; i++) {
    for (let j = 0; j < K; j++) {
      const at = i * K + j;
      moments[at] = (a[at]! + b[at]!) * (i === j ? 1 : kept);
    }
  }
  return moments;
}
