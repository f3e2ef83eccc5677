/**
 * Embeds a request's text, with a time limit, by the encoder that `ENCODER` names. If it fails, the request runs dense;
 * it is never an error.
 */
import { LRUCache } from 'lru-cache';
import { z } from 'zod';
import { EMBED_CHARS_MAX, type Encoder, normalise } from '../../shared/embedding/encoder.ts';
import { loadStaticEncoder } from '../../shared/embedding/static-encoder.ts';
import { type EncoderSpec, sameEncoder } from '../../shared/mask/mask-set.ts';
import { encoderListSchema } from '../../shared/wire/backend-load.ts';
import { readAnswer } from '../../shared/wire/parse-body.ts';
import type { FallbackReason } from '../../shared/wire/protocol.ts';
import { RETRIES_MAX } from '../backends/call-backend.ts';
import type { BackendPool } from '../backends/pool.ts';
import { sha256Hex } from '../base/secrets.ts';
import { log, reasonOf } from '../base/telemetry.ts';
import { DeadlineError, type Hold, steadyNow_ms, withDeadline } from '../base/waiting.ts';
import type { Config, Env, TextEmbeddingBinding } from '../env.ts';
import { EMBEDDINGS, ENCODER_LOAD_TIMEOUT_ms, VECTORS_MAX } from '../limits.ts';

export type Embedding =
  | { readonly ok: true; readonly vector: Float32Array; readonly spec: EncoderSpec }
  | { readonly ok: false; readonly fallback: Extract<FallbackReason, 'encoder_failed' | 'encoder_timeout'> };

type EmbedRequest = {
  /** Where the text comes from, as `regionOf` gives it. */
  readonly region: string;
  readonly signal: AbortSignal;
  readonly hold: Hold;
};

export interface Embedder {
  /** The loaded encoder. @throws Error when it can't be loaded; a later call tries again. */
  encoder(hold: Hold): Promise<Encoder>;
  embed(text: string, of: EmbedRequest): Promise<Embedding>;
}

/** `timeout_ms` limits embedding; loading, once in an isolate, has its own limit. */
export function createEmbedder(load: () => Promise<Encoder>, timeout_ms: number): Embedder {
  let loaded: Encoder | undefined;
  let loading: { readonly startedAt_ms: number; readonly result: Promise<Encoder> } | undefined;

  const encoder = async (hold: Hold): Promise<Encoder> => {
    if (loaded !== undefined) return loaded;
    // A load that is too old belonged to a request that was torn down, and will never settle.
    if (loading === undefined || steadyNow_ms() - loading.startedAt_ms > 2 * ENCODER_LOAD_TIMEOUT_ms) {
      const started = { startedAt_ms: steadyNow_ms(), result: load() };
      loading = started;
      const settled = started.result
        .then((ready) => {
          loaded = ready;
        })
        .catch((error) => log('error', 'encoder_load_failed', { reason: reasonOf(error) }))
        // A rejected load is dropped, so that the next request tries again.
        .finally(() => {
          if (loading === started) loading = undefined;
        });
      hold(settled);
    }
    return await withDeadline(loading.result, ENCODER_LOAD_TIMEOUT_ms, 'loading the encoder');
  };

  return {
    encoder,
    async embed(text, { region, signal, hold }) {
      try {
        const ready = await encoder(hold);
        const [vector] = await (ready.isLocal === true
          ? ready.embed([text], signal)
          : embedInTime(ready, text, { region, signal }, timeout_ms));
        return { ok: true, vector: vector!, spec: ready.spec };
      } catch (error) {
        log('warn', 'embedding_failed', { reason: reasonOf(error) });
        return { ok: false, fallback: error instanceof DeadlineError ? 'encoder_timeout' : 'encoder_failed' };
      }
    },
  };
}

async function embedInTime(
  encoder: Encoder,
  text: string,
  { region, signal }: Pick<EmbedRequest, 'region' | 'signal'>,
  timeout_ms: number,
): Promise<Float32Array[]> {
  const timeout = new AbortController();
  const both = AbortSignal.any([signal, timeout.signal]);
  const work = withDeadline(encoder.embed([text], both, region), timeout_ms, 'embedding');
  return await work.finally(() => timeout.abort());
}

/* The encoders. One reads an asset of the worker; three call a service over the network. */

/* The static encoder: its table is a worker asset, read once in an isolate; embedding needs no network. */

/** The assets binding uses only the path; the host is arbitrary. */
const TABLE_URL = 'http://assets/encoder/static.bin';

/** @throws Error when the asset is missing, MaskrouteError `invalid_encoder` when it is malformed. */
export async function loadStatic(env: Env): Promise<Encoder> {
  if (env.ASSETS === undefined) throw new Error('the binding ASSETS is missing');
  const response = await env.ASSETS.fetch(TABLE_URL);
  if (!response.ok) throw new Error(`the asset encoder/static.bin answered ${response.status}`);
  return loadStaticEncoder(await response.arrayBuffer());
}

/** @throws Error when a binding or an asset that the encoder needs is missing. */
export async function loadEncoder(
  config: Config,
  env: Env,
  backends: Pick<BackendPool, 'askAll' | 'call'>,
): Promise<Encoder> {
  switch (config.ENCODER) {
    case 'static':
      return await loadStatic(env);
    case 'workers-ai':
      if (env.AI === undefined) throw new Error('the binding AI is missing');
      return cached(createWorkersAiEncoder(env.AI));
    case 'huggingface':
      return cached(await createHuggingFaceEncoder(config));
    case 'backend':
      return cached(await loadBackendEncoder(backends));
  }
}

/* Shared by all encoders behind a network: batches, empty texts, validation of vectors, and cancellation. */

const vectorsSchema = z.array(z.array(z.number()));

type RemoteCall = (
  texts: readonly string[],
  signal: AbortSignal | undefined,
  region: string | undefined,
) => Promise<unknown>;

/**
 * `call` requests one vector for each text, at most `batch` texts at a time. `embed` rejects with an Error that says
 * what was wrong with the provider's answer.
 */
export function createRemoteEncoder(spec: EncoderSpec, batch: number, call: RemoteCall): Encoder {
  const embedBatch = async (
    texts: readonly string[],
    signal: AbortSignal | undefined,
    region: string | undefined,
  ) => {
    const parsed = vectorsSchema.safeParse(await abortable(call(texts, signal, region), signal));
    if (!parsed.success) throw new Error(`${spec.id} did not answer with one vector a text`);
    if (parsed.data.length !== texts.length) {
      throw new Error(`${spec.id} answered ${parsed.data.length} vectors for ${texts.length} texts`);
    }
    return parsed.data.map((vector) => {
      if (vector.length !== spec.dimensions) {
        throw new Error(`${spec.id} answered ${vector.length} dimensions, not ${spec.dimensions}`);
      }
      return normalise(Float32Array.from(vector));
    });
  };
  return {
    spec,
    async embed(texts, signal, region) {
      signal?.throwIfAborted();
      const vectors: Float32Array[] = texts.map(() => new Float32Array(spec.dimensions));
      const filled = texts.flatMap((text, index) => (text.trim() === '' ? [] : [index]));
      for (let start = 0; start < filled.length; start += batch) {
        const indices = filled.slice(start, start + batch);
        const answered = await embedBatch(
          indices.map((index) => texts[index]!.slice(0, EMBED_CHARS_MAX)),
          signal,
          region,
        );
        indices.forEach((index, i) => {
          vectors[index] = answered[i]!;
        });
      }
      return vectors;
    },
  };
}

/** Rejects as soon as `signal` aborts, for clients that do not support cancellation. */
async function abortable<T>(work: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  if (signal === undefined) return await work;
  let abort: (() => void) | undefined;
  const aborted = new Promise<never>((_resolve, reject) => {
    abort = () => reject(signal.reason);
    signal.addEventListener('abort', abort, { once: true });
  });
  try {
    return await Promise.race([work, aborted]);
  } finally {
    signal.removeEventListener('abort', abort!);
  }
}

/*
 * The full encoder on the backends: `POST /v1/embeddings` in the OpenAI wire format, through the same pool as
 * completions. It runs in its own thread there, so its failures say nothing about completions, nor the reverse.
 */

const answerSchema = z.looseObject({ data: z.array(z.looseObject({ embedding: z.array(z.number()) })) });
const nothing = () => {};

/** @throws Error when no backend has an encoder, or backends have different ones: their vectors would not compare. */
async function loadBackendEncoder(backends: Pick<BackendPool, 'askAll' | 'call'>): Promise<Encoder> {
  const answers = await backends.askAll('/v1/encoders', EMBEDDINGS.timeout_ms, nothing);
  const entries = answers.flatMap((answer) => encoderListSchema.parse(answer).data);
  const [first] = entries;
  if (first === undefined)
    throw new Error('no backend has an encoder: maskroute model pull all-minilm-l6-v2');
  const other = entries.find((entry) => !sameEncoder(entry.encoder, first.encoder));
  if (other !== undefined) throw new Error('the backends have different encoders');
  const { id: model, encoder: spec } = first;
  return createRemoteEncoder(spec, EMBEDDINGS.batch, async (texts, signal, region) => {
    const called = await backends.call({
      request: {
        path: '/v1/embeddings',
        requestId: `edge_${crypto.randomUUID()}`,
        tenant: '',
        body: JSON.stringify({ model, input: texts, encoding_format: 'float' }),
      },
      purpose: { kind: 'aside', region },
      time: { timeout_ms: EMBEDDINGS.timeout_ms, isFullTime: false },
      retries: { left: RETRIES_MAX },
      signal: signal ?? new AbortController().signal,
      hold: nothing,
    });
    if (called.kind === 'error') throw called.error;
    const { response } = called;
    const text = await readAnswer(response, EMBEDDINGS.bytesMax);
    if (!response.ok) throw new Error(`the backend answered ${response.status}: ${text.slice(0, 200)}`);
    return answerSchema.parse(JSON.parse(text)).data.map(({ embedding }) => embedding);
  });
}

/*
 * The full encoder through Hugging Face: the hub's inference providers, or a dedicated endpoint or
 * text-embeddings-inference server when `HF_ENDPOINT_URL` is set.
 */

/** Default batch limit of text-embeddings-inference. */
const BATCH = 32;

type HuggingFaceConfig = Pick<
  Config,
  'HF_TOKEN' | 'HF_MODEL' | 'HF_REVISION' | 'HF_POOLING' | 'HF_DIMENSIONS' | 'HF_ENDPOINT_URL'
>;

async function createHuggingFaceEncoder(config: HuggingFaceConfig): Promise<Encoder> {
  // Its client is large; loading it lazily keeps the start of other isolates fast.
  const { InferenceClient } = await import('@huggingface/inference');
  const client = new InferenceClient(config.HF_TOKEN);
  const target =
    config.HF_ENDPOINT_URL === undefined
      ? ({ model: config.HF_MODEL, provider: 'hf-inference' } as const)
      : ({ endpointUrl: config.HF_ENDPOINT_URL } as const);
  return createRemoteEncoder(
    {
      id: config.HF_MODEL,
      revision: config.HF_REVISION,
      pooling: config.HF_POOLING,
      dimensions: config.HF_DIMENSIONS,
    },
    BATCH,
    async (texts, signal) =>
      await client.featureExtraction(
        { ...target, inputs: [...texts] },
        // No retries: the request waits, and runs dense if the call fails.
        { retry_on_error: false, ...(signal === undefined ? {} : { signal }) },
      ),
  );
}

/*
 * The full encoder through the Workers AI binding. Mean and CLS pooling give incompatible vectors, so the spec names
 * the pooling.
 */

const MODEL = '@cf/baai/bge-small-en-v1.5';
const DIMENSIONS = 384;
/** Most texts of one call. */
const WORKERS_AI_BATCH = 100;

const workersAiAnswerSchema = z.looseObject({ data: z.array(z.array(z.number())) });

function createWorkersAiEncoder(ai: TextEmbeddingBinding): Encoder {
  return createRemoteEncoder(
    // Workers AI does not version its models; only the name can be pinned.
    { id: MODEL, revision: 'workers-ai', pooling: 'cls', dimensions: DIMENSIONS },
    WORKERS_AI_BATCH,
    async (texts, signal) =>
      workersAiAnswerSchema.parse(await ai.run(MODEL, { text: texts, pooling: 'cls' }, signal && { signal }))
        .data,
  );
}

/*
 * A cache of vectors by the text's hash: a conversation's opening comes again with every turn, and a remote encoder
 * should not embed it twice. Bounded, and only in the isolate's memory.
 */

/** Wraps `encoder` with a cache of its vectors. Failures are not cached. */
export function cached(encoder: Encoder, vectorsMax = VECTORS_MAX): Encoder {
  const vectors = new LRUCache<string, Float32Array>({ max: vectorsMax });
  return {
    spec: encoder.spec,
    async embed(texts, signal, region) {
      signal?.throwIfAborted();
      const keys = texts.map((text) => sha256Hex(text.slice(0, EMBED_CHARS_MAX)));
      const found = keys.map((key) => vectors.get(key));
      const missing = [...new Map(keys.map((key, index) => [key, index])).values()].filter(
        (index) => found[index] === undefined,
      );
      const made =
        missing.length === 0
          ? []
          : await encoder.embed(
              missing.map((i) => texts[i]!),
              signal,
              region,
            );
      const fresh = new Map(missing.map((index, i) => [keys[index]!, made[i]!]));
      for (const [key, vector] of fresh) vectors.set(key, vector);
      // Returns copies, so that a caller cannot change the cached vectors.
      return keys.map((key, index) => (found[index] ?? fresh.get(key))!.slice());
    },
  };
}
