/** What makes spans, at the edge and at a backend. Only a part that traces loads it. */
import type { Tracer } from '@opentelemetry/api';
import { type Resource, resourceFromAttributes } from '@opentelemetry/resources';
import {
  ParentBasedSampler,
  type SpanProcessor,
  TraceIdRatioBasedSampler,
  TracerProvider,
} from '@opentelemetry/sdk-trace';

/**
 * @param more other attributes of the part; they win.
 * @param share of the requests that come without a trace. Whoever brings one has decided.
 */
export function createTracer(
  service: string,
  more: Resource | undefined,
  share: number,
  spanProcessor: SpanProcessor,
): { readonly tracer: Tracer; readonly provider: TracerProvider } {
  const own = resourceFromAttributes({ 'service.name': service, 'service.namespace': 'maskroute' });
  const provider = new TracerProvider({
    resource: more === undefined ? own : own.merge(more),
    sampler: new ParentBasedSampler({ root: new TraceIdRatioBasedSampler(share) }),
    spanProcessors: [spanProcessor],
    // A client's words are in some: the longest name of a model has 300 characters.
    spanLimits: { attributeValueLengthLimit: 300 },
  });
  return { tracer: provider.getTracer('maskroute'), provider };
}
