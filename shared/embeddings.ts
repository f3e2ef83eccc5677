/** Embeddings on the wire: OpenAI's format, and which encoders a backend has (`GET /v1/encoders`). */
import { z } from 'zod';
import { encoderSpecSchema } from './mask-set.ts';

/** As OpenAI bounds it. */
export const EMBEDDING_INPUTS_MAX = 2048;

const text = z.string();
export const embeddingsRequestSchema = z.looseObject({
  model: z.string().min(1).max(300),
  input: z.union([text, z.array(text).min(1).max(EMBEDDING_INPUTS_MAX)]),
  encoding_format: z.enum(['float', 'base64']).nullish(),
  /** Only the encoder's own number: its vectors are not made to be cut. */
  dimensions: z.int().min(1).nullish(),
  user: z.string().max(512).nullish(),
});

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
