/** Sends the backend's spans to a collector, in batches. What the collector does not take in time is lost. */
import type { Tracer } from '@opentelemetry/api';
import { type ExportResult, ExportResultCode } from '@opentelemetry/core';
import { OTLPTraceExporter } from '@opentelemetry/exporter-trace-otlp-proto';
import { detectResources, envDetector } from '@opentelemetry/resources';
import { BatchSpanProcessor, type ReadableSpan, type SpanExporter } from '@opentelemetry/sdk-trace';
import type { Logger } from 'pino';
import { createTracer } from '../../shared/tracing/tracer.ts';
import type { Collector } from '../../shared/tracing/traces.ts';
import { within } from './sse.ts';

export type Tracing = {
  readonly tracer: Tracer;
  /** Sends what waits, in bounded time. Never rejects. */
  close(): Promise<void>;
};

const EXPORT_ms = 5000;
/** A stop does not wait longer for a collector that is away. */
const CLOSE_ms = 3000;
const BATCH_ms = 1000;
const WAITING_SPANS_MAX = 4096;

/** `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` name the backend in its spans. */
export function openTracing({ url, headers, share }: Collector, log: Logger): Tracing {
  const exporter = new OTLPTraceExporter({ url, headers, timeoutMillis: EXPORT_ms });
  const processor = new BatchSpanProcessor({
    exporter: new SparingExporter(exporter, log),
    scheduledDelayMillis: BATCH_ms,
    maxQueueSize: WAITING_SPANS_MAX,
    exportTimeoutMillis: EXPORT_ms,
  });
  const named = detectResources({ detectors: [envDetector] });
  const { tracer, provider } = createTracer('maskroute-backend', named, share, processor);
  return {
    tracer,
    close: () =>
      within(
        provider.shutdown().catch(() => {}),
        CLOSE_ms,
      ),
  };
}

/** Tells the log once that the collector takes nothing, and once that it does again. */
class SparingExporter implements SpanExporter {
  readonly #exporter: SpanExporter;
  readonly #log: Logger;
  #isAway = false;

  constructor(exporter: SpanExporter, log: Logger) {
    this.#exporter = exporter;
    this.#log = log;
  }

  export(spans: ReadableSpan[], told: (result: ExportResult) => void): void {
    this.#exporter.export(spans, (result) => {
      const isLost = result.code !== ExportResultCode.SUCCESS;
      if (isLost && !this.#isAway) {
        const reason = String(result.error?.message ?? 'unknown');
        this.#log.warn({ spans: spans.length, reason }, 'traces are lost: the collector does not take them');
      }
      if (!isLost && this.#isAway) this.#log.info('traces are exported again');
      this.#isAway = isLost;
      told(result);
    });
  }

  async forceFlush(): Promise<void> {
    await this.#exporter.forceFlush?.();
  }

  async shutdown(): Promise<void> {
    await this.#exporter.shutdown();
  }
}
