/** The runner's interface for the engine; implemented for the CPU (`runner.ts`) and for a GPU (`webgpu-runner.ts`). */
import type { Mask, SurrogatesId } from '../../shared/mask/mask.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { BATCH_PLACES } from '../model/architectures/batched-attention.ts';
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
  /** Advances the cache by the S new tokens. @returns logits, row-major `[logitRows, vocabulary]`. */
  run(input: RunInput): Promise<Float32Array>;
  /** The same for several sequences at once, `BATCH_PLACES` at most. */
  runMany(inputs: readonly RunInput[]): Promise<Float32Array[]>;
  /** The runner's own prefix cache, if it has one; without, the engine uses `PrefixCache`. */
  newPrefixes?(tokensMax: number, now_ms?: () => number): Prefixes;
  close(): Promise<void>;
};

/** A prefix cache: in this process's memory (`prefix-cache.ts`) or on a GPU (`webgpu-prefixes.ts`). */
export type Prefixes = Pick<PrefixCache, 'pageCount' | 'pagesMax' | 'take' | 'keep'> & {
  /** Called before a sequence's cache is recycled; may keep all of it. */
  keepLast?(owner: PrefixOwner, tokenIds: ArrayLike<number>, cache: SequenceCache): void;
};

export type RunnerOptions = {
  readonly threads: number;
  readonly profileFile?: string;
  /** Opens the batched graph, which `runMany` needs for several sequences. */
  readonly batches?: boolean;
  /** The table in the model's manifest, if its graph has surrogates. */
  readonly surrogates?: SurrogatesId | undefined;
  /** The CPU unless given. */
  readonly device?: Device | undefined;
  /** Number type of the KV cache; fp32 unless given. A GPU uses its compute type. */
  readonly kvType?: KvType | undefined;
  /** With weights in blocks the CPU quantizes the inputs of matrix products to 8 bits; this turns it off, as on a GPU. */
  readonly exactProducts?: boolean | undefined;
  /** Reuses the memory of logits: the next run may overwrite those of the last one. */
  readonly reuseLogits?: boolean | undefined;
};

/** Number type of a device's KV cache. @throws MaskrouteError `invalid_argument` when the device cannot use `asked`. */
export function kvTypeOn(device: Device | undefined, asked: KvType | undefined): KvType {
  if (device === undefined || device.kind === 'cpu') return asked ?? 'f32';
  const { floatType } = device;
  if (asked === undefined || asked === floatType) return floatType;
  const message = `On a GPU the KV cache has the compute type, here ${floatType}: omit --kv-type, or set --float-type ${asked}.`;
  throw new MaskrouteError('invalid_argument', message);
}

/** A mask holds only for the surrogates that it was learned with. @throws MaskrouteError `surrogates_mismatch`. */
export function checkSurrogates({ surrogates: wanted }: Mask, served: SurrogatesId | undefined): void {
  if (wanted === undefined || wanted === served) return;
  const message = `The mask needs surrogates ${wanted}; this model has ${served ?? 'none'}.`;
  throw new MaskrouteError('surrogates_mismatch', message, { param: 'mask' });
}

/** What every run needs. @throws RangeError when there are too many inputs, and as {@link checkSurrogates}. */
export function checkInputs(inputs: readonly RunInput[], served: SurrogatesId | undefined): void {
  if (inputs.length > BATCH_PLACES)
    throw new RangeError(`${inputs.length} sequences for ${BATCH_PLACES} places`);
  for (const { plan } of inputs) checkSurrogates(plan.mask, served);
}
