/**
 * Prometheus metrics. Their names follow OpenTelemetry's GenAI conventions (`gen_ai.server.*`, in Prometheus spelling), and
 * vLLM's for the engine.
 */
import { Counter, collectDefaultMetrics, Gauge, Histogram, Registry } from 'prom-client';
import type { Engine, EngineStats, PredictedTokens, Timings } from '../engine/engine.ts';

type FinishedAnswer = {
  readonly endpoint: string;
  readonly mask: string;
  readonly promptTokens: number;
  readonly completionTokens: number;
  readonly cachedTokens: number;
  /** Undefined when no event came. */
  readonly first_ms: number | undefined;
  readonly total_ms: number;
  readonly choices: readonly FinishedChoice[];
};

/** A choice when its answer ends, successfully or not. */
type FinishedChoice = {
  /** Undefined if the engine did not finish it. */
  readonly timings: Timings | undefined;
  readonly finishReason: string | undefined;
  /** Undefined unless it was predicted. */
  readonly predicted: PredictedTokens | undefined;
  /** Between each token and the next. */
  readonly tokenGaps_ms: readonly number[];
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

/** Most masks with a label of their own, since each label adds a time series for each bucket of each histogram. */
const NAMED_MASKS_MAX = 32;
const OTHER_MASK = 'other';

/** Errors that come from the state of this backend and not from the request. */
const REJECTIONS: ReadonlySet<string> = new Set([
  'queue_full',
  'queue_timeout',
  'deadline_exceeded',
  'request_timeout',
  'not_ready',
]);

export function createMetrics(engine: Engine, modelName: string): Metrics {
  const registry = new Registry();
  registry.setDefaultLabels({ model_name: modelName });
  collectDefaultMetrics({ register: registry });
  workGauge(registry);
  engineMetrics(engine, registry);
  const { requests, rejections, tokens, masked, finished } = answerCounters(registry);
  const { first, perToken, betweenTokens, total, queued, gap } = answerTimes(registry);
  const maskLabel = firstNames();
  return {
    registry,
    request(endpoint, status, code) {
      requests.inc({ endpoint, status, code });
      if (REJECTIONS.has(code)) rejections.inc({ reason: code });
    },
    answer(answer) {
      const { endpoint, first_ms, total_ms, completionTokens } = answer;
      tokens.inc({ endpoint, kind: 'prompt' }, answer.promptTokens);
      tokens.inc({ endpoint, kind: 'cached' }, answer.cachedTokens);
      tokens.inc({ endpoint, kind: 'completion' }, completionTokens);
      for (const { predicted } of answer.choices) {
        if (predicted === undefined) continue;
        const kind = predicted.by === 'client' ? 'prediction' : 'lookup';
        tokens.inc({ endpoint, kind: `${kind}_accepted` }, predicted.accepted);
        tokens.inc({ endpoint, kind: `${kind}_rejected` }, predicted.rejected);
      }
      masked.inc({ endpoint, masked: String(answer.mask !== 'dense') });
      const labels = { endpoint, mask: maskLabel(answer.mask) };
      total.observe(labels, total_ms / 1000);
      for (const { timings, finishReason, tokenGaps_ms } of answer.choices) {
        for (const gap_ms of tokenGaps_ms) betweenTokens.observe(labels, gap_ms / 1000);
        if (finishReason !== undefined) finished.inc({ finished_reason: finishReason });
        if (timings === undefined) continue;
        queued.observe(labels, timings.queue_ms / 1000);
        gap.observe(labels, timings.stepGap_ms / 1000);
      }
      if (first_ms === undefined) return;
      first.observe(labels, first_ms / 1000);
      if (completionTokens > 1) {
        perToken.observe(labels, (total_ms - first_ms) / 1000 / (completionTokens - 1));
      }
    },
  };
}

function answerCounters(registry: Registry) {
  const counter = <Label extends string>(name: string, help: string, labelNames: Label[]) =>
    new Counter({ name, help, labelNames, registers: [registry] });
  return {
    requests: counter('maskroute_requests_total', 'Requests by endpoint, HTTP status and error code.', [
      'endpoint',
      'status',
      'code',
    ]),
    tokens: counter('maskroute_tokens_total', 'Tokens of answers, aborted ones included.', [
      'endpoint',
      'kind',
    ]),
    masked: counter('maskroute_answers_total', 'Answers, dense or under a mask.', ['endpoint', 'masked']),
    rejections: counter(
      'request_rejections_total',
      'Requests refused or aborted because of the state of this backend, by error code.',
      ['reason'],
    ),
    finished: counter('request_success_total', 'Finished choices, by finish reason.', ['finished_reason']),
  };
}

function answerTimes(registry: Registry) {
  const histogram = (name: string, help: string, buckets: number[]) =>
    new Histogram({ name, help, buckets, labelNames: ['endpoint', 'mask'], registers: [registry] });
  return {
    first: histogram(
      'gen_ai_server_time_to_first_token_seconds',
      'Time from the request to the first token of its answer.',
      FIRST_BUCKETS_s,
    ),
    perToken: histogram(
      'gen_ai_server_time_per_output_token_seconds',
      'Mean time for each token after the first.',
      PER_TOKEN_BUCKETS_s,
    ),
    betweenTokens: histogram(
      'inter_token_latency_seconds',
      'Time between consecutive tokens of a choice.',
      PER_TOKEN_BUCKETS_s,
    ),
    total: histogram(
      'gen_ai_server_request_duration_seconds',
      'Time from the request to the end of its answer.',
      TOTAL_BUCKETS_s,
    ),
    queued: histogram(
      'request_queue_time_seconds',
      'Time that a choice waited in the queue before its first step.',
      TOTAL_BUCKETS_s,
    ),
    gap: histogram(
      'maskroute_request_longest_step_gap_seconds',
      'Longest time between two consecutive steps of a choice.',
      FIRST_BUCKETS_s,
    ),
  };
}

/** The first `NAMED_MASKS_MAX` names keep their own label; later ones share `other`. */
function firstNames(): (name: string) => string {
  const known = new Set<string>();
  return (name) => {
    if (known.size < NAMED_MASKS_MAX) known.add(name);
    return known.has(name) ? name : OTHER_MASK;
  };
}

const TICK_ms = 10;

/**
 * Event loop lag (`nodejs_eventloop_lag_max_seconds`) does not tell whether this thread computed for too long or waited for
 * a core. This gauge measures its CPU time between two timer ticks. It starts with the first scrape, so that a backend
 * without scrapes does not pay for it.
 */
function workGauge(registry: Registry): void {
  let longest_ms = 0;
  let isWatched = false;
  const watch = () => {
    let last = process.threadCpuUsage();
    setInterval(() => {
      const { user, system } = process.threadCpuUsage(last);
      longest_ms = Math.max(longest_ms, (user + system) / 1000);
      last = process.threadCpuUsage();
    }, TICK_ms).unref();
    isWatched = true;
  };
  new Gauge({
    name: 'maskroute_http_thread_longest_work_seconds',
    help: 'Most CPU time that the HTTP thread used without a pause since the last scrape.',
    registers: [registry],
    collect() {
      if (!isWatched) watch();
      this.set(longest_ms / 1000);
      longest_ms = 0;
    },
  });
}

type EngineFigure = readonly [name: string, help: string, read: (stats: EngineStats) => number];

const ENGINE_GAUGES: readonly EngineFigure[] = [
  ['num_requests_running', 'Running requests in the engine.', (stats) => stats.requestsRunning],
  ['num_requests_waiting', 'Waiting requests in the queue.', (stats) => stats.requestsWaiting],
  ['maskroute_batch_size', 'Sequences in the last step.', (stats) => stats.batchSize],
  [
    'maskroute_longest_step_age_seconds',
    'Longest time since the last step of any running request.',
    (stats) => stats.stepAge_ms / 1000,
  ],
  [
    'maskroute_longest_queue_age_seconds',
    'Age of the oldest request that has had no step yet.',
    (stats) => stats.queueAge_ms / 1000,
  ],
  ['kv_cache_usage_perc', 'Used share of the KV cache, 0 to 1.', (stats) => stats.kvCacheUsage],
  ['maskroute_kv_cache_pages_used', 'Used pages of the KV cache.', (stats) => stats.pagesUsed],
  ['maskroute_kv_cache_pages', 'Pages of the KV cache.', (stats) => stats.pagesTotal],
  ['maskroute_queue_capacity', 'Capacity of the queue, in requests.', (stats) => stats.queueCapacity],
  // These only rise, so rate() works on them.
  ['maskroute_engine_steps', 'Engine steps since the start.', (stats) => stats.stepsTotal],
  [
    'maskroute_engine_prompt_tokens',
    'Prompt tokens computed since the start.',
    (stats) => stats.promptTokensTotal,
  ],
  [
    'maskroute_engine_generated_tokens',
    'Tokens generated since the start.',
    (stats) => stats.generatedTokensTotal,
  ],
];

const ENGINE_COUNTERS: readonly EngineFigure[] = [
  [
    'prefix_cache_queries_total',
    'Prompt tokens looked up in the prefix cache.',
    (stats) => stats.prefixQueriesTotal,
  ],
  ['prefix_cache_hits_total', 'Prompt tokens found in the prefix cache.', (stats) => stats.prefixHitsTotal],
  [
    'num_preemptions_total',
    'Preemptions: running requests that lost their cache and are computed again later.',
    (stats) => stats.preemptionsTotal,
  ],
];

/** What the engine says of itself, read at each scrape. */
function engineMetrics(engine: Engine, registry: Registry): void {
  const { device, kv } = engine.model;
  const registers = [registry];
  new Gauge({
    name: 'maskroute_device_info',
    help: 'The device that computes answers.',
    labelNames: ['device', 'adapter'],
    registers,
  }).set({ device: device.kind, adapter: device.kind === 'cpu' ? '' : device.adapter }, 1);
  new Gauge({
    name: 'maskroute_kv_cache_page_bytes',
    help: 'Size of a page of the KV cache, by its number type.',
    labelNames: ['kv_type'],
    registers,
  }).set({ kv_type: kv.type }, kv.page_bytes);
  for (const [name, help, read] of ENGINE_GAUGES) {
    new Gauge({
      name,
      help,
      registers,
      collect() {
        this.set(read(engine.stats()));
      },
    });
  }
  for (const [name, help, read] of ENGINE_COUNTERS) {
    new Counter({
      name,
      help,
      registers,
      collect() {
        // The engine has the count.
        this.reset();
        this.inc(read(engine.stats()));
      },
    });
  }
}
