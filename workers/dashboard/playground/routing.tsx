/** Why the prompt got its mask: the dry run's answer, in words and as a row of blocks. */
import { type DryRun, dryRunSchema } from '../../../shared/dry-run.ts';
import { failure } from '../api.ts';
import { type FactList, Facts } from '../components/facts.tsx';
import { number, percent } from '../format.ts';
import { chatBody, type Prompt } from './stream.ts';

/** @throws ApiError */
export async function explain(key: string, prompt: Prompt, signal: AbortSignal): Promise<DryRun> {
  const response = await fetch('/v1/route', {
    method: 'POST',
    headers: { authorization: `Bearer ${key}`, 'content-type': 'application/json' },
    body: JSON.stringify(chatBody(prompt, 'masked')),
    signal,
  });
  if (!response.ok) throw await failure(response);
  return dryRunSchema.parse(await response.json());
}

export function Routing({ decision }: { readonly decision: DryRun }) {
  const { maskroute, label, distance, skip, sparsity, encoder, timings_ms: timings } = decision;
  const facts: FactList = [
    ['Mask set', maskroute.mask_set == null ? 'none' : `${maskroute.mask_set} ${maskroute.version ?? ''}`],
    [
      'Cluster',
      maskroute.cluster == null ? 'none' : `${maskroute.cluster}${label === null ? '' : `: ${label}`}`,
    ],
    ['Distance', distance === null ? '–' : number(distance, 3)],
    ['Cosine', maskroute.similarity == null ? '–' : number(maskroute.similarity, 3)],
    ['Blocks out', sparsity === null ? 'unknown at the edge' : percent(sparsity)],
    ['Attention skipped', layersOf(skip?.attention)],
    ['FFN skipped', layersOf(skip?.ffn)],
    ['Encoder', encoder === null ? 'none was needed' : `${encoder.id}, ${encoder.dimensions} dimensions`],
    ['Experiment', `${maskroute.experiment ?? 'none'} / ${maskroute.variant ?? '–'}`],
    ['Region', maskroute.region ?? '–'],
    ['Time', `assign ${timings.assign}, embed ${timings.embed}, route ${timings.route} ms`],
  ];
  return (
    <section aria-label="How the prompt was routed">
      <h2>Routing</h2>
      {maskroute.fallback != null && (
        <p>The request runs dense: {maskroute.fallback.replaceAll('_', ' ')}.</p>
      )}
      <Facts facts={facts} />
    </section>
  );
}

const layersOf = (layers: readonly number[] | undefined): string =>
  layers === undefined ? 'unknown at the edge' : layers.length === 0 ? 'none' : `layers ${layers.join(', ')}`;
