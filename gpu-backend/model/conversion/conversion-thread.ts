/** A thread that converts slices of matrices, one after the other. */
import { parentPort } from 'node:worker_threads';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { matrixInFile } from '../formats/tensor-parts.ts';
import type { TensorPlace } from '../model-source.ts';
import { convertSlice, type Slice } from './slice.ts';

export type ToConversion = {
  readonly slice: Slice;
  readonly place: TensorPlace;
  /** Of the weights file. */
  readonly descriptor: number;
};

export type FromConversion =
  | { readonly kind: 'done' }
  | {
      readonly kind: 'failed';
      readonly message: string;
      /** Of a `MaskrouteError`. */
      readonly code: string | undefined;
      /** Of a system's error, such as `ENOSPC`. */
      readonly errno: string | undefined;
    };

parentPort!.on('message', async ({ slice, place, descriptor }: ToConversion) => {
  let answer: FromConversion = { kind: 'done' };
  try {
    await convertSlice(slice, matrixInFile(place), descriptor);
  } catch (error) {
    const { message, code } = error as NodeJS.ErrnoException;
    const isOurs = error instanceof MaskrouteError;
    answer = {
      kind: 'failed',
      message,
      code: isOurs ? error.code : undefined,
      errno: isOurs ? undefined : code,
    };
  }
  parentPort!.postMessage(answer);
});
