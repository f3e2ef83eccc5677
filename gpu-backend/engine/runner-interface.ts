/** What a runner is to the engine, on the processor (`runner.ts`) and on a GPU (`webgpu-runner.ts`). */
import type { Mask, SurrogatesId } from '../../shared/mask/mask.ts';
import type { KvType, ModelConfig } from '../model/model-source.ts';
import type { Device } from '../onnx/device.ts';
import type { SequenceCache } from './kv-cache.ts';
import type { RunInput } from './run-input.ts';

export type Runner = {
  readonly config: ModelConfig;
  /** The table of surrogates that the graph holds. */
  readonly surrogates: SurrogatesId | undefined;
  newCache(): SequenceCache;
  /** Logits, row-major `[logitRows, vocabulary]`; the cache then holds the S tokens. */
  run(input: RunInput): Promise<Float32Array>;
  /** The same for several sequences at once, `BATCH_PLACES` at most. */
  runMany(inputs: readonly RunInput[]): Promise<Float32Array[]>;
  close(): Promise<void>;
};

export type RunnerOptions = {
  readonly threads: number;
  readonly profileFile?: string;
  /** Whether `runMany` is given several sequences: only then the batched graph is opened. */
  readonly batches?: boolean;
  /** Of the model's manifest, where its graph has surrogates. */
  readonly surrogates?: SurrogatesId | undefined;
  /** The processor unless given. */
  readonly device?: Device | undefined;
  /** How K and V are kept: fp32 unless given. A GPU keeps fp32 alone. */
  readonly kvType?: KvType | undefined;
};

/** @throws Error for another table than the graph's. */
export function checkSurrogates({ surrogates }: Mask, served: SurrogatesId | undefined): void {
  if (surrogates !== undefined && surrogates !== served)
    throw new Error(`the mask wants surrogates ${surrogates}, the graph has ${served ?? 'none'}`);
}
