/**
 * Prometheus figures. Names follow OpenTelemetry's GenAI conventions (`gen_ai.server.*`, in Prometheus
 * spelling) and vLLM's for the engine's gauges.
 */
import { Counter, collectDefaultMetrics, Gauge, Histogram, Registry } from 'prom-client';
import type { Engine, Timings } from '../engine/engine.ts';

export type FinishedAnswer = {
  readonly endpoint: string;
  readonly mask: string;
  readonly promptTokens: number;
  readonly completionTokens: number;
  readonly cachedTokens: number;
  /** Undefined when no event came. */
  readonly first_ms: number | undefined;
  readonly total_ms: number;
  /** Of its choices that the engine finished. */
  readonly timings: readonly Timings[];
};

export type Metrics = {
  readonly registry: Registry;
  /** `code`: `ok`, or the error's. */
  request(endpoint: string, status: number, code: string): void;
  answer(answer: FinishedAnswer): void;
};

const FIRST_BUCKETS_s = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30];
const PER_TOKEN_BUCKETS_s = [0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 1];
const TOTAL_BUCKETS_s = [0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120];

export function createMetrics(engine: Engine, modelName: string): Metrics {
  const registry = new Registry();
  registry.setDefaultLabels({ model_name: modelName });
  collectDefaultMetrics({ register: registry });
  engineGauges(engine, registry);
  const histogram = (name: string, help: string, buckets: number[]) =>
    new Histogram({ name, help, buckets, labelNames: ['endpoint'], registers: [registry] });
  const counter = <Label extends string>(name: string, help: string, labelNames: Label[]) =>
    new Counter({ name, help, labelNames, registers: [registry] });
  const requests = counter('maskroute_requests_total', 'Requests by endpoint, HTTP status and error code.', [
    'endpoint',
    'status',
    'code',
  ]);
  const tokens = counter('maskroute_tokens_total', 'Tokens of answers, aborted ones included.', [
    'endpoint',
    'kind',
  ]);
  const masked = counter('maskroute_answers_total', 'Answers, dense or under a mask.', [
    'endpoint',
    'masked',
  ]);
  const first = histogram(
    'gen_ai_server_time_to_first_token_seconds',
    'From the request to its first text.',
    FIRST_BUCKETS_s,
  );
  const perToken = histogram(
    'gen_ai_server_time_per_output_token_seconds',
    'Time a token after the first.',
    PER_TOKEN_BUCKETS_s,
  );
  const total = histogram(
    'gen_ai_server_request_duration_seconds',
    'From the request to the end of its answer.',
    TOTAL_BUCKETS_s,
  );
  const queued = histogram(
    'request_queue_time_seconds',
    'From the arrival of a choice to its first step.',
    TOTAL_BUCKETS_s,
  );
  const gap = histogram(
    'maskroute_request_longest_step_gap_seconds',
    'The longest that a choice waited between two of its steps.',
    FIRST_BUCKETS_s,
  );
  return {
    registry,
    request: (endpoint, status, code) => requests.inc({ endpoint, status, code }),
    answer(answer) {
      const { endpoint, first_ms, total_ms, completionTokens } = answer;
      tokens.inc({ endpoint, kind: 'prompt' }, answer.promptTokens);
      tokens.inc({ endpoint, kind: 'cached' }, answer.cachedTokens);
      tokens.inc({ endpoint, kind: 'completion' }, completionTokens);
      masked.inc({ endpoint, masked: String(answer.mask !== 'dense') });
      total.observe({ endpoint }, total_ms / 1000);
      for (const { queue_ms, stepGap_ms } of answer.timings) {
        queued.observe({ endpoint }, queue_ms / 1000);
        gap.observe({ endpoint }, stepGap_ms / 1000);
      }
      if (first_ms === undefined) return;
      first.observe({ endpoint }, first_ms / 1000);
      if (completionTokens > 1) {
        perToken.observe({ endpoint }, (total_ms - first_ms) / 1000 / (completionTokens - 1));
      }
    },
  };
}

function engineGauges(engine: Engine, registry: Registry): void {
  const gauge = (name: string, help: string, read: () => number) =>
    new Gauge({
      name,
      help,
      registers: [registry],
      collect() {
        this.set(read());
      },
    });
  gauge('num_requests_running', 'Requests that the engine works on.', () => engine.stats().requestsRunning);
  gauge('num_requests_waiting', 'Requests in the waiting line.', () => engine.stats().requestsWaiting);
  gauge(
    'maskroute_longest_step_age_seconds',
    'The longest time since its last step of a request that the engine works on.',
    () => engine.stats().stepAge_ms / 1000,
  );
  gauge(
    'maskroute_longest_queue_age_seconds',
    'The longest wait so far of a request that has had no step.',
    () => engine.stats().queueAge_ms / 1000,
  );
  gauge(
    'kv_cache_usage_perc',
    'Share of the cache that is taken, 0 to 1.',
    () => engine.stats().kvCacheUsage,
  );
  gauge('maskroute_queue_capacity', 'Places in the waiting line.', () => engine.stats().queueCapacity);
  // Gauges, since the engine counts; they only rise, so rates over them are right.
  gauge('maskroute_engine_steps', 'Engine steps since the start.', () => engine.stats().stepsTotal);
  gauge(
    'maskroute_engine_prompt_tokens',
    'Prompt tokens computed since the start.',
    () => engine.stats().promptTokensTotal,
  );
  gauge(
    'maskroute_engine_generated_tokens',
    'Tokens generated since the start.',
    () => engine.stats().generatedTokensTotal,
  );
}
