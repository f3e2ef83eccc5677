/**
 * What an edge keeps of an evaluation: of the `evaluation.json` that `maskroute evaluate` writes, the figures that the
 * dashboard draws. The whole file may be sent; what is not named here is dropped.
 */
import { z } from 'zod';
import { version } from './admin.ts';

export const EVALUATED_ROWS_MAX = 500;

const share = z.number().min(0).max(1);

/** One method at one sparsity, measured on text that it was not made on. */
export const evaluatedRowSchema = z.object({
  /** `dense`, `learned`, `one-mask`, or a static method. */
  method: z.string().min(1).max(64),
  /** Whether as many blocks are out as in the learned set, or so many that a token takes as long. */
  matched: z.enum(['count', 'time']),
  /** The set that the masks are of, or that the time is matched with; null for what is of none. */
  maskSet: version.nullable(),
  /** Of blocks. */
  sparsity: share,
  surrogate: z.boolean(),
  /** To dense, nats. */
  kl: z.number(),
  /** Share of positions with the dense model's top token. */
  agreement: share,
  perplexity: z.number().positive(),
  msPerToken: z.number().positive(),
});
export type EvaluatedRow = z.infer<typeof evaluatedRowSchema>;

export const evaluationFiguresSchema = z.object({
  rows: z.array(evaluatedRowSchema).min(1).max(EVALUATED_ROWS_MAX),
  /** Static methods at the learned sets' measured time. */
  equalTime: z.array(evaluatedRowSchema).max(EVALUATED_ROWS_MAX).default([]),
});
export type EvaluationFigures = z.infer<typeof evaluationFiguresSchema>;
