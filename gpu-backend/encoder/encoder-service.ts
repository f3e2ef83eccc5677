/**
 * The full encoder for requests, in a thread of its own. It is opened by the first request and only when its files
 * are on this machine (`maskroute model pull all-minilm-l6-v2`): a backend that nobody asks keeps its memory.
 */
import { Worker } from 'node:worker_threads';
import type { EncoderSpec } from '../../shared/mask/mask-set.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import type { EncoderStart, FromEncoder, ToEncoder } from './encoder-messages.ts';
import { FULL_ENCODER, FULL_ENCODER_REPOSITORY } from './encoder-names.ts';
import { installedFullEncoder } from './full-encoder.ts';

export type Embedded = {
  /** One a text, of length 1; zero for an empty text. */
  readonly vectors: Float32Array[];
  /** Of all texts as the encoder cut them. */
  readonly tokens: number;
};

export type EncoderService = {
  /** What is installed; opens it, so that its revision is that of its weights. */
  installed(): Promise<{ readonly id: string; readonly spec: EncoderSpec } | undefined>;
  /**
   * @throws MaskrouteError `model_not_found` for another name or when it is not installed, `queue_full`,
   * `engine_failed`, `cancelled`.
   */
  embed(name: string, texts: readonly string[], signal: AbortSignal): Promise<Embedded>;
  close(): Promise<void>;
};

/** Requests at a time: each is bounded in texts, and an edge gives up after half a second anyway. */
const JOBS_MAX = 64;

export type EncoderServiceOptions = {
  readonly home: string;
  readonly threads: number;
  /** Hears of failures with their stack, which the wire never carries. */
  readonly onError: (detail: string) => void;
};

export function createEncoderService(options: EncoderServiceOptions): EncoderService {
  let opening: Promise<OpenThread> | undefined;
  const open = async (): Promise<OpenThread | undefined> => {
    if (opening !== undefined) return await opening;
    const folder = await installedFullEncoder(options.home);
    if (folder === undefined) return undefined;
    // Somebody may have been quicker while the disk was asked.
    opening ??= openThread(
      { id: FULL_ENCODER_REPOSITORY, folder, threads: options.threads },
      options.onError,
      () => {
        opening = undefined;
      },
    );
    return await opening;
  };
  return {
    async installed() {
      const thread = await open();
      return thread && { id: FULL_ENCODER, spec: thread.spec };
    },
    async embed(name, texts, signal) {
      if (name !== FULL_ENCODER && name !== FULL_ENCODER_REPOSITORY) {
        throw notFound(`There is no encoder ${JSON.stringify(name)} here; ${FULL_ENCODER} is known.`);
      }
      const thread = await open();
      if (thread === undefined) throw notFound(`Not installed: maskroute model pull ${FULL_ENCODER}.`);
      return await thread.embed(texts, signal);
    },
    async close() {
      const thread = await opening?.catch(() => undefined);
      await thread?.close();
    },
  };
}

const notFound = (message: string): MaskrouteError =>
  new MaskrouteError('model_not_found', message, { param: 'model' });
const failed = (): MaskrouteError => new MaskrouteError('engine_failed', 'The encoder has stopped.');

type OpenThread = {
  readonly spec: EncoderSpec;
  embed(texts: readonly string[], signal: AbortSignal): Promise<Embedded>;
  close(): Promise<void>;
};
type Waiting = {
  resolve(done: Extract<FromEncoder, { type: 'done' }>): void;
  reject(error: MaskrouteError): void;
};

/** `onEnd` is called once, however the thread ended; the next request opens another. */
async function openThread(
  workerData: EncoderStart,
  onError: (detail: string) => void,
  onEnd: () => void,
): Promise<OpenThread> {
  const worker = new Worker(new URL('./encoder-thread.ts', import.meta.url), { workerData });
  const waiting = new Map<number, Waiting>();
  let jobs = 0;
  worker.on('error', (error) => onError(error.stack ?? String(error)));
  worker.on('exit', () => {
    onEnd();
    for (const { reject } of waiting.values()) reject(failed());
    waiting.clear();
  });
  const spec = await new Promise<EncoderSpec>((resolve, reject) => {
    worker.on('message', (message: FromEncoder) => {
      if (message.type === 'ready') return resolve(message.spec);
      const job = waiting.get(message.job);
      waiting.delete(message.job);
      if (message.type === 'done') return job?.resolve(message);
      onError(message.detail);
      job?.reject(failed());
    });
    worker.once('exit', () => reject(failed()));
  });
  const post = (message: ToEncoder) => worker.postMessage(message);
  return {
    spec,
    async embed(texts, signal) {
      if (waiting.size >= JOBS_MAX) {
        throw new MaskrouteError('queue_full', `${JOBS_MAX} requests for embeddings are waiting already.`);
      }
      const job = jobs++;
      const cancelled = () => {
        post({ type: 'cancel', job });
        waiting.get(job)?.reject(new MaskrouteError('cancelled', 'The request was cancelled.'));
        waiting.delete(job);
      };
      try {
        const { vectors, tokens } = await new Promise<Extract<FromEncoder, { type: 'done' }>>(
          (resolve, reject) => {
            waiting.set(job, { resolve, reject });
            post({ type: 'embed', job, texts });
            signal.addEventListener('abort', cancelled, { once: true });
            if (signal.aborted) cancelled();
          },
        );
        const { dimensions } = spec;
        return {
          vectors: texts.map((_, i) => vectors.subarray(i * dimensions, (i + 1) * dimensions)),
          tokens,
        };
      } finally {
        signal.removeEventListener('abort', cancelled);
      }
    },
    close: async () => {
      await worker.terminate();
    },
  };
}
