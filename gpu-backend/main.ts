/**
 * Wires the backend: an installed model, its engine, and the HTTP API. No other file knows all three.
 *
 * The engine computes on the CPU, or on a GPU through ONNX Runtime's WebGPU provider (`onnx/device.ts` chooses); encoders
 * compute on the CPU.
 */
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import type { Logger } from 'pino';
import { pino } from 'pino';
import type { Collector } from '../shared/tracing/traces.ts';
import { MaskrouteError } from '../shared/wire/errors.ts';
import { type ApiLimits, type ApiOptions, DEFAULT_LIMITS, type ServedModel } from './api/parts.ts';
import { type RunningServer, startServer } from './api/server.ts';
import { within } from './api/sse.ts';
import type { Tracing } from './api/trace-export.ts';
import { createEncoderService } from './encoder/encoder-service.ts';
import { createMaskRegistry } from './engine/mask-registry.ts';
import { createEngine } from './engine/start-engine.ts';
import { createGrammars } from './grammar/grammars.ts';
import { type HomeJobs, openHomeJobs } from './jobs/home-jobs.ts';
import type { KvType } from './model/model-source.ts';
import { openInstalled } from './model/store.ts';
import { openTextService, type TextService } from './model/tokenizer/text-service.ts';
import { chooseDevice, type DeviceChoice, deviceName } from './onnx/device.ts';
import type { FloatType } from './onnx/graph.ts';
import { portInUse } from './ports.ts';
import { onStopSignal } from './stop-signals.ts';

/** For `audience`: the address that the backend listens on. */
export const OWN_ADDRESS = Symbol('own address');

/** The model, and how it computes. */
type ModelOptions = {
  /** `MASKROUTE_HOME`: models and fetched masks. */
  readonly home: string;
  /** An installed model's name. */
  readonly model: string;
  /** All cores by default. On a busy machine a single thread is far faster than several. */
  readonly threads?: number | undefined;
  /** The CPU by default. */
  readonly device?: DeviceChoice | undefined;
  /** A GPU's compute type; fp16 by default if it supports that. */
  readonly floatType?: FloatType | undefined;
  /** Number type of the KV cache; fp32 by default, on a GPU its compute type. */
  readonly kvType?: KvType | undefined;
  /** KV cache of running requests, in tokens; 8 times the model's context by default. */
  readonly cacheTokens?: number | undefined;
  /** Prefix cache, in tokens; 0 disables it. */
  readonly prefixTokens?: number | undefined;
  /** Whether answers are predicted from their own prompt, unless their client predicts them. Default false. */
  readonly promptLookup?: boolean | undefined;
};

/** Where the backend listens, and who may call it. */
type AccessOptions = {
  /** 0 picks a free one. */
  readonly port: number;
  /** The interface to listen on: the loopback by default, `0.0.0.0` for all. */
  readonly host?: string | undefined;
  readonly backendKey: string;
  /** A second key that is accepted during a rotation; nothing is signed or encrypted with it. */
  readonly otherBackendKey?: string | undefined;
  /** The address by which the edge calls this backend; tokens for another address are refused. Without, all are accepted. */
  readonly audience?: string | typeof OWN_ADDRESS | undefined;
  /** A key that reads `/metrics` and nothing else; without, only the backend key reads them. */
  readonly metricsKey?: string | undefined;
  /** The edge from which unknown masks are fetched; without, the edge in the caller's token. */
  readonly edgeUrl?: string | undefined;
  readonly limits?: Partial<ApiLimits>;
};

type JobOptions = {
  /** The script that runs a command of the command line as a job; without, there are no jobs. */
  readonly jobEntry?: string | undefined;
  /** A folder whose files jobs may use as data. */
  readonly jobDataFolder?: string | undefined;
};

export type BackendOptions = ModelOptions &
  AccessOptions &
  JobOptions & {
    /** JSON lines on standard output by default. No prompts, no keys. */
    readonly log?: Logger;
    /** The collector of traces; without, tracing is off. */
    readonly collector?: Collector | undefined;
  };

export type RunningBackend = {
  readonly url: string;
  /** Lets running answers finish, in bounded time; `GET /v1/answers/{id}` still works. */
  drain(): Promise<void>;
  /** Drains, then closes the port and the engine. May be called twice. */
  close(): Promise<void>;
};

/**
 * Resolves when the backend accepts requests. Rejects with MaskrouteError `model_not_found`, `corrupt_model`,
 * `engine_failed`, `invalid_argument` when the key is missing, `port_in_use`, or `start_failed` when it cannot listen.
 */
export async function startBackend(options: BackendOptions): Promise<RunningBackend> {
  const log = options.log ?? openLog();
  if (options.backendKey.trim() === '') {
    const message = 'The backend needs a key: set MASKROUTE_BACKEND_KEY.';
    throw new MaskrouteError('invalid_argument', message);
  }
  const { threads = availableParallelism() } = options;
  const model = await withSmallHeap(() => openModel(options, threads, log));
  const { engine, text, grammars } = model;
  if (options.audience === undefined)
    log.warn(
      'tokens for other backends are accepted too: set MASKROUTE_BACKEND_URL to accept only those for this one',
    );
  const encoders = createEncoderService({
    home: options.home,
    onError: (detail) => log.error({ detail }, 'the encoder failed'),
  });
  const tracing = options.collector && (await openTracing(options.collector, log));
  let jobs: HomeJobs | undefined;
  const closeParts = async () => {
    await Promise.all([encoders.close(), text.close(), grammars.close(), jobs?.close(), tracing?.close()]);
    await within(engine.close(), ENGINE_CLOSE_ms);
  };
  try {
    jobs = await jobsOf(options, model.name, log);
    const tracer = tracing?.tracer;
    const server = await serve(options, { model, encoders, jobs: () => jobs?.held, tracer, log });
    const device = deviceName(engine.model.device);
    log.info({ url: server.url, model: model.name, device, threads }, 'ready');
    let closing: Promise<void> | undefined;
    const close = async () => {
      log.info('stopping');
      // Jobs stop before the drain: a service manager also signals child processes, and a job that ends by that signal counts
      // as failed. A job stopped here resumes at the next start.
      void jobs?.stop();
      await server.close();
      await closeParts();
      log.info('stopped');
    };
    return {
      url: server.url,
      drain: server.drain,
      close: () => {
        closing ??= close();
        return closing;
      },
    };
  } catch (error) {
    await closeParts();
    throw error;
  }
}

const LOG_BUFFER_BYTES_MAX = 4 * 1024 * 1024;

/**
 * A log of JSON lines on standard output. Writes are asynchronous, so that a slow disk does not delay answers; the rest is
 * flushed at exit. A full disk loses lines.
 */
export function openLog(): Logger {
  const out = pino.destination({ sync: false, maxLength: LOG_BUFFER_BYTES_MAX });
  out.on('error', () => {
    // After a write error a flush at exit would retry for ever.
    out.flushSync = () => {};
  });
  return pino(out);
}

/** Imported only if needed, since the exporter takes some megabytes. */
async function openTracing(collector: Collector, log: Logger): Promise<Tracing> {
  const { openTracing } = await import('./api/trace-export.ts');
  return openTracing(collector, log);
}

/** How long the engine may take to close after the last answer; then the process ends anyway. */
const ENGINE_CLOSE_ms = 3000;

async function serve(
  options: AccessOptions & Pick<ModelOptions, 'home'>,
  parts: Pick<ApiOptions, 'model' | 'encoders' | 'jobs' | 'tracer' | 'log'>,
): Promise<RunningServer> {
  const { model, log } = parts;
  const { home, backendKey, otherBackendKey, metricsKey, edgeUrl } = options;
  const own = Promise.withResolvers<string>();
  const audience = options.audience === OWN_ADDRESS ? own.promise : options.audience;
  const masks = createMaskRegistry({
    folder: join(home, 'masks'),
    model: model.engine.model,
    backendKey,
    edgeUrl,
    warn: (message, detail) => log.warn(detail, message),
  });
  const keys = { backendKey, otherBackendKey, metricsKey, audience };
  const limits = { ...DEFAULT_LIMITS, ...options.limits };
  const server = await startServer(
    { ...parts, masks, keys, limits },
    { port: options.port, hostname: options.host ?? '127.0.0.1' },
  ).catch((cause: NodeJS.ErrnoException) => {
    if (cause.code === 'EADDRINUSE') throw portInUse(options.port, 'BACKEND_PORT', cause);
    throw new MaskrouteError('start_failed', `The backend cannot listen: ${cause.message}.`, { cause });
  });
  own.resolve(server.url);
  return server;
}

async function jobsOf(options: BackendOptions, model: string, log: Logger): Promise<HomeJobs | undefined> {
  const { home, backendKey, otherBackendKey, jobEntry: entry, jobDataFolder: dataFolder } = options;
  if (entry === undefined) return undefined;
  return openHomeJobs({
    home,
    model,
    entry,
    dataFolder,
    backendKeys: [backendKey, ...(otherBackendKey ? [otherBackendKey] : [])],
    note: (message, detail) => log.info(detail, message),
    warn: (reason) => log.warn({ reason }, 'this backend runs no jobs for now'),
  });
}

/**
 * Opening a model leaves 20 MB of garbage that V8 would not collect for long, so V8 optimizes for size meanwhile. Not while
 * serving: a small heap is collected ten times a second, and every collection delays all answers.
 */
async function withSmallHeap<Opened>(open: () => Promise<Opened>): Promise<Opened> {
  setFlagsFromString('--optimize-for-size');
  try {
    return await open();
  } finally {
    setFlagsFromString('--no-optimize-for-size');
    collectGarbage();
  }
}

/** Takes 50 ms, which the first requests would otherwise wait. */
function collectGarbage(): void {
  setFlagsFromString('--expose-gc');
  runInNewContext('gc')();
  setFlagsFromString('--no-expose-gc');
}

async function openModel(
  options: ModelOptions,
  threads: number,
  log: Logger,
): Promise<ServedModel & { readonly text: TextService }> {
  const {
    home,
    device: choice = 'cpu',
    floatType,
    kvType,
    cacheTokens,
    prefixTokens,
    promptLookup,
  } = options;
  const { folder, manifest } = await openInstalled(home, options.model);
  const { device, reason } = await chooseDevice({ choice, floatType, weights: manifest.weights });
  if (reason !== undefined) log.warn({ reason }, 'answers are computed on the CPU');
  const text = await openTextService({
    folder,
    manifest,
    onError: (detail) => log.error({ detail }, 'text could not be read'),
  }).catch((error) => {
    throw notOpened(manifest.name, error);
  });
  const engine = await createEngine({
    modelDir: folder,
    hash: manifest.hash,
    config: manifest.config,
    device,
    kvType,
    threads,
    ...(manifest.surrogates && { surrogates: manifest.surrogates.id }),
    limits: {
      ...(cacheTokens === undefined ? {} : { cacheTokensMax: cacheTokens }),
      ...(prefixTokens === undefined ? {} : { prefixTokensMax: prefixTokens }),
      ...(promptLookup === undefined ? {} : { promptLookup }),
    },
    onError: (detail) => log.error({ detail }, 'the engine failed'),
  }).catch(async (error) => {
    await text.close();
    throw notOpened(manifest.name, error);
  });
  const created_s = Math.floor(Date.parse(manifest.importedAt) / 1000);
  const endTokenIds = manifest.eosTokenIds;
  const grammars = createGrammars({
    vocabulary: {
      table: text.table,
      size: manifest.config.vocabularySize,
      // For a model without an end token the last token of the vocabulary stands in.
      endTokenId: endTokenIds[0] ?? manifest.config.vocabularySize - 1,
    },
    onError: (detail) => log.error({ detail }, 'a grammar failed'),
  });
  return { name: manifest.name, created_s, engine, text, grammars, endTokenIds };
}

/** Adds advice to an error, since only the sizes of the model's files were checked before. */
const notOpened = (model: string, error: unknown): unknown =>
  error instanceof MaskrouteError
    ? new MaskrouteError(
        error.code,
        `${error.message}\nTo check the model's files for damage: maskroute model show ${model} --verify`,
        { cause: error },
      )
    : error;

/** Runs a backend until SIGTERM or SIGINT, then drains it and exits with 0. A second signal ends the process at once. */
export async function serveUntilSignal(options: BackendOptions): Promise<RunningBackend> {
  const backend = await startBackend(options);
  onStopSignal(() => {
    void backend.close().then(() => process.exit(0));
  });
  return backend;
}
