/**
 * Embeds a request's text, with a time limit, by the encoder that `ENCODER` names. If it fails, the request runs dense;
 * it is never an error.
 */
import { LRUCache } from 'lru-cache';
import { z } from 'zod';
import { type Encoder, normalise } from '../../shared/embedding/encoder.ts';
import { loadStaticEncoder } from '../../shared/embedding/static-encoder.ts';
import { type EncoderSpec, sameEncoder } from '../../shared/mask/mask-set.ts';
import { embeddingsSchema, encoderListSchema } from '../../shared/wire/backend-load.ts';
import { readAnswer } from '../../shared/wire/parse-body.ts';
import type { FallbackReason } from '../../shared/wire/protocol.ts';
import { RETRIES_MAX } from '../backends/call-backend.ts';
import { type BackendPool, noneEnabled } from '../backends/pool.ts';
import { sha256Hex } from '../base/secrets.ts';
import { SwrCache, type SwrPolicy } from '../base/swr-cache.ts';
import { log, reasonOf } from '../base/telemetry.ts';
import { DeadlineError, type Hold, noHold, withDeadline } from '../base/waiting.ts';
import type { Config, Env, TextEmbeddingBinding } from '../env.ts';
import { EMBEDDINGS, VECTORS_MAX } from '../limits.ts';

export type Embedding =
  | { readonly ok: true; readonly vector: Float32Array; readonly spec: EncoderSpec }
  | {
      readonly ok: false;
      /** Null: the client left meanwhile, which is no failure of the encoder. */
      readonly fallback: Extract<FallbackReason, 'encoder_failed' | 'encoder_timeout'> | null;
    };

/** Who asks for an embedding. */
type Asker = {
  /** Where the text comes from, as `regionOf` gives it. */
  readonly region: string;
  readonly signal: AbortSignal;
};

/** An encoder as the edge uses it: for one text at a time, which is neither empty nor longer than `EMBED_CHARS_MAX`. */
export type EdgeEncoder = {
  readonly spec: EncoderSpec;
  /** An L2-normalised vector of `spec.dimensions`. Rejects when the encoder fails or is slow, or `signal` aborts. */
  embed(text: string, asker: Asker): Promise<Float32Array>;
};

export interface Embedder {
  /** The loaded encoder. @throws Error when it can't be loaded; a later call tries again. */
  encoder(hold: Hold): Promise<EdgeEncoder>;
  /**
   * The same, but loaded again if it may have changed. If that fails, it is the one that was loaded before.
   * @throws as `encoder`.
   */
  askAgain(hold: Hold): Promise<EdgeEncoder>;
  embed(text: string, of: Asker & { readonly hold: Hold }): Promise<Embedding>;
}

/** `policy`: how often `load` is asked again. As long as it gives the same encoder, the first one stays, with its cache. */
export function createEmbedder(load: () => Promise<EdgeEncoder>, policy: SwrPolicy): Embedder {
  const cache: SwrCache<EdgeEncoder> = new SwrCache(
    'the encoder',
    async () => {
      const loaded = await load().catch((error) => {
        log('error', 'encoder_load_failed', { reason: reasonOf(error) });
        throw error;
      });
      const held = cache.peek('');
      return held !== undefined && sameEncoder(held.spec, loaded.spec) ? held : loaded;
    },
    policy,
  );
  const encoder = async (hold: Hold) => (await cache.get('', hold))!;
  return {
    encoder,
    async askAgain(hold) {
      if (policy.fresh_ms !== Number.POSITIVE_INFINITY) await cache.refresh('', hold).catch(() => {});
      return await encoder(hold);
    },
    async embed(text, { region, signal, hold }) {
      try {
        const ready = await encoder(hold);
        return { ok: true, vector: await ready.embed(text, { region, signal }), spec: ready.spec };
      } catch (error) {
        if (signal.aborted) return { ok: false, fallback: null };
        log('warn', 'embedding_failed', { reason: reasonOf(error) });
        return { ok: false, fallback: error instanceof DeadlineError ? 'encoder_timeout' : 'encoder_failed' };
      }
    },
  };
}

/* The encoders. One reads an asset of the worker; three call a service over the network. */

/* The static encoder: its table is a worker asset, read once in an isolate; embedding needs no network. */

/** The assets binding uses only the path; the host is arbitrary. */
const TABLE_URL = 'http://assets/encoder/static.bin';

/** @throws Error when the asset is missing, MaskrouteError `invalid_encoder` when it is malformed. */
async function loadStatic(env: Env): Promise<Encoder> {
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
): Promise<EdgeEncoder> {
  const { ENCODER, EMBED_TIMEOUT_MS: timeout_ms } = config;
  switch (ENCODER) {
    case 'static': {
      // It computes in this thread, so a time limit could not stop it.
      const { spec, embed } = await loadStatic(env);
      return { spec, embed: async (text, { signal }) => (await embed([text], signal))[0]! };
    }
    case 'workers-ai':
      if (env.AI === undefined) throw new Error('the binding AI is missing');
      return cached(createWorkersAiEncoder(env.AI, timeout_ms));
    case 'huggingface':
      return cached(await createHuggingFaceEncoder(config, timeout_ms));
    case 'backend':
      return cached(await loadBackendEncoder(backends, timeout_ms));
  }
}

/* Shared by all encoders behind a network: the time limit, and validation of vectors. */

/** A list with the one vector. */
const vectorsSchema = z.tuple([z.array(z.number())]);

/** `call` asks for the text's vector, in a list. An answer in another form is an Error that says so. */
export function createRemoteEncoder(
  spec: EncoderSpec,
  timeout_ms: number,
  call: (text: string, asker: Asker) => Promise<unknown>,
): EdgeEncoder {
  return {
    spec,
    async embed(text, { region, signal }) {
      const late = new AbortController();
      const asked = call(text, { region, signal: AbortSignal.any([signal, late.signal]) });
      const answer = await withDeadline(asked, timeout_ms, 'embedding').finally(() => late.abort());
      const [vector] = vectorsSchema.safeParse(answer).data ?? [];
      if (vector?.length !== spec.dimensions) {
        throw new Error(`${spec.id} did not answer with one vector of ${spec.dimensions} numbers`);
      }
      return normalise(Float32Array.from(vector));
    },
  };
}

/*
 * The full encoder on the backends: `POST /v1/embeddings` in the OpenAI wire format, through the same pool as
 * completions. It runs in its own thread there, so its failures say nothing about completions, nor the reverse.
 */

/**
 * A backend may restart with another encoder. `createEmbedder` asks again for that; until then an answer by another encoder
 * is an error, as its vectors would be near the wrong centroids.
 * @throws Error when no backend is enabled or has an encoder, or backends have different ones: their vectors would not
 * compare.
 */
async function loadBackendEncoder(
  backends: Pick<BackendPool, 'askAll' | 'call'>,
  timeout_ms: number,
): Promise<EdgeEncoder> {
  const given = await backends.askAll('/v1/encoders', EMBEDDINGS.timeout_ms);
  if (given.length === 0) throw noneEnabled();
  const entries = given.flatMap(({ answer }) => encoderListSchema.parse(answer).data);
  const [first] = entries;
  if (first === undefined)
    throw new Error('no backend has an encoder: maskroute model pull all-minilm-l6-v2');
  const other = entries.find((entry) => !sameEncoder(entry.encoder, first.encoder));
  if (other !== undefined) throw new Error('the backends have different encoders');
  const { id: model, encoder: spec } = first;
  return createRemoteEncoder(spec, timeout_ms, async (text, { region, signal }) => {
    const called = await backends.call({
      request: {
        path: '/v1/embeddings',
        requestId: `edge_${crypto.randomUUID()}`,
        tenant: '',
        body: JSON.stringify({ model, input: [text], encoding_format: 'float' }),
      },
      purpose: { kind: 'aside', region },
      time: { timeout_ms: EMBEDDINGS.timeout_ms, isFullTime: false },
      retries: { left: RETRIES_MAX },
      signal,
      hold: noHold,
    });
    if (called.kind === 'error') throw called.error;
    const { response } = called;
    const answer = await readAnswer(response, EMBEDDINGS.bytesMax);
    if (!response.ok) throw new Error(`the backend answered ${response.status}: ${answer.slice(0, 200)}`);
    const { data, maskroute } = embeddingsSchema.parse(JSON.parse(answer));
    if (maskroute !== undefined && !sameEncoder(maskroute.encoder, spec)) {
      throw new Error(`the backend's encoder is not ${spec.id} of revision ${spec.revision} any more`);
    }
    return data.map(({ embedding }) => embedding);
  });
}

/*
 * The full encoder through Hugging Face: the hub's inference providers, or a dedicated endpoint or
 * text-embeddings-inference server when `HF_ENDPOINT_URL` is set.
 */

type HuggingFaceConfig = Pick<
  Config,
  'HF_TOKEN' | 'HF_MODEL' | 'HF_REVISION' | 'HF_POOLING' | 'HF_DIMENSIONS' | 'HF_ENDPOINT_URL'
>;

async function createHuggingFaceEncoder(config: HuggingFaceConfig, timeout_ms: number): Promise<EdgeEncoder> {
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
    timeout_ms,
    async (text, { signal }) =>
      await client.featureExtraction(
        { ...target, inputs: [text] },
        // No retries: the request waits, and runs dense if the call fails.
        { retry_on_error: false, signal },
      ),
  );
}

/*
 * The full encoder through the Workers AI binding. Mean and CLS pooling give incompatible vectors, so the spec names
 * the pooling.
 */

const MODEL = '@cf/baai/bge-small-en-v1.5';
const DIMENSIONS = 384;

const workersAiAnswerSchema = z.looseObject({ data: z.array(z.array(z.number())) });

function createWorkersAiEncoder(ai: TextEmbeddingBinding, timeout_ms: number): EdgeEncoder {
  return createRemoteEncoder(
    // Workers AI does not version its models; only the name can be pinned.
    { id: MODEL, revision: 'workers-ai', pooling: 'cls', dimensions: DIMENSIONS },
    timeout_ms,
    async (text, { signal }) => {
      const answer = await ai.run(MODEL, { text: [text], pooling: 'cls' }, { signal });
      return workersAiAnswerSchema.parse(answer).data;
    },
  );
}

/*
 * A cache of vectors by the text's hash: a conversation's opening comes again with every turn, and a remote encoder
 * should not embed it twice. Bounded, and only in the isolate's memory.
 */

/** Wraps `encoder` with a cache of its vectors. Failures are not cached. */
export function cached(encoder: EdgeEncoder, vectorsMax = VECTORS_MAX): EdgeEncoder {
  const vectors = new LRUCache<string, Float32Array>({ max: vectorsMax });
  return {
    spec: encoder.spec,
    async embed(text, asker) {
      const key = sha256Hex(text);
      const vector = vectors.get(key) ?? (await encoder.embed(text, asker));
      vectors.set(key, vector);
      return vector;
    },
  };
}
