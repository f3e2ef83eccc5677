/** The full encoder through the Workers AI binding. Mean and CLS pooling give incompatible vectors: it is named. */
import { z } from 'zod';
import type { Encoder } from '../../../shared/embedding/encoder.ts';
import type { TextEmbeddingBinding } from '../../env.ts';
import { createRemoteEncoder } from './remote.ts';

const MODEL = '@cf/baai/bge-small-en-v1.5';
const DIMENSIONS = 384;
/** Texts that the model takes in one call. */
const BATCH = 100;

const answerSchema = z.looseObject({ data: z.array(z.array(z.number())) });

export function createWorkersAiEncoder(ai: TextEmbeddingBinding): Encoder {
  return createRemoteEncoder(
    // Workers AI does not version the model; its name is all that can be pinned.
    { id: MODEL, revision: 'workers-ai', pooling: 'cls', dimensions: DIMENSIONS },
    BATCH,
    async (texts, signal) =>
      answerSchema.parse(await ai.run(MODEL, { text: texts, pooling: 'cls' }, signal && { signal })).data,
  );
}
