/**
 * The full encoder on the backends: `POST /v1/embeddings` in the OpenAI wire format, through the same pool as
 * completions. It is another process there: one that has stopped says nothing of the completions, nor the reverse.
 */
import { z } from 'zod';
import type { Encoder } from '../../../shared/embedding/encoder.ts';
import { encoderListSchema } from '../../../shared/embeddings.ts';
import { DENSE_MASK_ID } from '../../../shared/mask.ts';
import { sameEncoder } from '../../../shared/mask-set.ts';
import { EMBEDDINGS } from '../../limits.ts';
import type { BackendPool } from '../backends/index.ts';
import { readBounded } from '../bounded.ts';
import { createRemoteEncoder } from './remote.ts';

const answerSchema = z.looseObject({ data: z.array(z.looseObject({ embedding: z.array(z.number()) })) });
const nothing = () => {};

/** @throws Error when no backend has an encoder, or backends have different ones: their vectors would not compare. */
export async function loadBackendEncoder(backends: Pick<BackendPool, 'askAll' | 'call'>): Promise<Encoder> {
  const answers = await backends.askAll('/v1/encoders', EMBEDDINGS.timeout_ms, nothing);
  const entries = answers.flatMap((answer) => encoderListSchema.parse(answer).data);
  const [first] = entries;
  if (first === undefined)
    throw new Error('no backend has an encoder: maskroute model pull all-minilm-l6-v2');
  const other = entries.find((entry) => !sameEncoder(entry.encoder, first.encoder));
  if (other !== undefined) throw new Error('the backends have different encoders');
  const { id: model, encoder: spec } = first;
  return createRemoteEncoder(spec, EMBEDDINGS.batch, async (texts, signal, region) => {
    const { response } = await backends.call({
      path: '/v1/embeddings',
      requestId: `edge_${crypto.randomUUID()}`,
      tenant: '',
      signal: signal ?? new AbortController().signal,
      timeout_ms: EMBEDDINGS.timeout_ms,
      isAside: true,
      ...(region === undefined ? {} : { wish: { region, mask: DENSE_MASK_ID, model: undefined } }),
      hold: nothing,
      body: JSON.stringify({ model, input: texts, encoding_format: 'float' }),
    });
    const text = await readBounded(response.body, EMBEDDINGS.bytesMax);
    if (!response.ok) throw new Error(`the backend answered ${response.status}: ${text.slice(0, 200)}`);
    return answerSchema.parse(JSON.parse(text)).data.map(({ embedding }) => embedding);
  });
}
