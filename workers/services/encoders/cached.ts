/**
 * Vectors of texts that were embedded before, by the hash of what is embedded: a conversation's first message comes
 * again with every turn, and a remote encoder is not asked for it twice. Bounded, and gone with the isolate.
 */
import { LRUCache } from 'lru-cache';
import { EMBED_CHARS_MAX, type Encoder } from '../../../shared/embedding/encoder.ts';
import { VECTORS_MAX } from '../../limits.ts';
import { sha256Hex } from '../secrets.ts';

/** The same vectors as `encoder`'s. What fails is not kept. */
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
      // Copies: a caller that changes its vector must not change the next one's.
      return keys.map((key, index) => (found[index] ?? fresh.get(key))!.slice());
    },
  };
}
