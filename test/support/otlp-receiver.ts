/**
 * A collector of traces on a port: it reads OTLP over http/protobuf with the code that protobuf.js generated from the
 * published definitions (an older release of OpenTelemetry's own package brings it; newer ones write bytes by hand).
 */
import { once } from 'node:events';
import { createServer, type IncomingMessage } from 'node:http';
import { createRequire } from 'node:module';
import type { AddressInfo } from 'node:net';
import { buffer } from 'node:stream/consumers';

type Value = {
  stringValue?: string | null;
  boolValue?: boolean | null;
  intValue?: number | { toNumber(): number } | null;
  doubleValue?: number | null;
  arrayValue?: { values: Value[] } | null;
};
type Pair = { key: string; value: Value };
type WireSpan = {
  traceId: Uint8Array;
  spanId: Uint8Array;
  parentSpanId: Uint8Array;
  name: string;
  kind: number;
  startTimeUnixNano: { toString(): string };
  endTimeUnixNano: { toString(): string };
  attributes: Pair[];
  events: { name: string }[];
  status: { code: number } | null;
};
type Wire = {
  resourceSpans: { resource: { attributes: Pair[] }; scopeSpans: { spans: WireSpan[] }[] }[];
};
const { ExportTraceServiceRequest } = createRequire(import.meta.url)(
  'otlp-definitions/build/src/generated/root.js',
).opentelemetry.proto.collector.trace.v1 as {
  ExportTraceServiceRequest: { decode(bytes: Uint8Array): Wire };
};

export type ReceivedSpan = {
  readonly service: string;
  readonly name: string;
  readonly kind: 'internal' | 'server' | 'client' | 'other';
  readonly traceId: string;
  readonly spanId: string;
  /** Empty for a root. */
  readonly parentId: string;
  readonly start_ms: number;
  readonly end_ms: number;
  readonly attributes: Record<string, unknown>;
  readonly events: readonly string[];
  readonly isError: boolean;
};

export type Receiver = {
  readonly url: string;
  readonly spans: ReceivedSpan[];
  /** What came, as it came. */
  readonly bodies: Buffer[];
  readonly requests: IncomingMessage[];
  close(): Promise<void>;
};

/** `port` 0 picks a free one. */
export async function openReceiver(port = 0): Promise<Receiver> {
  const spans: ReceivedSpan[] = [];
  const bodies: Buffer[] = [];
  const requests: IncomingMessage[] = [];
  const server = createServer(async (request, response) => {
    const bytes = await buffer(request);
    bodies.push(bytes);
    requests.push(request);
    spans.push(...read(ExportTraceServiceRequest.decode(bytes)));
    // An empty `ExportTraceServiceResponse`: all was taken.
    response.writeHead(200, { 'content-type': 'application/x-protobuf' }).end();
  });
  server.listen(port, '127.0.0.1');
  await once(server, 'listening');
  return {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    spans,
    bodies,
    requests,
    async close() {
      server.close();
      server.closeAllConnections();
      await once(server, 'close');
    },
  };
}

const KINDS = ['other', 'internal', 'server', 'client'] as const;

const read = ({ resourceSpans }: Wire): ReceivedSpan[] =>
  resourceSpans.flatMap(({ resource, scopeSpans }) =>
    scopeSpans.flatMap((scope) =>
      scope.spans.map((span) => ({
        service: String(valuesOf(resource.attributes)['service.name']),
        name: span.name,
        kind: KINDS[span.kind] ?? 'other',
        traceId: hex(span.traceId),
        spanId: hex(span.spanId),
        parentId: hex(span.parentSpanId),
        start_ms: Number(BigInt(span.startTimeUnixNano.toString()) / 1000n) / 1000,
        end_ms: Number(BigInt(span.endTimeUnixNano.toString()) / 1000n) / 1000,
        attributes: valuesOf(span.attributes),
        events: span.events.map(({ name }) => name),
        isError: span.status?.code === 2,
      })),
    ),
  );

const hex = (bytes: Uint8Array | null): string => Buffer.from(bytes ?? []).toString('hex');

const valuesOf = (pairs: readonly Pair[]): Record<string, unknown> =>
  Object.fromEntries(pairs.map(({ key, value }) => [key, plain(value)]));

function plain(value: Value): unknown {
  if (value.arrayValue != null) return value.arrayValue.values.map(plain);
  const int = value.intValue;
  if (int != null) return typeof int === 'number' ? int : int.toNumber();
  return value.stringValue ?? value.boolValue ?? value.doubleValue;
}
