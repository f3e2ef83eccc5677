/** An opened source of weights, whatever its format. */
import type { WeightSource } from './types.ts';

export type OpenModelFile = WeightSource & {
  /** What the model's hash is taken over, in order. */
  readonly weightFiles: readonly string[];
  close(): Promise<void>;
};
