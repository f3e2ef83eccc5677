/**
 * Assigns a request to a variant of an experiment, by hash: the same sticky key always gets the same variant.
 * Experiments do not overlap, so at most one matches.
 */

import { DENSE_VARIANT } from '../../shared/admin/experiment-wire.ts';
import {
  assignVariant,
  isInScope,
  type Place,
  type Scope,
  type StickyCaller,
  type StickyKind,
  type StickySource,
  stickyKey,
} from '../../shared/mask/sticky.ts';
import { type SourceHealth, SwrCache } from '../base/swr-cache.ts';
import { log, reasonOf } from '../base/telemetry.ts';
import type { Hold } from '../base/waiting.ts';
import { type StoredExperiment, scopeOf } from '../db/experiment-rows.ts';
import { EXPERIMENTS } from '../limits.ts';
import { type HeldSets, isUnreadable, type LiveSet, type RoutingTable } from './live-sets.ts';

/** A variant ready to serve; `set` null: dense. */
type Arm = { readonly name: string; readonly weight: number; readonly set: LiveSet | null };

export type RunningExperiment = {
  readonly id: string;
  /** The owner; ids are unique only within an owner. */
  readonly owner: string;
  readonly scope: Scope;
  readonly sticky: StickyKind;
  readonly arms: readonly Arm[];
  /** Share of its requests to compare with the dense model. */
  readonly shadowShare: number;
};

export type Assignment = {
  readonly experiment: string;
  readonly experimentOwner: string;
  readonly variant: string;
  readonly region: string;
  /** Null: not in an experiment, so the live set is used. */
  readonly arm: Arm | null;
  readonly shadowShare: number;
};

const NO_EXPERIMENT = 'none';
const LIVE_VARIANT = 'live';

export const unassigned = (region: string): Assignment => ({
  experiment: NO_EXPERIMENT,
  experimentOwner: '',
  variant: LIVE_VARIANT,
  region,
  arm: null,
  shadowShare: 0,
});

type AssignRequest = {
  readonly caller: StickyCaller;
  /** The model's name without `:dense`. */
  readonly model: string;
  readonly place: Place;
  readonly region: string;
  readonly source: StickySource;
  /** Whether a mask set is for the requested model. */
  readonly isUsable: (set: LiveSet) => boolean;
};

/**
 * A request takes part only if every arm could serve it; otherwise the arms would get different kinds of requests
 * (selection bias).
 */
export function assign(
  experiments: readonly RunningExperiment[],
  { caller, model, place, region, source, isUsable }: AssignRequest,
  now_ms: number,
): Assignment {
  const experiment = experiments.find(
    ({ scope, arms }) =>
      isInScope(scope, { tenant: caller.tenant, model, place }, now_ms) &&
      arms.every(({ set }) => set === null || isUsable(set)),
  );
  if (experiment === undefined) return unassigned(region);
  const { id, owner, sticky, arms, shadowShare } = experiment;
  const arm = assignVariant(id, arms, stickyKey(sticky, caller, source));
  return { experiment: id, experimentOwner: owner, variant: arm.name, region, arm, shadowShare };
}

/*
 * Started experiments, cached in the isolate with decoded mask sets: assigning never waits for D1, and an experiment is
 * listed only if all its variants can be served.
 */

export interface RunningExperiments {
  /**
   * Started experiments, including those with a later start time: times are compared with the clock at each request.
   */
  list(hold: Hold): Promise<readonly RunningExperiment[]>;
  /** Reads them now, so that this isolate sees a start or stop at once. */
  refresh(hold: Hold): Promise<void>;
}

const KEY = '';

export function createRunningExperiments(
  listStarted: () => Promise<readonly StoredExperiment[]>,
  table: Pick<RoutingTable, 'versionOf'>,
  health?: SourceHealth,
): RunningExperiments {
  const cache = new SwrCache<readonly RunningExperiment[]>(
    'the experiments',
    async () => {
      try {
        const held = (cache.peek(KEY) ?? []).flatMap(({ arms }) => arms.map(({ set }) => set));
        const running: RunningExperiment[] = [];
        for (const experiment of await listStarted()) {
          const known = await toRunning(experiment, table, held);
          if (known !== null) running.push(known);
        }
        return running;
      } catch (error) {
        log('error', 'experiments_load_failed', { reason: reasonOf(error) });
        throw error;
      }
    },
    EXPERIMENTS,
    { health },
  );
  return {
    // While experiments are unknown, requests use the live set.
    list: async (hold) => (await cache.get(KEY, hold).catch(() => null)) ?? [],
    async refresh(hold) {
      await cache.refresh(KEY, hold);
    },
  };
}

/**
 * Null for an experiment that cannot be read, or whose set cannot, so that the others still run. Sets are read one after the other,
 * since a set's text has up to 2 MB and takes several times that while it is decoded.
 */
async function toRunning(
  experiment: StoredExperiment,
  table: Pick<RoutingTable, 'versionOf'>,
  held: HeldSets,
): Promise<RunningExperiment | null> {
  const { id, owner, definition, unreadable } = experiment;
  if (unreadable !== null) return unusable(experiment, unreadable);
  try {
    const arms: RunningExperiment['arms'][number][] = [];
    for (const { name, weight, mask_set } of definition.variants) {
      const set = mask_set === DENSE_VARIANT ? null : await table.versionOf(owner, mask_set, held);
      arms.push({ name, weight, set });
    }
    const { sticky, shadow_share: shadowShare } = definition;
    return { id, owner, scope: scopeOf(experiment), sticky, arms, shadowShare };
  } catch (error) {
    if (!isUnreadable(error)) throw error;
    return unusable(experiment, reasonOf(error));
  }
}

function unusable({ id, owner }: StoredExperiment, reason: string): null {
  log('error', 'experiment_unusable', { experiment: id, owner, reason });
  return null;
}
