/**
 * The backend, wired: an installed model, its engine, and the HTTP API over it. No other file knows all three.
 *
 * The engine computes on the processor, or on a GPU through ONNX Runtime's WebGPU provider (`onnx/device.ts`
 * chooses); encoders compute on the processor.
 */
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import { setFlagsFromString } from 'node:v8';
import type { Logger } from 'pino';
import { pino } from 'pino';
import type { ModelHash, SurrogatesId } from '../shared/mask/mask.ts';
import type { Collector } from '../shared/tracing/traces.ts';
import { MaskrouteError } from '../shared/wire/errors.ts';
import { type ApiLimits, type ApiOptions, DEFAULT_LIMITS, type ServedModel } from './api/parts.ts';
import { type RunningServer, startServer } from './api/server.ts';
import { within } from './api/sse.ts';
import type { Tracing } from './api/trace-export.ts';
import { createEncoderService } from './encoder/encoder-service.ts';
import type { Engine } from './engine/engine.ts';
import { createMaskRegistry } from './engine/mask-registry.ts';
import { createEngine } from './engine/start-engine.ts';
import { createGrammars, type Grammars } from './grammar/grammars.ts';
import { type Jobs, openJobs } from './jobs/job-queue.ts';
import { openSchedules, type Schedules } from './jobs/schedules.ts';
import type { KvType } from './model/model-source.ts';
import { openInstalled } from './model/store.ts';
import { openTextService, type TextService } from './model/tokenizer/text-service.ts';
import { chooseDevice, type DeviceChoice, deviceName } from './onnx/device.ts';
import type { FloatType } from './onnx/graph.ts';
import { onStopSignal } from './stop-signals.ts';

/** As an audience: the edge calls the address that the backend listens at. */
export const OWN_ADDRESS = Symbol('own address');

export type BackendOptions = {
  /** `MASKROUTE_HOME`: models and kept masks. */
  readonly home: string;
  /** An installed model's name. */
  readonly model: string;
  /** 0 picks a free one. */
  readonly port: number;
  /** Only this machine by default; `0.0.0.0` for every network that it is in. */
  readonly host?: string;
  readonly backendKey: string;
  /** Taken besides the backend key while that is rotated; nothing is signed or sealed with it. */
  readonly otherBackendKey?: string;
  /** The address by which the edge calls this backend; tokens for another one are refused then. */
  readonly audience?: string | typeof OWN_ADDRESS;
  /** For whoever collects `/metrics`, and for nothing else; without it only the backend key reads them. */
  readonly metricsKey?: string;
  /** The entry that runs a command of the command line as a job; without it there are no jobs. */
  readonly jobEntry?: string;
  /** Whose files jobs may name as their data. */
  readonly jobDataFolder?: string;
  /** Where unknown masks are fetched; without it, where the caller's token says. */
  readonly edgeUrl?: string;
  /** JSON lines on standard output by default. No prompts, no keys. */
  readonly log?: Logger;
  /** All cores by default. One is slower, but far faster than several on a machine that is busy otherwise. */
  readonly threads?: number;
  /** What computes answers; the processor by default. */
  readonly device?: DeviceChoice | undefined;
  /** What a GPU computes in; fp16 by default, where it can. */
  readonly floatType?: FloatType | undefined;
  /** How keys and values are kept; fp32 by default, and on a GPU as it computes. */
  readonly kvType?: KvType | undefined;
  /** Room for keys and values of requests that run, in tokens; 8 times the model's context by default. */
  readonly cacheTokens?: number;
  /** Room for prompts that later ones may begin with, in tokens; 0: none is kept. */
  readonly prefixTokens?: number;
  /** Where spans of answers go; without it there are none. */
  readonly collector?: Collector | undefined;
  readonly limits?: Partial<ApiLimits>;
};

export type RunningBackend = {
  readonly url: string;
  /** Running answers finish, within bounds; what they cost can still be asked. */
  drain(): Promise<void>;
  /** Drains; then the port and the engine close. Safe to call twice. */
  close(): Promise<void>;
};

/**
 * Resolves once requests are answered. Rejects with MaskrouteError `model_not_found`, `corrupt_model`,
 * `engine_failed`, or `start_failed` for a missing key or a port that cannot be had.
 */
export async function startBackend(options: BackendOptions): Promise<RunningBackend> {
  const log = options.log ?? openLog();
  if (options.backendKey.trim() === '') {
    const message = 'The backend does not start without a key: set MASKROUTE_BACKEND_KEY.';
    throw new MaskrouteError('start_failed', message);
  }
  const { threads = availableParallelism() } = options;
  const { engine, text, grammars, model } = await withSmallHeap(() => openModel(options, threads, log));
  if (options.audience === undefined)
    log.warn('tokens for any backend are taken here: MASKROUTE_BACKEND_URL says which are for this one');
  const encoders = createEncoderService({
    home: options.home,
    // One: the cores are the engine's, and a prompt is embedded in some milliseconds anyway.
    threads: 1,
    onError: (detail) => log.error({ detail }, 'the encoder failed'),
  });
  const tracing = options.collector && (await openTracing(options.collector, log));
  let jobs: Jobs | undefined;
  let schedules: Schedules | undefined;
  const closeParts = async () => {
    await schedules?.close();
    await Promise.all([encoders.close(), text.close(), grammars.close(), jobs?.close(), tracing?.close()]);
    await within(engine.close(), ENGINE_CLOSE_ms);
  };
  try {
    jobs = await jobsOf(options, model.name, log);
    schedules = jobs && (await openSchedules(jobSettings(options, model.name, log), jobs));
    const server = await serve(options, { model, encoders, jobs, schedules, tracer: tracing?.tracer, log });
    const device = deviceName(engine.model.device);
    log.info({ url: server.url, model: model.name, device, threads }, 'ready');
    let closing: Promise<void> | undefined;
    const close = async () => {
      log.info('stopping');
      // Before the drain: whoever runs services signals their children, too. A job that is stopped here goes on with the next start;
      // a job that ends by that signal counts as failed.
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
 * JSON lines on standard output. They are written from another thread: a disk that is slow for a moment stops no answer. What is left
 * goes out at the exit. A full disk costs lines.
 */
export function openLog(): Logger {
  const out = pino.destination({ sync: false, maxLength: LOG_BUFFER_BYTES_MAX });
  out.on('error', () => {
    // At the exit it would try for ever.
    out.flushSync = () => {};
  });
  return pino(out);
}

/** Loaded where it is wanted: it takes some megabytes. */
async function openTracing(collector: Collector, log: Logger): Promise<Tracing> {
  const { openTracing } = await import('./api/trace-export.ts');
  return openTracing(collector, log);
}

/** How long the engine may take to end once no answer runs; past that the process ends without it. */
const ENGINE_CLOSE_ms = 3000;

async function serve(
  options: BackendOptions,
  parts: Pick<ApiOptions, 'model' | 'encoders' | 'jobs' | 'schedules' | 'tracer' | 'log'>,
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
  ).catch((cause: Error) => {
    throw new MaskrouteError('start_failed', `The backend cannot listen: ${cause.message}.`, { cause });
  });
  own.resolve(server.url);
  return server;
}

async function jobsOf(options: BackendOptions, model: string, log: Logger): Promise<Jobs | undefined> {
  const { home, jobEntry: entry, jobDataFolder: dataFolder } = options;
  if (entry === undefined) return undefined;
  try {
    const jobs = await openJobs({ ...jobSettings(options, model, log), entry, dataFolder });
    if (jobs === undefined)
      log.warn({ home }, 'another backend with this MASKROUTE_HOME runs its jobs, so this one runs none');
    return jobs;
  } catch (error) {
    // It answers requests all the same.
    if (!(error instanceof MaskrouteError)) throw error;
    log.warn({ reason: error.message }, 'this backend runs no jobs');
    return undefined;
  }
}

const jobSettings = ({ home, backendKey, otherBackendKey }: BackendOptions, model: string, log: Logger) => ({
  ...{ home, model, backendKey, otherBackendKey },
  note: (message: string, detail: Record<string, unknown>) => log.info(detail, message),
});

/**
 * V8 would let the garbage of opening a model stand (20 MB), though none like it comes again. While requests are answered the
 * heap may grow: a small one is collected ten times a second, and each time every answer waits.
 */
async function withSmallHeap<Opened>(open: () => Promise<Opened>): Promise<Opened> {
  setFlagsFromString('--optimize-for-size');
  try {
    return await open();
  } finally {
    setFlagsFromString('--no-optimize-for-size');
  }
}

async function openModel(
  options: BackendOptions,
  threads: number,
  log: Logger,
): Promise<{ engine: Engine; text: TextService; grammars: Grammars; model: ServedModel }> {
  const { home, device: choice = 'cpu', floatType, kvType, cacheTokens, prefixTokens } = options;
  const { folder, manifest } = await openInstalled(home, options.model);
  const { device, reason } = await chooseDevice({ choice, floatType });
  if (reason !== undefined) log.warn({ reason }, 'the processor computes');
  const text = await openTextService({
    folder,
    manifest,
    onError: (detail) => log.error({ detail }, 'text could not be read'),
  }).catch((error) => {
    throw notOpened(manifest.name, error);
  });
  const engine = await createEngine({
    modelDir: folder,
    hash: manifest.hash as ModelHash,
    config: manifest.config,
    ...{ device, kvType, threads },
    ...(manifest.surrogates && { surrogates: manifest.surrogates.id as SurrogatesId }),
    limits: {
      ...(cacheTokens === undefined ? {} : { cacheTokensMax: cacheTokens }),
      ...(prefixTokens === undefined ? {} : { prefixTokensMax: prefixTokens }),
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
      // Of a model that ends nothing by itself the last token has to stand for the end.
      endTokenId: endTokenIds[0] ?? manifest.config.vocabularySize - 1,
    },
    onError: (detail) => log.error({ detail }, 'a grammar failed'),
  });
  return {
    engine,
    text,
    grammars,
    model: { name: manifest.name, created_s, engine, text, grammars, endTokenIds },
  };
}

/** Files may have changed and kept their sizes, which is all that was checked. */
const notOpened = (model: string, error: unknown): unknown =>
  error instanceof MaskrouteError
    ? new MaskrouteError(
        error.code,
        `${error.message}\nIf files of the model are damaged, this says so: maskroute model show ${model} --verify`,
        { cause: error },
      )
    : error;

/** `startBackend` until SIGTERM or SIGINT; then it drains and the process exits with 0. A second signal ends it. */
export async function serveUntilSignal(options: BackendOptions): Promise<RunningBackend> {
  const backend = await startBackend(options);
  onStopSignal(() => {
    void backend.close().then(() => process.exit(0));
  });
  return backend;
}
