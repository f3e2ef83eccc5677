/**
 * Converts slices of matrices, in several threads if there is enough work. Threads share this process's open files, so
 * messages between them are small. The largest slice's memory limits the number of threads.
 */
import { availableParallelism } from 'node:os';
import { Worker } from 'node:worker_threads';
import type { ErrorCode } from '../../../shared/wire/errors.ts';
import { MaskrouteError } from '../../../shared/wire/errors.ts';
import { tensorType } from '../formats/dequantize.ts';
import { matrixInFile } from '../formats/tensor-parts.ts';
import type { TensorPlace } from '../model-source.ts';
import { convertSlice, type FromConversion, type Slice, sliceBytes, type ToConversion } from './slice.ts';

/** A slice of the tensor at `place`. */
export type Job = { readonly place: TensorPlace; readonly slice: Slice };

/** Most memory of all slices in work; a single slice may take more. */
const MEMORY_BYTES_MAX = 1.5 * 2 ** 30;
/** With fewer weights, threads would take longer to start than the work. */
const THREADS_FROM_WEIGHTS = 2 ** 24;

type ConversionOptions = {
  /** By default the number of cores, or fewer when memory is short or the work is small. */
  readonly threads?: number | undefined;
  /** Gets the weights of each finished slice; when it throws, the work ends. */
  readonly onWeights: (weights: number) => void;
};

/** Writes all slices into the weights file `descriptor`. @throws MaskrouteError `corrupt_model`. */
export async function convertSlices(
  jobs: readonly Job[],
  descriptor: number,
  { threads = threadsFor(jobs), onWeights }: ConversionOptions,
): Promise<void> {
  if (threads > 1) return inThreads(jobs, descriptor, { threads, onWeights });
  for (const { place, slice } of jobs) {
    await convertSlice(slice, matrixInFile(place), descriptor);
    onWeights(weightsOf(slice));
  }
}

const weightsOf = ({ rows, columns }: Slice): number => rows * columns;

function threadsFor(jobs: readonly Job[]): number {
  const weights = jobs.reduce((sum, { slice }) => sum + weightsOf(slice), 0);
  if (weights < THREADS_FROM_WEIGHTS) return 1;
  const largest_bytes = jobs.reduce((most, { place, slice }) => {
    const { blockBytes, blockSize } = tensorType(place.type)!;
    return Math.max(most, sliceBytes(slice, blockBytes / blockSize));
  }, 0);
  return Math.max(1, Math.min(availableParallelism(), Math.floor(MEMORY_BYTES_MAX / largest_bytes)));
}

async function inThreads(
  jobs: readonly Job[],
  descriptor: number,
  { threads, onWeights }: { readonly threads: number; readonly onWeights: (weights: number) => void },
): Promise<void> {
  const workers = Array.from(
    { length: Math.min(threads, jobs.length) },
    () => new Worker(new URL('./slice.ts', import.meta.url)),
  );
  let next = 0;
  try {
    await Promise.all(
      workers.map(async (worker) => {
        while (next < jobs.length) {
          const job = jobs[next++]!;
          await inThread(worker, { ...job, descriptor });
          onWeights(weightsOf(job.slice));
        }
      }),
    );
  } catch (error) {
    // The other threads begin no more slices.
    next = jobs.length;
    throw error;
  } finally {
    // Threads must not write any more when the caller closes the file.
    await Promise.all(workers.map((worker) => worker.terminate()));
  }
}

function inThread(worker: Worker, message: ToConversion): Promise<void> {
  return new Promise((resolve, reject) => {
    const settle = (act: () => void) => {
      worker.off('message', onMessage).off('error', onError);
      act();
    };
    const onMessage = (answer: FromConversion) =>
      settle(() => (answer.kind === 'done' ? resolve() : reject(errorFrom(answer))));
    const onError = (error: Error) => settle(() => reject(error));
    worker.on('message', onMessage).on('error', onError);
    worker.postMessage(message);
  });
}

/** Errors lose their class and code between threads, so the message has both codes. */
function errorFrom({ code, errno, message }: Extract<FromConversion, { kind: 'failed' }>): Error {
  if (code !== undefined) return new MaskrouteError(code as ErrorCode, message);
  return Object.assign(new Error(message), errno === undefined ? {} : { code: errno });
}
