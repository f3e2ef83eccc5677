/**
 * The one file that imports onnxruntime-node. Everything else speaks of sessions and tensors in these terms,
 * so a change of runtime, provider or version is a change here.
 *
 * `run` is one synchronous native call behind an async face: it blocks the thread that calls it.
 */
import { rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { InferenceSession, Tensor } from 'onnxruntime-node';
import { partOf } from '../files.ts';
import { encodeModel } from './encode.ts';
import { type ElementType, type FloatType, type Graph, NOTHING_BACK } from './graph.ts';

/*
 * Since 1.29 ONNX Runtime's builds for Linux report sessions to Microsoft (the model's file and graph by name and hash), and leave
 * files in the home and in the folder for temporary ones, unless this variable says no. Nobody who runs a backend has asked for that.
 * It is read when the first session opens.
 */
process.env.ORT_DISABLE_TELEMETRY = '1';

/*
 * ONNX Runtime 1.30 attends single tokens (`GroupQueryAttention`) in a kernel for large batches that has no AVX, takes one sequence after
 * the other where their lengths differ, and shares a lone sequence's keys among threads. Its plain kernel has none of that. A session
 * reads this when it opens. A thread has variables of its own, so whoever starts one imports this file, too.
 */
process.env.ORT_GQA_DISABLE_FLASH_ATTENTION = '1';

export type RuntimeTensor = Tensor;
export type Feeds = Record<string, Tensor>;
/** A name with a tensor is written in place into that tensor's buffer (`engine/kv-cache.ts` rests on it). */
export type Fetches = Record<string, Tensor | null>;
export type Outputs = Readonly<Record<string, Tensor>>;

export type SessionOptions = {
  readonly threads: number;
  /**
   * Threads spin while they wait for the next node: best for many small nodes on an idle machine, and very slow where
   * others compete for the cores. On by default; long offline work goes without.
   */
  readonly spinning?: boolean;
  /** Keep scratch memory between runs: faster, and the peak stays resident. */
  readonly arena?: boolean;
  /** Where to write a trace of every node's time, for benches. */
  readonly profileFile?: string;
  /** What computes; the processor unless given. */
  readonly device?: 'cpu' | 'webgpu';
  /**
   * Outputs that stay in the device's memory: they can be fed and fetched again, and not be read. With any, onnxruntime-node
   * makes all outputs anew (`inference_session_wrap.cc`); a session without writes those that are fetched with a tensor in place.
   */
  readonly stay?: readonly string[];
};

export type Session = {
  readonly inputNames: readonly string[];
  readonly outputNames: readonly string[];
  run(feeds: Feeds, fetches: Fetches | readonly string[]): Promise<Outputs>;
  /** The same where each output is wanted in a tensor of ours alone, and its graph gives nothing back (`giveNothingBack`). */
  runInPlace(feeds: Feeds, fetches: Readonly<Record<string, Tensor>>): Promise<void>;
  endProfiling(): void;
  release(): Promise<void>;
};

/**
 * What runs inside an `InferenceSession`. Its own `run` compares every name with every other, which takes milliseconds where a graph
 * has hundreds of outputs.
 */
type Handler = {
  run(feeds: Feeds, fetches: Readonly<Record<string, Tensor | null>>, options: object): Promise<Outputs>;
};

/** What onnxruntime-node says of the output {@link NOTHING_BACK}. */
const CANNOT_CONVERT = 'Non tensor type is temporarily not supported.';

/** `model`: a path (external weights lie beside it) or the bytes of a model that needs no other file. */
export async function createSession(model: string | Uint8Array, options: SessionOptions): Promise<Session> {
  const { device = 'cpu', stay = [] } = options;
  const settings: InferenceSession.SessionOptions = {
    executionProviders: [device],
    // With another provider than the processor's ONNX Runtime warns of every shape that the host computes.
    logSeverityLevel: device === 'cpu' ? 2 : 3,
    ...(stay.length === 0
      ? {}
      : { preferredOutputLocation: Object.fromEntries(stay.map((name) => [name, 'gpu-buffer' as const])) }),
    intraOpNumThreads: options.threads,
    interOpNumThreads: 1,
    executionMode: 'sequential',
    graphOptimizationLevel: 'all',
    enableCpuMemArena: options.arena ?? true,
    // Patterns are kept for every set of shapes, and the shapes of a growing cache never repeat.
    enableMemPattern: false,
    ...(options.spinning === false ? { extra: { session: { intra_op: { allow_spinning: '0' } } } } : {}),
    ...(options.profileFile === undefined
      ? {}
      : { enableProfiling: true, profileFilePrefix: options.profileFile }),
  };
  const session =
    typeof model === 'string'
      ? await InferenceSession.create(model, settings)
      : await InferenceSession.create(model, settings);
  const { handler } = session as unknown as { readonly handler: Handler };
  return {
    inputNames: session.inputNames,
    outputNames: session.outputNames,
    run: (feeds, fetches) =>
      handler.run(
        feeds,
        Array.isArray(fetches) ? Object.fromEntries(fetches.map((name) => [name, null])) : fetches,
        {},
      ),
    async runInPlace(feeds, fetches) {
      try {
        await handler.run(feeds, { [NOTHING_BACK]: null, ...fetches }, {});
      } catch (error) {
        if (!(error instanceof Error) || error.message !== CANNOT_CONVERT) throw error;
      }
    },
    endProfiling: () => session.endProfiling(),
    release: () => session.release(),
  };
}

/**
 * A graph that is in no file; its external weights lie in `folder`. ONNX Runtime finds them beside the graph's file, so there is
 * one while it opens.
 */
export async function createSessionIn(
  folder: string,
  graph: Graph,
  options: SessionOptions,
): Promise<Session> {
  const path = partOf(join(folder, `${graph.name}.onnx`));
  await writeFile(path, encodeModel(graph));
  return createSession(path, options).finally(() => rm(path, { force: true }));
}

type TensorData = {
  f32: Float32Array;
  f16: Float16Array;
  i64: BigInt64Array;
  i32: Int32Array;
  bool: Uint8Array;
  u8: Uint8Array;
  i8: Int8Array;
};
const RUNTIME_TYPES = {
  f32: 'float32',
  f16: 'float16',
  i64: 'int64',
  i32: 'int32',
  bool: 'bool',
  u8: 'uint8',
  i8: 'int8',
} as const;

/** A tensor over `data` itself, not a copy. */
export function tensor<T extends keyof TensorData & ElementType>(
  type: T,
  data: TensorData[T],
  dims: readonly number[],
): Tensor {
  const made = new Tensor(RUNTIME_TYPES[type], data as Float32Array, dims as number[]);
  // onnxruntime-node 1.30 sees no bytes in a Float16Array.
  if (data instanceof Float16Array)
    Object.assign(made, { cpuData: new Uint16Array(data.buffer, data.byteOffset, data.length) });
  return made;
}

/** `values` in either precision. */
export const floatTensor = (type: FloatType, values: ArrayLike<number>, dims: readonly number[]): Tensor =>
  type === 'f32'
    ? tensor(type, Float32Array.from(values), dims)
    : tensor(type, Float16Array.from(values), dims);

/** `values` as int64, a list of them unless `dims` says otherwise. */
export function integers(values: ArrayLike<number>, dims: readonly number[] = [values.length]): Tensor {
  // Written in halves: a BigInt for each would be an object for each.
  const halves = new Int32Array(2 * values.length);
  for (let i = 0; i < values.length; i++) {
    const value = values[i]!;
    halves[2 * i] = value;
    halves[2 * i + 1] = Math.floor(value / 2 ** 32);
  }
  return tensor('i64', new BigInt64Array(halves.buffer), dims);
}

export const floats = (value: Tensor): Float32Array => value.data as Float32Array;

/** Of a tensor that the runtime made. */
export const floatsOrHalves = (value: Tensor): Float32Array | Float16Array =>
  value.data as unknown as Float32Array | Float16Array;

/** Whether its values lie in a device's memory: feeding it copies nothing, and it cannot be read. */
export const isOnDevice = (value: Tensor): boolean => value.location === 'gpu-buffer';
