/** A request's way to its mask: assign, look up what is live, embed, find the nearest centroid; each timed. */
import { chatRouteText, completionRouteText } from '../../shared/embedding/route-text.ts';
import type { Place } from '../../shared/experiment.ts';
import type { EncoderSpec } from '../../shared/mask-set.ts';
import type { ChatRequest, CompletionRequest } from '../../shared/openai.ts';
import type { ModelEntry, RouteEcho } from '../../shared/protocol.ts';
import { splitModelName } from '../../shared/protocol.ts';
import { stickyKey } from '../../shared/sticky-key.ts';
import type { Caller } from './api-keys.ts';
import { type Assignment, assign, type RunningExperiment, unassigned } from './assign.ts';
import type { Hold } from './deadline.ts';
import type { Embedder } from './embed.ts';
import { log, reasonOf } from './log.ts';
import type { Models } from './models.ts';
import type { NamedMasks } from './named-masks.ts';
import {
  type Decision,
  denseDecision,
  isModelOf,
  meetsFloor,
  nearestDecision,
  requestedDecision,
  requireAllowed,
} from './route.ts';
import type { LiveSet, RoutingTable } from './routing-table.ts';
import type { RunningExperiments } from './running-experiments.ts';

/** The body that routing reads. */
export type RoutableBody =
  | { readonly kind: 'chat'; readonly body: ChatRequest }
  | { readonly kind: 'completion'; readonly body: CompletionRequest };

export type RouteRequest = RoutableBody & {
  readonly caller: Caller;
  readonly region: string;
  readonly place: Place;
  readonly signal: AbortSignal;
  readonly hold: Hold;
};

export type RouteTimings = { assign_ms: number; embed_ms: number; route_ms: number };

export type Routed = {
  readonly decision: Decision;
  readonly assignment: Assignment;
  /** The encoder that embedded the text, when one did. */
  readonly encoder: EncoderSpec | null;
  /** Where the text lies in the encoder's space, when it was embedded. */
  readonly vector: Float32Array | null;
  readonly timings: RouteTimings;
};

export type RoutingDependencies = {
  readonly table: RoutingTable;
  readonly models: Models;
  readonly experiments: RunningExperiments;
  readonly embedder: Embedder;
  readonly similarityMin: number;
  readonly namedMasks: Pick<NamedMasks, 'enter' | 'sparsityOf'>;
};

/**
 * @throws MaskrouteError `sparsity_over_ceiling` when the client asks for a mask that its tenant may not use,
 * `rate_limit_exceeded` when its tenant names too many that nobody knows here.
 */
export async function routeRequest(
  dependencies: RoutingDependencies,
  request: RouteRequest,
): Promise<Routed> {
  const timings: RouteTimings = { assign_ms: 0, embed_ms: 0, route_ms: 0 };
  const started_ms = performance.now();
  const known = knownNow(dependencies, request) ?? (await lookUp(dependencies, request));
  const found_ms = performance.now();
  const assignment = assignRequest(known, request);
  timings.assign_ms = performance.now() - found_ms;
  const { decision, encoder, vector } = await decide(dependencies, known, assignment, request, timings);
  timings.route_ms = performance.now() - started_ms - timings.assign_ms - timings.embed_ms;
  return { decision, assignment, encoder, vector, timings };
}

/** What is known, all of it from the isolate once it has been asked for. */
type Known = {
  readonly live: LiveSet | null;
  readonly entry: ModelEntry | undefined;
  readonly experiments: readonly RunningExperiment[];
};

/** What most requests need: waiting for what is there already would cost more than all that is done with it. */
function knownNow(
  { table, models, experiments }: RoutingDependencies,
  request: RouteRequest,
): Known | undefined {
  const live = table.fresh(request.caller.tenant, conversationOf(request));
  const list = models.fresh();
  const running = experiments.fresh();
  if (live === undefined || list === undefined || running === undefined) return undefined;
  return { live, entry: entryOf(list, request), experiments: running };
}

const conversationOf = (request: RouteRequest) => () => stickyKey('conversation', request.caller, request);

function entryOf(list: readonly ModelEntry[], request: RouteRequest): ModelEntry | undefined {
  const { model } = splitModelName(request.body.model);
  return list.find((candidate) => candidate.id === model);
}

async function lookUp(
  { table, models, experiments }: RoutingDependencies,
  request: RouteRequest,
): Promise<Known> {
  const [live, list, running] = await Promise.all([
    table.liveFor(request.caller.tenant, conversationOf(request), request.hold).catch(() => null),
    models.list(request.hold).catch((error): readonly ModelEntry[] => {
      log('warn', 'model_list_unavailable', { reason: reasonOf(error) });
      return [];
    }),
    experiments.list(request.hold),
  ]);
  return { live, entry: entryOf(list, request), experiments: running };
}

/** Who names the mask, or asks for dense, decided for themselves: no experiment is about their request. */
function assignRequest({ experiments, entry }: Known, request: RouteRequest): Assignment {
  const { region, place, caller, body } = request;
  const { model, dense } = splitModelName(body.model);
  if (dense || body.mask != null) return unassigned(region);
  const isUsable = (set: LiveSet) =>
    isModelOf(set, model, entry) && meetsFloor(set, caller.policy.agreementMin);
  return assign(experiments, { caller, model, place, region, source: request, isUsable }, Date.now());
}

async function decide(
  { table, embedder, similarityMin, namedMasks }: RoutingDependencies,
  { live, entry }: Known,
  { arm }: Assignment,
  request: RouteRequest,
  timings: RouteTimings,
): Promise<Pick<Routed, 'decision' | 'encoder' | 'vector'>> {
  const unembedded = (decision: Decision) => ({ decision, encoder: null, vector: null });
  const { model, dense } = splitModelName(request.body.model);
  const { mask } = request.body;
  const { sparsityMax, agreementMin } = request.caller.policy;
  if (mask != null) {
    const asked = typeof mask === 'string' ? namedMasks.enter(request.caller.tenant, mask) : undefined;
    if (asked !== undefined) await asked;
    const heldSparsity = (id: string) => table.findMask(id)?.cluster.sparsity;
    const decision = requestedDecision(mask, live, entry, heldSparsity);
    if (sparsityMax === null) return unembedded(decision);
    const sparsity =
      decision.sparsity ?? (decision.maskId === null ? null : await namedMasks.sparsityOf(decision.maskId));
    requireAllowed(sparsity, sparsityMax);
    return unembedded({ ...decision, sparsity });
  }
  if (dense) return unembedded(denseDecision(live, 'requested'));
  const set = arm === null ? live : arm.set;
  if (set === null) return unembedded(denseDecision(null, arm === null ? 'no_mask_set' : 'experiment'));
  if (!isModelOf(set, model, entry)) return unembedded(denseDecision(set, 'model_mismatch'));
  if (!meetsFloor(set, agreementMin)) return unembedded(denseDecision(set, 'under_floor'));

  const text = routeText(request);
  if (text === null) return unembedded(denseDecision(set, 'token_prompt'));
  if (text === '') return unembedded(denseDecision(set, 'empty_prompt'));
  const started_ms = performance.now();
  const embedding = await embedder.embed(text, request);
  timings.embed_ms = performance.now() - started_ms;
  return {
    decision: nearestDecision(set, embedding, similarityMin, sparsityMax),
    encoder: embedding.ok ? embedding.spec : null,
    vector: embedding.ok ? embedding.vector : null,
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
