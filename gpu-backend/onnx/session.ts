/**
 * The only file that imports onnxruntime-node. All other files use the sessions and tensors of this file, so that another
 * runtime, provider or version changes only this file.
 *
 * `run` is a synchronous native call in an async function: it blocks the calling thread.
 */
import { rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { InferenceSession, Tensor } from 'onnxruntime-node';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { namingFile, partOf, removeOldParts } from '../files.ts';
import { encodeModel } from './encode.ts';
import {
  type ElementType,
  type FloatType,
  type Graph,
  GraphBuilder,
  MICROSOFT,
  NOTHING_BACK,
} from './graph.ts';
import { withUnsignedCodes } from './signed-codes.ts';

/*
 * Disables ONNX Runtime's telemetry. Since 1.29 its builds for Linux report sessions to Microsoft (names and hashes of the
 * model's file and graph), and leave files in the home and in the folder for temporary files. The variable is read when
 * the first session opens.
 */
process.env.ORT_DISABLE_TELEMETRY = '1';

/*
 * Disables the flash attention kernel of `GroupQueryAttention`. In ONNX Runtime 1.30 it is slow for single tokens: it is made
 * for large batches, has no AVX, computes sequences of different lengths one after the other, and splits a single sequence's
 * keys between threads. Sessions read the variable when they open. In a worker thread, `process.env` is a copy that native
 * code does not see, so modules that start threads import this file, too.
 */
process.env.ORT_GQA_DISABLE_FLASH_ATTENTION = '1';

export type RuntimeTensor = Tensor;
export type Feeds = Record<string, Tensor>;
/** Outputs to return. With a tensor, the output is written into that tensor's buffer, which `engine/kv-cache.ts` needs. */
export type Fetches = Record<string, Tensor | null>;
export type Outputs = Readonly<Record<string, Tensor>>;

export type SessionOptions = {
  readonly threads: number;
  /**
   * Whether threads spin for {@link SPIN_us} while they wait for the next node of a run: fastest for many small nodes on an idle
   * machine, and slower when other programs use the cores. Default true; long offline work turns it off.
   */
  readonly spinning?: boolean;
  /** Whether scratch memory is kept between runs: faster, but the peak stays resident. Default true. */
  readonly arena?: boolean;
  /** Where to write a profile with every node's time. */
  readonly profileFile?: string;
  /** Default: the CPU. */
  readonly device?: 'cpu' | 'webgpu';
  /**
   * Outputs that stay in the device's memory: they can be inputs of later runs, but cannot be read. With any such output,
   * onnxruntime-node allocates all outputs of a run (`inference_session_wrap.cc`) and writes none into given tensors.
   */
  readonly stay?: readonly string[];
};

export type Session = {
  readonly inputNames: readonly string[];
  readonly outputNames: readonly string[];
  run(feeds: Feeds, fetches: Fetches | readonly string[]): Promise<Outputs>;
  /** A run that returns no outputs, and writes them into given tensors only. The graph needs `giveNothingBack`. */
  runInPlace(feeds: Feeds, fetches: Readonly<Record<string, Tensor>>): Promise<void>;
  endProfiling(): void;
  release(): Promise<void>;
};

/**
 * The internal handler of an `InferenceSession`. It is called directly, as `InferenceSession.run` compares every name with
 * every other, which takes milliseconds for hundreds of outputs.
 */
type Handler = {
  run(feeds: Feeds, fetches: Readonly<Record<string, Tensor | null>>, options: object): Promise<Outputs>;
};

/**
 * Longer than what one thread does alone between two products, so an idle machine loses nothing. By default threads spin for tens
 * of milliseconds, also when a run is over: they take the cores from other sessions of the process, from HTTP and from the edge,
 * and steps of two sessions in turns took twice as long. Where other programs run, the system soon takes the core from a thread that
 * spins, and the others of a node wait for it: such steps took three times as long.
 */
const SPIN_us = 50;

/** The message of onnxruntime-node's error about the output {@link NOTHING_BACK}. */
const CANNOT_CONVERT = 'Non tensor type is temporarily not supported.';

/** `model`: a path, with external weights beside the file, or the bytes of a model without external weights. */
export async function createSession(model: string | Uint8Array, options: SessionOptions): Promise<Session> {
  const { device = 'cpu', stay = [] } = options;
  const settings: InferenceSession.SessionOptions = {
    executionProviders: [device],
    // With a GPU provider, ONNX Runtime warns about every shape computation that stays on the CPU.
    logSeverityLevel: device === 'cpu' ? 2 : 3,
    ...(stay.length === 0
      ? {}
      : { preferredOutputLocation: Object.fromEntries(stay.map((name) => [name, 'gpu-buffer' as const])) }),
    intraOpNumThreads: options.threads,
    interOpNumThreads: 1,
    executionMode: 'sequential',
    graphOptimizationLevel: 'all',
    enableCpuMemArena: options.arena ?? true,
    // A memory pattern is kept for every set of shapes, and the shapes of a growing cache never repeat.
    enableMemPattern: false,
    extra: {
      session: {
        intra_op: options.spinning === false ? { allow_spinning: '0' } : { spin_duration_us: `${SPIN_us}` },
      },
    },
    ...(options.profileFile === undefined
      ? {}
      : { enableProfiling: true, profileFilePrefix: options.profileFile }),
  };
  const opening =
    typeof model === 'string'
      ? InferenceSession.create(model, settings)
      : InferenceSession.create(model, settings);
  const session = await opening.catch((error: Error) => {
    throw linkedWeights(error) ?? error;
  });
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

/** The error for a file of weights with a second name. ONNX Runtime accepts it outside of branches only. */
function linkedWeights(error: Error): MaskrouteError | undefined {
  const file = /stored in (.*), but it has multiple hard links/.exec(error.message)?.[1];
  if (file === undefined) return undefined;
  return new MaskrouteError(
    'invalid_argument',
    `${file} has another name on this disk (a hard link), which ONNX Runtime refuses. Copy its folder without links, ` +
      'or pull the model again with --force.',
    { cause: error },
  );
}

/** The graph, as this CPU multiplies it exactly; {@link createSessionIn} opens it so. */
export const exactHere = async (graph: Graph): Promise<Graph> =>
  (await multipliesSignedExactly()) ? graph : withUnsignedCodes(graph);

/** Whether this CPU multiplies signed codes of weights exactly (`signed-codes.ts`). It is tried once. */
export function multipliesSignedExactly(): Promise<boolean> {
  areSignedExact ??= multipliesLargest();
  return areSignedExact;
}
let areSignedExact: Promise<boolean> | undefined;

/** Multiplies the largest codes that there are: if anything overflows, they do. */
async function multipliesLargest(): Promise<boolean> {
  const [rows, inputs, outputs] = [8, 64, 16];
  const [activation, weight] = [255, 127];
  const g = new GraphBuilder('signed_codes');
  const x = g.input('x', 'u8', [rows, inputs]);
  const bytes = new Uint8Array(inputs * outputs).fill(weight);
  const weights = g.initializer('w', 'i8', [inputs, outputs], { kind: 'inline', bytes });
  const one = g.constant('f32', [], [1]);
  const y = g.op('MatMulIntegerToFloat', [x, weights, one, one], {}, MICROSOFT);
  g.output(y, 'f32', [rows, outputs]);
  const session = await createSession(encodeModel(g.graph), { threads: 1, spinning: false });
  try {
    const codes = new Uint8Array(rows * inputs).fill(activation);
    const found = await session.run({ x: tensor('u8', codes, [rows, inputs]) }, [y.name]);
    return floats(found[y.name]!).every((value) => value === inputs * activation * weight);
  } finally {
    await session.release();
  }
}

/**
 * Opens a graph that is not in a file, with external weights in `folder`. ONNX Runtime looks for them beside the model's file,
 * so a temporary file is written there.
 */
export async function createSessionIn(
  folder: string,
  graph: Graph,
  options: SessionOptions,
): Promise<Session> {
  const file = join(folder, `${graph.name}.onnx`);
  await removeOldParts(file);
  const path = partOf(file);
  const exact = await exactHere(graph);
  try {
    await writeFile(path, encodeModel(exact)).catch((error: unknown) => {
      throw namingFile(file, error);
    });
    return await createSession(path, options);
  } finally {
    await rm(path, { force: true });
  }
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

/** A tensor with a copy of `values`. */
export const floatTensor = (type: FloatType, values: ArrayLike<number>, dims: readonly number[]): Tensor =>
  type === 'f32'
    ? tensor(type, Float32Array.from(values), dims)
    : tensor(type, Float16Array.from(values), dims);

/** `values` as an int64 tensor, one-dimensional by default. */
export function integers(values: ArrayLike<number>, dims: readonly number[] = [values.length]): Tensor {
  // Written as 32-bit halves, as a BigInt for each value would be an object for each.
  const halves = new Int32Array(2 * values.length);
  for (let i = 0; i < values.length; i++) {
    const value = values[i]!;
    halves[2 * i] = value;
    halves[2 * i + 1] = Math.floor(value / 2 ** 32);
  }
  return tensor('i64', new BigInt64Array(halves.buffer), dims);
}

export const floats = (value: Tensor): Float32Array => value.data as Float32Array;

/** The values of an output. */
export const floatsOrHalves = (value: Tensor): Float32Array | Float16Array =>
  value.data as unknown as Float32Array | Float16Array;
