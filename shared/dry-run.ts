/** The answer of `POST /v1/route`: the whole routing decision and its timings, nothing generated. */
import { z } from 'zod';
import { encoderSpecSchema } from './mask-set.ts';
import { maskFieldSchema } from './openai.ts';
import { routeEchoSchema } from './protocol.ts';

export const dryRunSchema = z.object({
  object: z.literal('maskroute.route'),
  request_id: z.string(),
  model: z.string(),
  /** What the backend would be told. */
  mask: maskFieldSchema,
  /** Null when only the backend can know it: a mask that the client chose and the edge does not hold. */
  sparsity: z.number().nullable(),
  /** Layers left out; null when the edge does not hold the mask. */
  skip: z.object({ attention: z.array(z.int()), ffn: z.array(z.int()) }).nullable(),
  /** The cluster's words for people. */
  label: z.string().nullable(),
  /** Euclidean distance to the centroid. */
  distance: z.number().nullable(),
  maskroute: routeEchoSchema,
  /** What embedded the text; null when nothing was embedded. */
  encoder: encoderSpecSchema.nullable(),
  timings_ms: z.object({ assign: z.number(), embed: z.number(), route: z.number() }),
});
export type DryRun = z.infer<typeof dryRunSchema>;
