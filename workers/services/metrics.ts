/**
 * One data point a request for Analytics Engine, which samples and keeps them for dashboards outside of this one.
 * The platform takes it without a wait and may drop some; nothing here is counted from it.
 */
import type { RequestEvent } from '../../shared/events.ts';

/** Columns are known by their place alone, so places are only ever added. */
export const dataPoint = (event: RequestEvent, backend = ''): AnalyticsEngineDataPoint => ({
  indexes: [event.tenant],
  blobs: [
    ...[event.model, event.version ?? '', event.mask, event.experiment, event.variant],
    ...[event.region, event.fallback ?? '', event.error_code ?? '', event.endpoint, backend],
    event.experiment_owner,
  ],
  doubles: [
    ...[event.status, event.prompt_tokens, event.completion_tokens],
    ...[event.ttft_ms ?? -1, event.tpot_ms ?? -1, event.total_ms],
    ...[event.sparsity ?? -1, event.cluster ?? -1, event.similarity ?? -2],
  ],
});
