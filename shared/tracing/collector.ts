/** Whether traces are made, and who gets them: what OpenTelemetry's own variables say. */
import { parseKeyPairsIntoRecord } from '@opentelemetry/core';
import { z } from 'zod';
import { MaskrouteError } from '../wire/errors.ts';

export type Collector = {
  /** Of `OTEL_EXPORTER_OTLP_ENDPOINT`, with the path of traces. */
  readonly url: string;
  readonly headers: Record<string, string>;
  /** Of the requests that come without a trace, 0 to 1. Whoever brings a trace has decided. */
  readonly share: number;
};

/** A variable that is set to nothing counts as absent. */
export const unlessEmpty = <T extends z.ZodType>(schema: T) =>
  z.preprocess((value) => (value === '' ? undefined : value), schema);

/** Without an endpoint nothing is traced. */
export const collectorVariables = {
  OTEL_EXPORTER_OTLP_ENDPOINT: unlessEmpty(z.url({ protocol: /^https?$/ }).optional()),
  /** `name=value,name=value`, percent-encoded: a key, usually. */
  OTEL_EXPORTER_OTLP_HEADERS: unlessEmpty(z.string().optional()),
  OTEL_TRACES_SAMPLER_ARG: unlessEmpty(z.coerce.number().min(0).max(1).default(1)),
} as const;
const collectorSchema = z.object(collectorVariables);

const TRACES_PATH = '/v1/traces';

export function collectorOf(variables: z.output<typeof collectorSchema>): Collector | undefined {
  const { OTEL_EXPORTER_OTLP_ENDPOINT: endpoint, OTEL_EXPORTER_OTLP_HEADERS: headers } = variables;
  if (endpoint === undefined) return undefined;
  return {
    url: `${endpoint.replace(/\/+$/, '')}${TRACES_PATH}`,
    headers: parseKeyPairsIntoRecord(headers),
    share: variables.OTEL_TRACES_SAMPLER_ARG,
  };
}

/** The variables that say so. */
export const variablesOf = ({ url, headers, share }: Collector): Record<string, string> => ({
  OTEL_EXPORTER_OTLP_ENDPOINT: url.slice(0, -TRACES_PATH.length),
  OTEL_EXPORTER_OTLP_HEADERS: Object.entries(headers)
    .map((pair) => pair.map(encodeURIComponent).join('='))
    .join(','),
  OTEL_TRACES_SAMPLER_ARG: String(share),
});

/** As a process's environment says; undefined: nobody gets any. @throws MaskrouteError `invalid_argument`. */
export function collectorFrom(environment: Record<string, string | undefined>): Collector | undefined {
  const parsed = collectorSchema.safeParse(environment);
  if (parsed.success) return collectorOf(parsed.data);
  const { path, message } = parsed.error.issues[0]!;
  throw new MaskrouteError('invalid_argument', `${String(path[0])}: ${message}.`);
}
