/** A request's way to its mask: assign, look up what is live, embed, find the nearest centroid; each timed. */
import { chatRouteText, completionRouteText } from '../../shared/embedding/route-text.ts';
import type { EncoderSpec } from '../../shared/mask-set.ts';
import type { ChatRequest, CompletionRequest } from '../../shared/openai.ts';
import type { ModelEntry, RouteEcho } from '../../shared/protocol.ts';
import { splitModelName } from '../../shared/protocol.ts';
import { stickyKey } from '../../shared/sticky-key.ts';
import type { Caller } from './api-keys.ts';
import { type Assignment, assign } from './assign.ts';
import type { Hold } from './deadline.ts';
import type { Embedder } from './embed.ts';
import { log, reasonOf } from './log.ts';
import type { Models } from './models.ts';
import { type Decision, denseDecision, isModelOf, nearestDecision, requestedDecision } from './route.ts';
import type { LiveSet, RoutingTable } from './routing-table.ts';

/** The body that routing reads. */
export type RoutableBody =
  | { readonly kind: 'chat'; readonly body: ChatRequest }
  | { readonly kind: 'completion'; readonly body: CompletionRequest };

export type RouteRequest = RoutableBody & {
  readonly caller: Caller;
  readonly region: string;
  readonly signal: AbortSignal;
  readonly hold: Hold;
};

export type RouteTimings = { assign_ms: number; embed_ms: number; route_ms: number };

export type Routed = {
  readonly decision: Decision;
  readonly assignment: Assignment;
  /** The encoder that embedded the text, when one did. */
  readonly encoder: EncoderSpec | null;
  readonly timings: RouteTimings;
};

export type RoutingDependencies = {
  readonly table: RoutingTable;
  readonly models: Models;
  readonly embedder: Embedder;
  readonly similarityMin: number;
};

export async function routeRequest(
  dependencies: RoutingDependencies,
  request: RouteRequest,
): Promise<Routed> {
  const timings: RouteTimings = { assign_ms: 0, embed_ms: 0, route_ms: 0 };
  const started_ms = performance.now();
  const assignment = assign(request.region);
  timings.assign_ms = performance.now() - started_ms;
  const { decision, encoder } = await decide(dependencies, request, timings);
  timings.route_ms = performance.now() - started_ms - timings.assign_ms - timings.embed_ms;
  return { decision, assignment, encoder, timings };
}

async function decide(
  { table, models, embedder, similarityMin }: RoutingDependencies,
  request: RouteRequest,
  timings: RouteTimings,
): Promise<{ decision: Decision; encoder: EncoderSpec | null }> {
  const unembedded = (decision: Decision) => ({ decision, encoder: null });
  const { model, dense } = splitModelName(request.body.model);
  const [set, list] = await Promise.all([
    table
      .liveFor(request.caller.tenant, () => stickyKey('conversation', request.caller, request), request.hold)
      .catch(() => null),
    models.list(request.hold).catch((error): readonly ModelEntry[] => {
      log('warn', 'model_list_unavailable', { reason: reasonOf(error) });
      return [];
    }),
  ]);
  const entry = list.find((candidate) => candidate.id === model);
  const { mask } = request.body;
  if (mask != null) {
    const findSparsity = (id: string) => table.findMask(id)?.cluster.sparsity;
    return unembedded(requestedDecision(mask, set, entry, findSparsity));
  }
  if (dense) return unembedded(denseDecision(set, 'requested'));
  if (set === null) return unembedded(denseDecision(null, 'no_mask_set'));
  if (!isModelOf(set, model, entry)) return unembedded(denseDecision(set, 'model_mismatch'));

  const text = routeText(request);
  if (text === null) return unembedded(denseDecision(set, 'token_prompt'));
  if (text === '') return unembedded(denseDecision(set, 'empty_prompt'));
  const started_ms = performance.now();
  const embedding = await embedder.embed(text, request.signal, request.hold);
  timings.embed_ms = performance.now() - started_ms;
  return {
    decision: nearestDecision(set, embedding, similarityMin),
    encoder: embedding.ok ? embedding.spec : null,
  };
}

const routeText = (request: RouteRequest): string | null =>
  request.kind === 'chat'
    ? chatRouteText(request.body, request.caller.routingPolicy)
    : completionRouteText(request.body);

/** The decision as the backend is told it and the body's `maskroute` returns it. */
export const routeEcho = ({ decision, assignment }: Routed): RouteEcho => ({
  mask_set: setName(decision.set),
  version: decision.set?.version ?? null,
  cluster: decision.cluster,
  similarity: decision.similarity,
  experiment: assignment.experiment,
  variant: assignment.variant,
  region: assignment.region,
  fallback: decision.fallback,
});

const setName = (set: LiveSet | null): string | null => set?.name ?? null;
