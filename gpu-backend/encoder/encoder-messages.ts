/** What the main thread and the encoder's thread say to each other. */
import type { EncoderSpec } from '../../shared/mask/mask-set.ts';

export type EncoderStart = { readonly id: string; readonly folder: string; readonly threads: number };

export type ToEncoder =
  | { readonly type: 'embed'; readonly job: number; readonly texts: readonly string[] }
  | { readonly type: 'cancel'; readonly job: number };

export type FromEncoder =
  | { readonly type: 'ready'; readonly spec: EncoderSpec }
  /** `vectors`: `[texts, dimensions]`, row-major. `tokens`: of all texts, special ones included. */
  | { readonly type: 'done'; readonly job: number; readonly vectors: Float32Array; readonly tokens: number }
  | { readonly type: 'failed'; readonly job: number; readonly detail: string };
