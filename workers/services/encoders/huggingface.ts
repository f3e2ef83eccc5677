/**
 * The full encoder through Hugging Face: the hub's inference providers, or a dedicated endpoint or
 * text-embeddings-inference server when `HF_ENDPOINT_URL` is set.
 */
import { InferenceClient } from '@huggingface/inference';
import type { Encoder } from '../../../shared/embedding/encoder.ts';
import type { Config } from '../../env.ts';
import { createRemoteEncoder } from './remote.ts';

/** What text-embeddings-inference takes in one call by default. */
const BATCH = 32;

type HuggingFaceConfig = Pick<
  Config,
  'HF_TOKEN' | 'HF_MODEL' | 'HF_REVISION' | 'HF_POOLING' | 'HF_DIMENSIONS' | 'HF_ENDPOINT_URL'
>;

export function createHuggingFaceEncoder(config: HuggingFaceConfig): Encoder {
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
    BATCH,
    async (texts, signal) =>
      await client.featureExtraction(
        { ...target, inputs: [...texts] },
        // A refused or slow call goes dense at once: the request in front of it waits.
        { retry_on_error: false, ...(signal === undefined ? {} : { signal }) },
      ),
  );
}
