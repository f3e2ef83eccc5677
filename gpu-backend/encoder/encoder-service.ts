/**
 * Full encoders for requests, each in a thread of its own. The first request for an encoder opens it, if its files are
 * installed (`maskroute model pull all-minilm-l6-v2`), so that an unused encoder takes no memory. This file does not load
 * ONNX Runtime, as the command line imports it for the encoders' names.
 */
import { basename, join } from 'node:path';
import { Worker } from 'node:worker_threads';
import { z } from 'zod';
import type { EncoderSpec } from '../../shared/mask/mask-set.ts';
import { cancellation, MaskrouteError } from '../../shared/wire/errors.ts';
import { readOwnJson, sizeOf } from '../files.ts';
import type { EncoderStart, FromEncoder, ToEncoder } from './encoder-thread.ts';

/** The default of `/v1/embeddings`, and the teacher of the shipped static table. */
export const FULL_ENCODER = 'all-minilm-l6-v2';
/** Encoders with short names, and their repositories. Other encoders are named `hf:OWNER/NAME` or by a folder. */
export const ENCODERS: Readonly<Record<string, string>> = {
  [FULL_ENCODER]: 'sentence-transformers/all-MiniLM-L6-v2',
  'bge-small-en-v1.5': 'BAAI/bge-small-en-v1.5',
  'multilingual-e5-small': 'intfloat/multilingual-e5-small',
};

/** The files of {@link FULL_ENCODER}, pinned, because the revision of the shipped static table depends on them. */
export const ENCODER_FILES = [
  {
    name: 'model/config.json',
    bytes: 612,
    sha256: '953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41',
  },
  {
    name: 'model/tokenizer.json',
    bytes: 466_247,
    sha256: 'be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037',
  },
  {
    name: 'model/model.safetensors',
    bytes: 90_868_376,
    sha256: '53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db',
  },
] as const;

export const encoderFolder = (home: string): string => join(home, 'sources', FULL_ENCODER);

/** A file that says in which folder an encoder from the hub is. */
export const encoderPointer = (home: string, name: string): string => join(home, 'sources', `${name}.json`);
const encoderPointerSchema = z.strictObject({ folder: z.string() });

/** The folder of an encoder's files; undefined when not installed. */
async function installedFolder(home: string, name: string): Promise<string | undefined> {
  if (name === FULL_ENCODER && (await hasPinnedFiles(home))) return encoderFolder(home);
  const folder = (await readOwnJson(encoderPointer(home, name), encoderPointerSchema))?.folder;
  const isThere = folder !== undefined && (await sizeOf(join(folder, 'config.json'))) !== undefined;
  return isThere ? folder : undefined;
}

async function hasPinnedFiles(home: string): Promise<boolean> {
  const sizes = ENCODER_FILES.map(({ name }) => sizeOf(join(encoderFolder(home), basename(name))));
  return (await Promise.all(sizes)).every((bytes, i) => bytes === ENCODER_FILES[i]!.bytes);
}

export type EncoderService = {
  /** The first installed encoder. Opens it, as its revision is the hash of its weights. */
  installed(): Promise<{ readonly id: string; readonly spec: EncoderSpec } | undefined>;
  /**
   * @param name a key or a value of `ENCODERS`.
   * @throws MaskrouteError `model_not_found` for an unknown name or an encoder that is not installed, `queue_full`,
   * `engine_failed`, and the reason of `signal` when it aborts.
   */
  embed(name: string, texts: readonly string[], signal: AbortSignal): Promise<Embedded>;
  close(): Promise<void>;
};

type Embedded = {
  /** A unit vector for each text; zeros for an empty text. */
  readonly vectors: Float32Array[];
  /** Tokens of all texts, after truncation. */
  readonly tokens: number;
  readonly spec: EncoderSpec;
};

type EncoderServiceOptions = {
  readonly home: string;
  /** Gets the stack of a failure, which clients never see. */
  readonly onError: (detail: string) => void;
};

export function createEncoderService({ home, onError }: EncoderServiceOptions): EncoderService {
  const opening = new Map<string, Promise<EncoderThread>>();
  const start = (name: string, folder: string): Promise<EncoderThread> => {
    const thread = new EncoderThread({ id: ENCODERS[name]!, folder }, onError);
    const opened = thread.ready.then(() => thread);
    opening.set(name, opened);
    // However the thread ends, the next request opens another.
    void thread.ended.then(() => opening.delete(name));
    return opened;
  };
  const open = async (name: string): Promise<EncoderThread | undefined> => {
    if (opening.has(name)) return await opening.get(name);
    const folder = await installedFolder(home, name);
    // Another request may have opened it meanwhile.
    if (opening.has(name)) return await opening.get(name);
    return folder === undefined ? undefined : await start(name, folder);
  };
  return {
    async installed() {
      for (const name of Object.keys(ENCODERS)) {
        const thread = await open(name);
        if (thread !== undefined) return { id: name, spec: await thread.ready };
      }
      return undefined;
    },
    async embed(given, texts, signal) {
      const name = Object.entries(ENCODERS).find((names) => names.includes(given))?.[0];
      if (name === undefined) {
        const known = Object.keys(ENCODERS).join(', ');
        throw notFound(`There is no encoder ${JSON.stringify(given)} here; known: ${known}.`);
      }
      const thread = await open(name);
      if (thread === undefined) throw notFound(`Not installed: maskroute model pull ${name}.`);
      return await thread.embed(texts, signal);
    },
    async close() {
      for (const thread of await Promise.allSettled(opening.values())) {
        if (thread.status === 'fulfilled') await thread.value.close();
      }
    },
  };
}

const notFound = (message: string): MaskrouteError =>
  new MaskrouteError('model_not_found', message, { param: 'model' });
const failed = (): MaskrouteError => new MaskrouteError('engine_failed', 'The encoder has stopped.');

/** Most requests at a time. Each is bounded in texts, and an edge waits half a second at most. */
const JOBS_MAX = 64;

type Done = Extract<FromEncoder, { type: 'done' }>;

class EncoderThread {
  /** Rejects with MaskrouteError `engine_failed` when the thread ends before it is ready. */
  readonly ready: Promise<EncoderSpec>;
  readonly ended: Promise<void>;
  readonly #worker: Worker;
  readonly #onError: (detail: string) => void;
  readonly #waiting = new Map<number, PromiseWithResolvers<Done>>();
  #jobs = 0;

  constructor(workerData: EncoderStart, onError: (detail: string) => void) {
    const worker = new Worker(new URL('./encoder-thread.ts', import.meta.url), { workerData });
    const opened = Promise.withResolvers<EncoderSpec>();
    this.ready = opened.promise;
    this.#worker = worker;
    this.#onError = onError;
    worker.on('error', (error) => onError(error.stack ?? String(error)));
    worker.on('message', (message: FromEncoder) => {
      if (message.type === 'ready') opened.resolve(message.spec);
      else this.#settle(message);
    });
    this.ended = new Promise((resolve) => {
      worker.on('exit', () => {
        resolve();
        opened.reject(failed());
        for (const { reject } of this.#waiting.values()) reject(failed());
        this.#waiting.clear();
      });
    });
  }

  #settle(message: Exclude<FromEncoder, { type: 'ready' }>): void {
    const job = this.#waiting.get(message.job);
    this.#waiting.delete(message.job);
    if (message.type === 'done') {
      job?.resolve(message);
    } else {
      this.#onError(message.detail);
      job?.reject(failed());
    }
  }

  async embed(texts: readonly string[], signal: AbortSignal): Promise<Embedded> {
    if (this.#waiting.size >= JOBS_MAX) {
      throw new MaskrouteError('queue_full', `${JOBS_MAX} requests for embeddings are waiting already.`);
    }
    const job = this.#jobs++;
    const done = Promise.withResolvers<Done>();
    const cancel = () => {
      this.#post({ type: 'cancel', job });
      this.#waiting.delete(job);
      done.reject(cancellation(signal));
    };
    this.#waiting.set(job, done);
    this.#post({ type: 'embed', job, texts });
    signal.addEventListener('abort', cancel, { once: true });
    if (signal.aborted) cancel();
    try {
      const { vectors, tokens } = await done.promise;
      const spec = await this.ready;
      const { dimensions } = spec;
      return {
        vectors: texts.map((_, i) => vectors.subarray(i * dimensions, (i + 1) * dimensions)),
        tokens,
        spec,
      };
    } finally {
      signal.removeEventListener('abort', cancel);
    }
  }

  #post(message: ToEncoder): void {
    this.#worker.postMessage(message);
  }

  async close(): Promise<void> {
    // Not `terminate`: ONNX Runtime crashes the process when a run returns into a terminated thread.
    this.#post({ type: 'close' });
    await this.ended;
  }
}
