/** The routing decision as response headers: every one is there on every completion, except the two that say why not. */
import { HEADERS } from '../../shared/protocol.ts';
import type { Routed, RouteTimings } from '../services/routing.ts';

/** Stands where nothing was picked: no live mask set, no cluster. */
const NONE = 'none';

export function decisionHeaders(routed: Routed): Record<string, string> {
  const { decision, assignment, timings } = routed;
  return {
    [HEADERS.maskSet]: decision.set?.name ?? NONE,
    [HEADERS.version]: decision.set?.version ?? NONE,
    [HEADERS.cluster]: decision.cluster === null ? NONE : String(decision.cluster),
    [HEADERS.mask]: decision.maskId ?? 'custom',
    ...(decision.sparsity === null ? {} : { [HEADERS.sparsity]: String(decision.sparsity) }),
    [HEADERS.experiment]: assignment.experiment,
    [HEADERS.variant]: assignment.variant,
    [HEADERS.region]: assignment.region,
    ...(decision.fallback === null ? {} : { [HEADERS.fallback]: decision.fallback }),
    [HEADERS.serverTiming]: serverTiming(timings, undefined),
  };
}

/**
 * The platform's clock moves in whole milliseconds, and once deployed only while the worker waits for I/O:
 * work that is done in less reads as 0. `backend_ms` is the time until the backend's first byte; undefined when no
 * backend was asked.
 */
export function serverTiming(timings: RouteTimings, backend_ms: number | undefined): string {
  const durations = [
    `assign;dur=${Math.round(timings.assign_ms)}`,
    `embed;dur=${Math.round(timings.embed_ms)}`,
    `route;dur=${Math.round(timings.route_ms)}`,
  ];
  if (backend_ms !== undefined) durations.push(`backend;dur=${Math.round(backend_ms)}`);
  return durations.join(', ');
}
