/** What a runner is to the engine, on the processor (`runner.ts`) and on a GPU (`webgpu-runner.ts`). */
import type { Mask, SurrogatesId } from '../../shared/mask/mask.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import type { KvType, ModelConfig } from '../model/model-source.ts';
import type { Device } from '../onnx/device.ts';
import type { SequenceCache } from './kv-cache.ts';
import type { PrefixCache, PrefixOwner } from './prefix-cache.ts';
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
  /** Where a runner keeps prompts itself; others leave it to the host. */
  newPrefixes?(tokensMax: number, now_ms?: () => number): Prefixes;
  close(): Promise<void>;
};

/** Beginnings of prompts that later ones may begin with: on the host (`prefix-cache.ts`), or on a GPU (`webgpu-prefixes.ts`). */
export type Prefixes = Pick<PrefixCache, 'pageCount' | 'pagesMax' | 'take' | 'keep'> & {
  /** Before a cache is given back: it may be kept whole. It may be empty afterwards. */
  keepLast?(owner: PrefixOwner, tokenIds: ArrayLike<number>, cache: SequenceCache): void;
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
  /** How K and V are kept: fp32 unless given. A GPU keeps them as it computes. */
  readonly kvType?: KvType | undefined;
  /** The processor rounds inputs of products to 8 bits where weights have 8 or 4; with this it does not, as a GPU. */
  readonly exactProducts?: boolean | undefined;
  /** Logits of a run are read before the next one begins, which may write over them. */
  readonly reuseLogits?: boolean | undefined;
};

/** How a device keeps K and V. @throws MaskrouteError `invalid_argument` where it cannot keep them as asked. */
export function kvTypeOn(device: Device | undefined, asked: KvType | undefined): KvType {
  if (device === undefined || device.kind === 'cpu') return asked ?? 'f32';
  const { floatType } = device;
  if (asked === undefined || asked === floatType) return floatType;
  const message = `A GPU keeps keys and values as it computes, in ${floatType} here: leave --kv-type out, or take --float-type ${asked}.`;
  throw new MaskrouteError('invalid_argument', message);
}

/** @throws Error for another table than the graph's. */
export function checkSurrogates({ surrogates }: Mask, served: SurrogatesId | undefined): void {
  if (surrogates !== undefined && surrogates !== served)
    throw new Error(`the mask wants surrogates ${surrogates}, the graph has ${served ?? 'none'}`);
}
