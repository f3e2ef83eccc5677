/** Embedding a request's text in bounded time. A failure is a reason to go dense, never an error. */
import type { Encoder } from '../../shared/embedding/encoder.ts';
import type { EncoderSpec } from '../../shared/mask/mask-set.ts';
import type { FallbackReason } from '../../shared/wire/protocol.ts';
import { log, reasonOf } from '../base/telemetry.ts';
import { DeadlineError, type Hold, withDeadline } from '../base/waiting.ts';
import { ENCODER_LOAD_TIMEOUT_ms } from '../limits.ts';

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

/** `timeout_ms` bounds embedding; loading, once an isolate, has a bound of its own. */
export function createEmbedder(load: () => Promise<Encoder>, timeout_ms: number): Embedder {
  let loaded: Encoder | undefined;
  let loading: { readonly startedAt_ms: number; readonly result: Promise<Encoder> } | undefined;

  const encoder = async (hold: Hold): Promise<Encoder> => {
    if (loaded !== undefined) return loaded;
    // A load past its time belonged to a request that was torn down: it will never settle.
    if (loading === undefined || Date.now() - loading.startedAt_ms > 2 * ENCODER_LOAD_TIMEOUT_ms) {
      const started = { startedAt_ms: Date.now(), result: load() };
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
