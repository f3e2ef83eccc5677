/** The routing decision as response headers: every one is there on every completion, except the two that say why not. */
import { HEADERS } from '../../shared/protocol.ts';
import type { Routed } from '../services/routing.ts';

/** Stands where nothing was picked: no live mask set, no cluster. */
const NONE = 'none';

/**
 * The platform's clock moves in whole milliseconds, and once deployed only while the worker waits for I/O:
 * work that is done in less reads as 0. `backend_ms` is the time until the backend's first byte; undefined when no
 * backend was asked.
 */
export function decisionHeaders(routed: Routed, backend_ms: number | undefined): Record<string, string> {
  const { decision, assignment, timings } = routed;
  const durations: [string, number | undefined][] = [
    ['assign', timings.assign_ms],
    ['embed', timings.embed_ms],
    ['route', timings.route_ms],
    ['backend', backend_ms],
  ];
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
    [HEADERS.serverTiming]: durations
      .filter((entry): entry is [string, number] => entry[1] !== undefined)
      .map(([name, duration_ms]) => `${name};dur=${Math.round(duration_ms)}`)
      .join(', '),
  };
}
