/**
 * Mixed precision for q4: the head's rows of common tokens and the most sensitive matrices, by measurement, at 8 bits, all
 * others at 4 bits with error feedback on calibration text (`calibration.ts`). LOG.md says how much each part gains.
 */
import { divergence } from '../../logits.ts';
import type { Basis, Matrix } from '../architectures/rotation.ts';
import {
  eachProduct,
  headMatrix,
  type LayerMatrices,
  type LayerProduct,
  layerMatrices,
} from '../matrices.ts';
import type { ModelConfig, WeightSource } from '../model-source.ts';
import {
  type CalibrationText,
  embedText,
  headMoments,
  type LayerCodes,
  type Quantizer,
  quantizeLayers,
  restored,
  type TextOptions,
} from './calibration.ts';
import { quantizeWithFeedback } from './error-feedback.ts';
import { endsOfBlocks, type LayerSteps, openLayerSteps, openProducts, type Products } from './layer-steps.ts';
import { blocksOf, eightBitsOf, FOUR_BITS, type QuantCodes, roundRows } from './quantize.ts';

/** Raised when a change gives the same model and text other codes. */
export const FOUR_BITS_VERSION = 3;

/** The share of the layers' weights that have 8 bits, beside as many weights as the head has at 4. */
const EIGHT_BIT_SHARE = 0.15;
/** Refinement passes over all blocks of a layer's matrix, after the first. They do little for the head (LOG.md). */
const PASSES = 2;
/** Shares of the work: when the layers are rounded to four bits, when the head is, and when sensitivities are measured. */
const ROUNDED = 0.62;
const HEAD_ROUNDED = 0.68;
const MEASURED = 0.95;
/** Sensitivity is measured on the last tokens of a few sequences; every `MEASURED_EVERY`-th position counts. */
const MEASURED_SEQUENCES = 4;
const MEASURED_TOKENS = 48;
const MEASURED_EVERY = 4;

/** The share of the vocabulary that is read for most of all text. */
const COMMON_SHARE = 1 / 3;
/** Special tokens of chats are among the first or the last tokens. */
const SPECIAL_ROWS = 512;
/** Products have their rows in groups. */
const ROW_STEP = 64;

type Rows = { readonly from: number; readonly to: number };

/**
 * The rows of rare tokens, which have 4 bits: two thirds of the vocabulary. In their place, as many weights of the layers have
 * 8 bits, where they save more. Vocabularies list their tokens in the order of their frequency, but SentencePiece lists single
 * characters behind all others, as letters, digits and commas. So of all stretches of that length, the text has the tokens of
 * this one least often; of equal ones it is the last.
 *
 * Undefined for a small vocabulary, and where zero points of 4 bits leave half a byte at a row's end: gathering cannot skip it.
 */
export function rareRows(
  { vocabularySize, hiddenSize }: Pick<ModelConfig, 'vocabularySize' | 'hiddenSize'>,
  { tokenIds }: Pick<CalibrationText, 'tokenIds'>,
): Rows | undefined {
  const lastFrom = ROW_STEP * Math.ceil((COMMON_SHARE * vocabularySize) / ROW_STEP);
  const size = ROW_STEP * Math.floor((vocabularySize - SPECIAL_ROWS) / ROW_STEP) - lastFrom;
  if (size <= 0 || blocksOf(hiddenSize, FOUR_BITS) % 2 !== 0) return undefined;
  const uses = new Int32Array(Math.ceil(vocabularySize / ROW_STEP));
  for (const id of tokenIds) uses[Math.floor(id / ROW_STEP)]!++;
  let from = lastFrom;
  // How many more tokens of the text are in a stretch than in the last one.
  let [more, least] = [0, 0];
  for (let at = lastFrom - ROW_STEP; at >= SPECIAL_ROWS; at -= ROW_STEP) {
    more += uses[at / ROW_STEP]! - uses[(at + size) / ROW_STEP]!;
    if (more < least) [from, least] = [at, more];
  }
  return { from, to: from + size };
}

/**
 * Quantizes all layers to four bits, then measures which matrices need eight. The sensitivity is measured with the final
 * codes, because rounding to nearest costs most where error feedback gains most. All codes are in memory, a byte a weight.
 * @throws RangeError when the text is shorter than one sequence.
 */
export async function openFourBits(
  source: WeightSource,
  basis: Basis,
  options: TextOptions,
  onProgress: (fraction: number) => void,
): Promise<Quantizer> {
  await using products = await openProducts(options.threads);
  const round = (matrix: Matrix, moments: Float64Array) =>
    quantizeWithFeedback(matrix, { moments, form: FOUR_BITS, passes: PASSES, products });
  const { codes, streams } = await quantizeLayers(source, basis, options, round, (done) =>
    onProgress(ROUNDED * done),
  );
  const work: Work = { source, basis, products, ...options };
  const rare = await roundRare(work, streams, (done) =>
    onProgress(ROUNDED + (HEAD_ROUNDED - ROUNDED) * done),
  );
  const sensitivities = await measureLayers(work, codes, (done) =>
    onProgress(HEAD_ROUNDED + (MEASURED - HEAD_ROUNDED) * done),
  );
  const eight = chooseEightBits(source.config, sensitivities, EIGHT_BIT_SHARE, rare?.codes.codes.length ?? 0);
  return {
    progress: MEASURED,
    head: (matrix) =>
      rare === undefined
        ? [roundToEight(matrix)]
        : [
            roundToEight(rowsOf(matrix, { from: 0, to: rare.from })),
            rare.codes,
            roundToEight(rowsOf(matrix, { from: rare.to, to: matrix.outputs })),
          ],
    layer: (index, matrices) =>
      eachProduct((name) =>
        eight.has(`${index}.${name}`) ? roundToEight(matrices[name]) : codes[index]![name],
      ),
  };
}

type Work = TextOptions & {
  readonly source: WeightSource;
  readonly basis: Basis;
  readonly products: Products;
};

const roundToEight = ({ rows, outputs, inputs }: Matrix): QuantCodes =>
  roundRows(rows, outputs, inputs, eightBitsOf(inputs));

const rowsOf = ({ rows, inputs }: Matrix, { from, to }: Rows): Matrix => ({
  rows: rows.subarray(from * inputs, to * inputs),
  outputs: to - from,
  inputs,
});

/** The head's rows of rare tokens at four bits, for these streams after the last layer. */
async function roundRare(
  { source, basis, text, threads, products }: Work,
  streams: readonly Float32Array[],
  onProgress: (fraction: number) => void,
): Promise<(Rows & { readonly codes: QuantCodes }) | undefined> {
  const rare = rareRows(source.config, text);
  if (rare === undefined) return undefined;
  await using steps = await openLayerSteps(source.config, basis, text.sequenceTokens, threads);
  const finalNorm = await source.read('model.norm.weight');
  const moments = await headMoments(steps, streams, basis.norm(finalNorm));
  const rows = rowsOf(await headMatrix(source, basis, finalNorm), rare);
  const feedback = { moments, form: FOUR_BITS, passes: 0, products, onProgress };
  const codes = await quantizeWithFeedback(rows, feedback);
  return { ...rare, codes };
}

async function measureLayers(
  { source, basis, text, threads, products }: Work,
  codes: readonly LayerCodes<QuantCodes>[],
  onProgress: (fraction: number) => void,
): Promise<Sensitivity[]> {
  const ends = endsOf(text);
  await using steps = await openLayerSteps(source.config, basis, ends.sequenceTokens, threads);
  const [first, ...others] = await embedText(source, basis, ends);
  return await measureSensitivity(source, basis, {
    steps,
    products,
    every: MEASURED_EVERY,
    onProgress,
    stream: Float32Array.from([first!, ...others].flatMap((chunk) => [...chunk])),
    rounded: (layer, name) => restored(codes[layer]![name]),
  });
}

/** The last tokens of a few sequences; their first tokens are often the same, from the chat template. */
function endsOf({ tokenIds, sequenceTokens }: CalibrationText): CalibrationText {
  const tokens = Math.min(MEASURED_TOKENS, sequenceTokens);
  const sequences = Math.min(MEASURED_SEQUENCES, tokenIds.length / sequenceTokens);
  const ends = new Int32Array(sequences * tokens);
  for (let i = 0; i < sequences; i++) {
    const end = (i + 1) * sequenceTokens;
    ends.set(tokenIds.subarray(end - tokens, end), i * tokens);
  }
  return { tokenIds: ends, sequenceTokens: tokens };
}

/** The matrices `layer.name` with the highest KL a weight at four bits, up to `share` of the layers' weights and `more`. */
export function chooseEightBits(
  config: ModelConfig,
  sensitivities: readonly Sensitivity[],
  share: number,
  more: number,
): ReadonlySet<string> {
  const { hiddenSize: H, ffnSize: F, headCount: N, kvHeadCount: G, headSize: D, layerCount: L } = config;
  const sizes = { qkv: (N + 2 * G) * D * H, output: N * D * H, gateUp: 2 * F * H, down: F * H };
  const budget = more + share * L * Object.values(sizes).reduce((sum, size) => sum + size, 0);
  const chosen = new Set<string>();
  let spent = 0;
  for (const { layer, name } of sensitivities.toSorted(
    (a, b) => b.kl / sizes[b.name] - a.kl / sizes[a.name],
  )) {
    if (spent + sizes[name] > budget) continue;
    spent += sizes[name];
    chosen.add(`${layer}.${name}`);
  }
  return chosen;
}

/*
 * The sensitivity of each matrix to four bits: KL(dense ‖ only that matrix rounded) on a few positions, in fp32. All
 * variants go through the layers together, so that every matrix is read once.
 *
 * Limits: a forward pass of T tokens for each of 4·L matrices, from its own layer on.
 */

type Sensitivity = { readonly layer: number; readonly name: LayerProduct; readonly kl: number };

type SensitivityOptions = {
  readonly steps: LayerSteps;
  readonly products: Products;
  /** The dense stream before the first layer, `[T, H]`. */
  readonly stream: Float32Array;
  /** Every `every`-th position is scored. */
  readonly every: number;
  /** A matrix with four bits, dequantized. */
  rounded(layer: number, name: LayerProduct): Matrix;
  readonly onProgress: (fraction: number) => void;
};

type Variant = { readonly layer: number; readonly name: LayerProduct; stream: Float32Array };

export async function measureSensitivity(
  source: WeightSource,
  basis: Basis,
  options: SensitivityOptions,
): Promise<Sensitivity[]> {
  const { layerCount } = source.config;
  let dense = options.stream;
  const variants: Variant[] = [];
  for (let layer = 0; layer < layerCount; layer++) {
    const matrices = await layerMatrices(source, basis, layer);
    dense = await throughLayer(options, layer, matrices, dense, variants);
    options.onProgress((layer + 1) / layerCount);
  }
  const finalNorm = await source.read('model.norm.weight');
  const head = await headMatrix(source, basis, finalNorm);
  const logits = async (stream: Float32Array) => {
    const scored = everyRow(stream, head.inputs, options.every);
    const x = await options.steps.normalize(scored, basis.norm(finalNorm));
    return options.products.multiply(x, head.rows, head.inputs);
  };
  const expected = await logits(dense);
  const found: Sensitivity[] = [];
  for (const { layer, name, stream } of variants)
    found.push({ layer, name, kl: divergence(expected, await logits(stream), head.outputs) });
  return found;
}

/** The dense stream after the layer. Moves all `variants` through the layer, and adds the four of this layer. */
async function throughLayer(
  { steps, ...options }: SensitivityOptions,
  layer: number,
  matrices: LayerMatrices,
  dense: Float32Array,
  variants: Variant[],
): Promise<Float32Array> {
  const rounded = eachProduct((name) => options.rounded(layer, name));
  const ends = endsOfBlocks(matrices);
  const attention = async (h: Float32Array, qkv: Matrix, output: Matrix) => {
    const attended = await steps.attend(await steps.normalize(h, matrices.attentionNorm), matrices, qkv);
    return steps.add(h, attended, output, ends.attention);
  };
  const ffn = async (h: Float32Array, gateUp: Matrix, down: Matrix) =>
    steps.add(h, await steps.activate(await steps.normalize(h, matrices.ffnNorm), gateUp), down, ends.ffn);
  const passing = async (through: (h: Float32Array) => Promise<Float32Array>) => {
    for (const variant of variants) variant.stream = await through(variant.stream);
  };
  const { qkv, output, gateUp, down } = matrices;
  await passing((h) => attention(h, qkv, output));
  variants.push(
    { layer, name: 'qkv', stream: await attention(dense, rounded.qkv, output) },
    { layer, name: 'output', stream: await attention(dense, qkv, rounded.output) },
  );
  const between = await attention(dense, qkv, output);
  await passing((h) => ffn(h, gateUp, down));
  variants.push(
    { layer, name: 'gateUp', stream: await ffn(between, rounded.gateUp, down) },
    { layer, name: 'down', stream: await ffn(between, gateUp, rounded.down) },
  );
  return ffn(between, gateUp, down);
}

function everyRow(stream: Float32Array, width: number, every: number): Float32Array {
  const rows = Math.floor(stream.length / width / every);
  const picked = new Float32Array(rows * width);
  for (let row = 0; row < rows; row++) {
    const at = ((row + 1) * every - 1) * width;
    picked.set(stream.subarray(at, at + width), row * width);
  }
  return picked;
}
