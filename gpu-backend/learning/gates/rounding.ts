/** How the copies of a model's matrices for training are rounded (`training-weights.ts`), and which way is fastest here. */
import { hasAmx } from '../../onnx/signed-codes.ts';

/**
 * Codes in blocks and by column, or `pairs` of codes, rows and columns. It decides the bits of a step, so a run keeps the rounding
 * that it began with, on whichever machine it goes on. Its journal has the index here.
 */
export const ROUNDINGS = ['blocks', 'pairs'] as const;
export type Rounding = (typeof ROUNDINGS)[number];

/**
 * The rounding that this machine multiplies fastest: pairs with AMX, whose products are of signed codes by column alone, and seven
 * times as fast. The CPU's flags decide, which are the same on every day: by the time of a product, a busy machine decided
 * otherwise than the idle one.
 */
export const fastestRounding = async (): Promise<Rounding> => ((await hasAmx()) ? 'pairs' : 'blocks');
