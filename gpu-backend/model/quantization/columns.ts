/** Eight bits by column with error feedback on calibration text. */
import type { Basis, Matrix } from '../architectures/rotation.ts';
import type { WeightSource } from '../model-source.ts';
import { type Quantizer, quantizeLayers, type TextOptions } from './calibration.ts';
import { roundColumnsWithFeedback } from './error-feedback.ts';
import { openProducts } from './layer-steps.ts';
import { roundMatrix } from './quantize.ts';

/** Raised when a change gives the same model and text other codes, or the graphs over them other results. */
export const COLUMNS_VERSION = 4;

/** The share of the work that is done when all matrices are rounded. */
const ROUNDED = 0.95;

/**
 * Quantizes all layers; all codes are in memory, a byte a weight.
 * @throws RangeError when the text is shorter than one sequence.
 */
export async function openColumns(
  source: WeightSource,
  basis: Basis,
  options: TextOptions,
  onProgress: (fraction: number) => void,
): Promise<Quantizer> {
  await using products = await openProducts(options.threads);
  const round = (matrix: Matrix, moments: Float64Array) =>
    roundColumnsWithFeedback(matrix, { moments, products });
  const { codes } = await quantizeLayers(source, basis, options, round, (done) => onProgress(ROUNDED * done));
  return {
    progress: ROUNDED,
    head: ({ rows, outputs, inputs }) => [roundMatrix(rows, outputs, inputs, 'columns')],
    layer: (index) => codes[index]!,
  };
}
