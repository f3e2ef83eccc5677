/** Embeddings on the wire: OpenAI's format, and which encoders a backend has (`GET /v1/encoders`). */
import { z } from 'zod';
import { checkedObject, type FieldTable, honoured, ignored, refused } from './fields.ts';
import { encoderSpecSchema } from './mask-set.ts';

/** As OpenAI bounds it. */
export const EMBEDDING_INPUTS_MAX = 2048;

const text = z.string();
/** OpenAI's fields and vLLM's, as `openai.ts` has those of completions. */
export const EMBEDDING_FIELDS = {
  model: honoured(z.string().min(1).max(300)),
  input: honoured(
    z.union(
      [text, z.array(text).min(1).max(EMBEDDING_INPUTS_MAX)],
      `expected a text, or a list of at most ${EMBEDDING_INPUTS_MAX}`,
    ),
  ),
  encoding_format: honoured(z.enum(['float', 'base64']).nullish()),
  /** Only the encoder's own number: its vectors are not made to be cut. */
  dimensions: honoured(z.int().min(1).nullish()),
  user: ignored(),
  truncate_prompt_tokens: refused('texts are cut where the encoder ends, and nowhere else', -1),
  add_special_tokens: refused('a text gets the special tokens that the encoder wants', true),
  embed_dtype: refused('vectors are 32-bit floats', 'float32'),
  normalize: refused('vectors have the length 1', true),
  priority: ignored(0),
  request_id: ignored(),
} as const satisfies FieldTable;
export const embeddingsRequest = checkedObject(EMBEDDING_FIELDS);

export const encoderEntrySchema = z.looseObject({
  id: z.string().min(1).max(300),
  object: z.literal('maskroute.encoder'),
  encoder: encoderSpecSchema,
});
export type EncoderEntry = z.infer<typeof encoderEntrySchema>;
export const encoderListSchema = z.looseObject({
  object: z.literal('list'),
  data: z.array(encoderEntrySchema).max(16),
});
