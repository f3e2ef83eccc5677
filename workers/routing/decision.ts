/**
 * Routing of a request: assign to an experiment, look up the live set, embed, find the nearest centroid. Each step is
 * timed.
 */

import { chatRouteText, completionRouteText } from '../../shared/embedding/encoder.ts';
import { nearestAllowed, nearestCentroid } from '../../shared/mask/centroids.ts';
import {
  DENSE_MASK_ID,
  type MaskId,
  type ModelHash,
  maskFromSkippedLayers,
  maskId,
  type SurrogatesId,
  sparsity,
  withSurrogates,
} from '../../shared/mask/mask.ts';
import { type EncoderSpec, sameEncoder } from '../../shared/mask/mask-set.ts';
import { type Place, stickyKey } from '../../shared/mask/sticky.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import type { ChatRequest, CompletionRequest, MaskField } from '../../shared/wire/openai.ts';
import {
  type FallbackReason,
  type ModelEntry,
  type RouteEcho,
  splitModelName,
} from '../../shared/wire/protocol.ts';
import type { MaskNeeds } from '../backends/choose.ts';
import type { Models } from '../backends/registry.ts';
import { log, reasonOf } from '../base/telemetry.ts';
import { type Hold, steadyNow_ms } from '../base/waiting.ts';
import { d1 } from '../db/d1.ts';
import type { Config } from '../env.ts';
import type { Caller } from '../tenants/api-keys.ts';
import {
  type Assignment,
  assign,
  type RunningExperiment,
  type RunningExperiments,
  unassigned,
} from './assignment.ts';
import type { Embedder, Embedding } from './embed.ts';
import type { LiveSet, NamedMasks, RoutingTable } from './live-sets.ts';

/* The decision is a pure function of what is known, so that a dry run and a completion cannot differ. */

/** The chosen mask and the reason. `mask`: the value sent to the backend. */
export type Decision = {
  readonly mask: MaskField;
  /** Null when only the backend can know it, for a mask that the client chose and this edge does not have. */
  readonly maskId: MaskId | null;
  readonly sparsity: number | null;
  readonly set: LiveSet | null;
  readonly cluster: number | null;
  readonly distance: number | null;
  readonly similarity: number | null;
  readonly fallback: FallbackReason | null;
  /** What the mask needs of a backend; undefined: nothing, or it is not known here. */
  readonly needs: MaskNeeds | undefined;
};

const needsOf = ({ model, surrogates }: LiveSet): MaskNeeds => ({ modelHash: model.hash, surrogates });

const NOT_ROUTED = { cluster: null, distance: null, similarity: null } as const;

export const denseDecision = (set: LiveSet | null, fallback: Decision['fallback']): Decision => ({
  ...NOT_ROUTED,
  mask: DENSE_MASK_ID,
  maskId: DENSE_MASK_ID,
  sparsity: 0,
  set,
  fallback,
  needs: undefined,
});

/** A client's own mask is passed on unchanged; `findMask` knows the masks of this edge. */
function requestedDecision(
  mask: MaskField,
  set: LiveSet | null,
  entries: readonly ModelEntry[],
  findMask: RoutingTable['findMask'],
): Decision {
  if (mask === DENSE_MASK_ID) return denseDecision(set, 'requested');
  if (typeof mask !== 'string') {
    return { ...NOT_ROUTED, ...inlineMask(mask, entries), mask, set, fallback: null };
  }
  const held = findMask(mask);
  const sparsity = held?.cluster.sparsity ?? null;
  const needs = held && needsOf(held.set);
  return { ...NOT_ROUTED, mask, maskId: mask as MaskId, sparsity, set, fallback: null, needs };
}

/**
 * What is known of a mask that the client wrote out. With surrogates it needs a backend that has a table; where there
 * are several tables, one of them is taken.
 */
function inlineMask(
  mask: Exclude<MaskField, string>,
  entries: readonly ModelEntry[],
): Pick<Decision, 'maskId' | 'sparsity' | 'needs'> {
  const listed = entries.map(({ maskroute }) => maskroute);
  const usable = mask.surrogate ? listed.filter((entry) => entry?.surrogates != null) : listed;
  const [first, ...others] = usable;
  // The backend itself refuses surrogates that its model lacks.
  if (first === undefined) return { maskId: null, sparsity: null, needs: undefined };
  const { block_count, hash, surrogates } = first;
  const needs = mask.surrogate ? { modelHash: hash, surrogates: surrogates! } : undefined;
  const unknown = { maskId: null, sparsity: null, needs };
  if (others.some((other) => other?.block_count !== block_count)) return unknown;
  // With different weights or tables the mask has another id at each backend, but skips as much.
  const isOneId = others.every(
    (other) => other?.hash === hash && (!mask.surrogate || other.surrogates === surrogates),
  );
  try {
    const runs = maskFromSkippedLayers(block_count, mask);
    const chosen = withSurrogates(runs, mask.surrogate ? (surrogates as SurrogatesId) : null);
    return { maskId: isOneId ? maskId(hash as ModelHash, chosen) : null, sparsity: sparsity(chosen), needs };
  } catch {
    // A layer is outside the model: the backend reports that itself.
    return unknown;
  }
}

/**
 * Whether a set is for a model. If backends list the model (`entries`), one of them must serve the set's weights; those
 * with other weights refuse its masks. Otherwise the name decides.
 */
function isModelOf(set: LiveSet, name: string, entries: readonly ModelEntry[]): boolean {
  const served = entries.flatMap(({ maskroute }) => maskroute?.hash ?? []);
  return served.length === 0 ? set.model.name === name : served.includes(set.model.hash);
}

/**
 * The mask of the nearest centroid, or dense with the reason. `similarityMin` is a cosine. Clusters whose mask is
 * sparser than `sparsityMax` are skipped for the next nearest.
 */
function nearestDecision(
  set: LiveSet,
  embedding: Embedding,
  similarityMin: number,
  sparsityMax: number | null,
): Decision {
  if (!embedding.ok) return denseDecision(set, embedding.fallback);
  if (!sameEncoder(embedding.spec, set.encoder)) return denseDecision(set, 'encoder_mismatch');
  const nearest = nearestCentroid(embedding.vector, set.centroids);
  // The zero vector is near no centroid: the encoder knew no token of the text.
  const isUnknown = embedding.vector.every((value) => value === 0);
  if (isUnknown || nearest.similarity < similarityMin) {
    return { ...denseDecision(set, 'low_similarity'), ...nearest };
  }
  const isAllowed = (cluster: number) => !isOverCeiling(set.clusters[cluster]!.sparsity, sparsityMax);
  const allowed = isAllowed(nearest.cluster)
    ? nearest
    : nearestAllowed(embedding.vector, set.centroids, isAllowed);
  if (allowed === null) return { ...denseDecision(set, 'over_ceiling'), ...nearest };
  const { mask, sparsity: skipped } = set.clusters[allowed.cluster]!;
  return { ...allowed, mask, maskId: mask, sparsity: skipped, set, fallback: null, needs: needsOf(set) };
}

/** Tolerance for rounding: a ceiling of 0.3 must allow 3 of 10 blocks. */
const SPARSITY_SLACK = 1e-9;

/**
 * Whether a set's agreement with dense meets the tenant's floor. Publishing checks this, too, but a floor may be raised
 * later, and the default set is published without one.
 */
export const meetsFloor = ({ agreement }: Pick<LiveSet, 'agreement'>, agreementMin: number | null): boolean =>
  agreementMin === null || (agreement !== null && agreement >= agreementMin);

export const isOverCeiling = (sparsity: number, sparsityMax: number | null): boolean =>
  sparsityMax !== null && sparsity > sparsityMax + SPARSITY_SLACK;

/** A share in messages. It has four digits: a share just over a limit must not read like the limit. */
export const percent = (share: number): string => `${Number((100 * share).toPrecision(4))} %`;

/**
 * @throws MaskrouteError `sparsity_over_ceiling` for a mask that is sparser than allowed, or whose sparsity is unknown.
 */
function requireAllowed(sparsity: number | null, sparsityMax: number | null): void {
  if (sparsityMax === null || (sparsity !== null && !isOverCeiling(sparsity, sparsityMax))) return;
  const found =
    sparsity === null ? 'how much this mask skips is not known here' : `this mask skips ${percent(sparsity)}`;
  throw new MaskrouteError(
    'sparsity_over_ceiling',
    `This tenant's masks skip at most ${percent(sparsityMax)} of blocks; ${found}.`,
    { param: 'mask' },
  );
}

/** The body as routing reads it. */
export type RoutableBody =
  | { readonly kind: 'chat'; readonly body: ChatRequest }
  | { readonly kind: 'completion'; readonly body: CompletionRequest };

/** A trial request, such as the playground's. */
export type Trial = {
  /** Version of the mask set to route by; undefined: the live set. */
  readonly version: string | undefined;
};

type RouteRequest = RoutableBody & {
  /** Undefined for an ordinary request. */
  readonly trial: Trial | undefined;
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
  /** The text's embedding, if it was embedded. */
  readonly vector: Float32Array | null;
  readonly timings: RouteTimings;
};

type RoutingDependencies = {
  readonly table: RoutingTable;
  readonly models: Models;
  readonly experiments: RunningExperiments;
  readonly embedder: Embedder;
  readonly config: Pick<Config, 'SIMILARITY_MIN'>;
  readonly namedMasks: Pick<NamedMasks, 'enter' | 'sparsityOf'>;
};

/**
 * @throws MaskrouteError `sparsity_over_ceiling` when the client asks for a mask that its tenant may not use,
 * `rate_limit_exceeded` when its tenant names too many unknown masks; for a trial `not_found` or
 * `configuration_unavailable` when its set cannot be read.
 */
export async function routeRequest(
  dependencies: RoutingDependencies,
  request: RouteRequest,
): Promise<Routed> {
  const timings: RouteTimings = { assign_ms: 0, embed_ms: 0, route_ms: 0 };
  const started_ms = steadyNow_ms();
  const known = await withTrialSet(dependencies, await lookUp(dependencies, request), request);
  const found_ms = steadyNow_ms();
  const assignment = assignRequest(known, request);
  timings.assign_ms = steadyNow_ms() - found_ms;
  const { decision, encoder, vector } = await decide(dependencies, known, assignment, request, timings);
  timings.route_ms = steadyNow_ms() - started_ms - timings.assign_ms - timings.embed_ms;
  return { decision, assignment, encoder, vector, timings };
}

/** The data for a decision; cached in the isolate after the first request. */
type Known = {
  readonly live: LiveSet | null;
  /** Why there is no live set, if there is none. */
  readonly whyNone: FallbackReason;
  /** What backends list under the model's name. */
  readonly entries: readonly ModelEntry[];
  readonly experiments: readonly RunningExperiment[];
};

/**
 * With the set that a trial names, if it names one, in place of the live set.
 * @throws MaskrouteError `not_found` for a set that this tenant does not have, `configuration_unavailable` when D1
 * fails or stalls.
 */
async function withTrialSet(
  { table }: RoutingDependencies,
  known: Known,
  request: RouteRequest,
): Promise<Known> {
  const version = request.trial?.version;
  if (version === undefined) return known;
  return { ...known, live: await d1(table.versionOf(request.caller.tenant, version)) };
}

async function lookUp(
  { table, models, experiments }: RoutingDependencies,
  request: RouteRequest,
): Promise<Known> {
  const { caller, body, hold } = request;
  const conversation = () => stickyKey('conversation', caller, request);
  const [found, list, running] = await Promise.all([
    table.liveFor(caller.tenant, conversation, hold).then(
      (live) => ({ live, whyNone: 'no_mask_set' as const }),
      () => ({ live: null, whyNone: 'mask_set_unavailable' as const }),
    ),
    models.list(hold).catch((error): readonly ModelEntry[] => {
      log('warn', 'model_list_unavailable', { reason: reasonOf(error) });
      return [];
    }),
    experiments.list(hold),
  ]);
  const { model } = splitModelName(body.model);
  return { ...found, entries: list.filter(({ id }) => id === model), experiments: running };
}

/** Requests that name a mask or ask for dense take part in no experiment. */
function assignRequest({ experiments, entries }: Known, request: RouteRequest): Assignment {
  const { region, place, caller, body } = request;
  const { model, dense } = splitModelName(body.model);
  if (dense || body.mask != null || request.trial !== undefined) return unassigned(region);
  const isUsable = (set: LiveSet) =>
    isModelOf(set, model, entries) && meetsFloor(set, caller.policy.agreementMin);
  return assign(experiments, { caller, model, place, region, source: request, isUsable }, Date.now());
}

async function decide(
  { table, embedder, config, namedMasks }: RoutingDependencies,
  { live, whyNone, entries }: Known,
  { arm }: Assignment,
  request: RouteRequest,
  timings: RouteTimings,
): Promise<Pick<Routed, 'decision' | 'encoder' | 'vector'>> {
  const unembedded = (decision: Decision) => ({ decision, encoder: null, vector: null });
  const { model, dense } = splitModelName(request.body.model);
  const { mask } = request.body;
  const { sparsityMax, agreementMin } = request.caller.policy;
  if (mask != null) {
    if (typeof mask === 'string') await namedMasks.enter(request.caller.tenant, mask);
    const decision = requestedDecision(mask, live, entries, table.findMask);
    if (sparsityMax === null) return unembedded(decision);
    const sparsity =
      decision.sparsity ?? (decision.maskId === null ? null : await namedMasks.sparsityOf(decision.maskId));
    requireAllowed(sparsity, sparsityMax);
    return unembedded({ ...decision, sparsity });
  }
  if (dense) return unembedded(denseDecision(live, 'requested'));
  const set = arm === null ? live : arm.set;
  if (set === null) return unembedded(denseDecision(null, arm === null ? whyNone : 'experiment'));
  if (!isModelOf(set, model, entries)) return unembedded(denseDecision(set, 'model_mismatch'));
  if (!meetsFloor(set, agreementMin)) return unembedded(denseDecision(set, 'under_floor'));

  const text = routeText(request);
  if (text === null) return unembedded(denseDecision(set, 'token_prompt'));
  if (text === '') return unembedded(denseDecision(set, 'empty_prompt'));
  const started_ms = steadyNow_ms();
  const embedding = await embedder.embed(text, request);
  timings.embed_ms = steadyNow_ms() - started_ms;
  return {
    decision: nearestDecision(set, embedding, config.SIMILARITY_MIN, sparsityMax),
    encoder: embedding.ok ? embedding.spec : null,
    vector: embedding.ok ? embedding.vector : null,
  };
}

const routeText = (request: RouteRequest): string | null =>
  request.kind === 'chat'
    ? chatRouteText(request.body, request.caller.routingPolicy)
    : completionRouteText(request.body);

/** The decision as it is sent to the backend and returned in the body's `maskroute`. */
export const routeEcho = ({ decision, assignment }: Routed): RouteEcho => ({
  mask_set: decision.set?.name ?? null,
  version: decision.set?.version ?? null,
  cluster: decision.cluster,
  similarity: decision.similarity,
  experiment: assignment.experiment,
  variant: assignment.variant,
  region: assignment.region,
  fallback: decision.fallback,
});
