/**
 * Four bits that keep the model: most matrices at 4 bits with error feedback on some text (`calibration.ts`), the head
 * and those that measurement says are worth it at 8 (`sensitivity.ts`). LOG.md has what each part gains.
 */
import type { Basis, Matrix } from '../architectures/rotation.ts';
import type { LayerMatrices, LayerProduct } from '../matrices.ts';
import type { LlamaConfig, WeightSource } from '../model-source.ts';
import { type CalibrationText, embedText, quantizeLayer } from './calibration.ts';
import { openLayerSteps } from './layer-steps.ts';
import { openProducts, type Products } from './products.ts';
import { dequantize, type QuantCodes, type QuantForm, roundRows } from './quantize.ts';
import { measureSensitivity, type Sensitivity } from './sensitivity.ts';

export type LayerCodes = Readonly<Record<LayerProduct, QuantCodes>>;

export type Quantizer = {
  /** The share of the whole work that is done when it is open. */
  readonly progress: number;
  /** The embedding and the head, or both in one; they come before the layers. */
  end(matrix: Matrix): QuantCodes;
  /** Layers come in their order. */
  layer(index: number, matrices: LayerMatrices): Promise<LayerCodes>;
};

export type FourBitOptions = {
  readonly text: CalibrationText;
  readonly threads: number;
};

/** Raised when the same model and text come to other codes. */
export const FOUR_BITS_VERSION = 1;

/** Of the layers' weights, at 8 bits. More is slower than it is better: 8 bits dense are 1.25 times as slow. */
const EIGHT_BIT_SHARE = 0.24;
/** How often blocks are visited again. */
const PASSES = 1;
/** Measuring takes about as long as quantizing. */
const MEASURED = 0.4;
/** Sensitivity is measured on the last tokens of a few sequences; every so many-th position counts. */
const MEASURED_SEQUENCES = 4;
const MEASURED_TOKENS = 48;
const MEASURED_EVERY = 4;

/** @throws RangeError when the text is shorter than one sequence. */
export async function openFourBits(
  source: WeightSource,
  basis: Basis,
  { text, threads }: FourBitOptions,
  onProgress: (fraction: number) => void,
): Promise<Quantizer & AsyncDisposable> {
  await using opening = new AsyncDisposableStack();
  const steps = opening.use(await openLayerSteps(source.config, text.sequenceTokens, threads));
  const products = opening.use(await openProducts(threads));
  const streams = await embedText(source, basis, text);
  const eight = await findEightBits(source, basis, { text, threads }, products, onProgress);
  const formOf = (layer: number, name: LayerProduct, matrix: Matrix) =>
    eight.has(`${layer}.${name}`) ? eightBits(matrix) : fourBits(matrix);
  let state = { streams, steps, products, passes: PASSES };
  const stack = opening.move();
  return {
    progress: MEASURED,
    end: (matrix) => round(matrix, eightBits(matrix)),
    async layer(index, matrices) {
      const { codes, streams: after } = await quantizeLayer(state, matrices, (name) =>
        formOf(index, name, matrices[name]),
      );
      state = { ...state, streams: after };
      return codes;
    },
    [Symbol.asyncDispose]: () => stack.disposeAsync(),
  };
}

const round = ({ rows, outputs, inputs }: Matrix, form: QuantForm): QuantCodes =>
  roundRows(rows, outputs, inputs, form);

/** Blocks of 64 read 11 % fewer bytes than blocks of 32, and the products are as much faster. */
const blockSizeFor = ({ inputs }: Matrix): 32 | 64 => (inputs % 64 === 0 ? 64 : 32);
const fourBits = (matrix: Matrix): QuantForm => ({ bits: 4, blockSize: blockSizeFor(matrix) });
const eightBits = (matrix: Matrix): QuantForm => ({ bits: 8, blockSize: blockSizeFor(matrix) });

async function findEightBits(
  source: WeightSource,
  basis: Basis,
  { text, threads }: FourBitOptions,
  products: Products,
  onProgress: (fraction: number) => void,
): Promise<ReadonlySet<string>> {
  const ends = endsOf(text);
  await using steps = await openLayerSteps(source.config, ends.sequenceTokens, threads);
  const [stream] = await embedText(source, basis, ends);
  const sensitivities = await measureSensitivity(source, basis, {
    ...{ steps, products, stream: stream!, every: MEASURED_EVERY },
    round: (matrix) => ({ ...matrix, rows: dequantize(round(matrix, fourBits(matrix))) }),
    onProgress: (done) => onProgress(MEASURED * done),
  });
  return chooseEightBits(source.config, sensitivities, EIGHT_BIT_SHARE);
}

/** The last tokens of a few sequences. Their first ones are often alike: what a chat template begins with. */
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

/** The matrices `layer.name` that cost most a weight at four bits, until they hold `share` of the layers' weights. */
export function chooseEightBits(
  config: LlamaConfig,
  sensitivities: readonly Sensitivity[],
  share: number,
): ReadonlySet<string> {
  const { hiddenSize: H, ffnSize: F, headCount: N, kvHeadCount: G, headSize: D, layerCount: L } = config;
  const sizes = { qkv: (N + 2 * G) * D * H, output: N * D * H, gateUp: 2 * F * H, down: F * H };
  const budget = share * L * Object.values(sizes).reduce((sum, size) => sum + size, 0);
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
