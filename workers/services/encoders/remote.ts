/**
 * What every encoder behind a network has in common: batches, texts that are empty, vectors that must be
 * checked before they are trusted, and a caller who may hang up.
 */
import { z } from 'zod';
import type { Encoder } from '../../../shared/embedding/encoder.ts';
import { EMBED_CHARS_MAX } from '../../../shared/embedding/encoder.ts';
import { normalise } from '../../../shared/embedding/pool.ts';
import type { EncoderSpec } from '../../../shared/mask-set.ts';

const vectorsSchema = z.array(z.array(z.number()));

export type RemoteCall = (
  texts: readonly string[],
  signal: AbortSignal | undefined,
  region: string | undefined,
) => Promise<unknown>;

/**
 * `call` asks the provider for one vector a text, at most `batch` texts at a time.
 * `embed` rejects with an Error that says what the provider got wrong.
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

/** Rejects as soon as `signal` aborts, for providers whose client does not. */
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
