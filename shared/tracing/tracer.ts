/** The tracer of the edge and of backends; loaded only where tracing is on. */
import type { Tracer } from '@opentelemetry/api';
import { type Resource, resourceFromAttributes } from '@opentelemetry/resources';
import {
  ParentBasedSampler,
  type SpanProcessor,
  TraceIdRatioBasedSampler,
  TracerProvider,
} from '@opentelemetry/sdk-trace';

/**
 * @param more other resource attributes; they take precedence.
 * @param share sampling ratio of requests without a `traceparent`; others follow its sampling decision.
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
    // Some attributes come from clients: the longest name of a model has 300 characters.
    spanLimits: { attributeValueLengthLimit: 300 },
  });
  return { tracer: provider.getTracer('maskroute'), provider };
}
