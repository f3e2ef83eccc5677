/** Exports the backend's spans to a collector, in batches. Spans that it does not accept in time are lost. */
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
  /** Exports the waiting spans, in bounded time. Never rejects. */
  close(): Promise<void>;
};

const EXPORT_ms = 5000;
/** How long a shutdown waits for a collector that is unreachable, slow, or refuses the spans. */
const CLOSE_ms = 1000;
const BATCH_ms = 1000;
const WAITING_SPANS_MAX = 4096;

/** `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` name the backend in its spans. */
export function openTracing({ url, headers, share }: Collector, log: Logger): Tracing {
  const exporter = new OTLPTraceExporter({ url, headers, timeoutMillis: EXPORT_ms });
  const processor = new BatchSpanProcessor({
    exporter: new LoggingExporter(exporter, log),
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

/** Logs once when exports begin to fail, and once when they work again. */
class LoggingExporter implements SpanExporter {
  readonly #exporter: SpanExporter;
  readonly #log: Logger;
  #isFailing = false;

  constructor(exporter: SpanExporter, log: Logger) {
    this.#exporter = exporter;
    this.#log = log;
  }

  export(spans: ReadableSpan[], done: (result: ExportResult) => void): void {
    this.#exporter.export(spans, (result) => {
      const isLost = result.code !== ExportResultCode.SUCCESS;
      if (isLost && !this.#isFailing) {
        const reason = String(result.error?.message ?? 'unknown');
        this.#log.warn({ spans: spans.length, reason }, 'traces are lost: the collector does not take them');
      }
      if (!isLost && this.#isFailing) this.#log.info('traces are exported again');
      this.#isFailing = isLost;
      done(result);
    });
  }

  async forceFlush(): Promise<void> {
    await this.#exporter.forceFlush?.();
  }

  async shutdown(): Promise<void> {
    await this.#exporter.shutdown();
  }
}
