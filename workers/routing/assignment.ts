/**
 * Which variant of which experiment a request takes part in: by hash and never by coin, so that the same
 * sticky key gets the same variant everywhere and always. Experiments do not overlap, so at most one is found.
 */

import { z } from 'zod';
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
import type { HeldSets, LiveSet, RoutingTable } from './live-sets.ts';

/** What the variant serves: `set` null runs every block. */
type Arm = { readonly name: string; readonly weight: number; readonly set: LiveSet | null };

export type RunningExperiment = {
  readonly id: string;
  /** Whose it is: ids are their owners' own. */
  readonly owner: string;
  readonly scope: Scope;
  readonly sticky: StickyKind;
  readonly arms: readonly Arm[];
  /** The share of its requests to compare with the dense model. */
  readonly shadowShare: number;
};

export type Assignment = {
  readonly experiment: string;
  readonly experimentOwner: string;
  readonly variant: string;
  readonly region: string;
  /** Null: in no experiment, so what is live counts. */
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
  /** Without the suffix that asks for dense. */
  readonly model: string;
  readonly place: Place;
  readonly region: string;
  readonly source: StickySource;
  /** Whether a mask set holds for the model that is asked for. */
  readonly isUsable: (set: LiveSet) => boolean;
};

/**
 * A request takes part only if every arm could serve it: a request that is turned away from some arms and not from
 * others would make the arms' requests different in kind.
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
 * The started experiments, kept in the isolate with their mask sets decoded: assigning never waits for D1, and
 * an experiment is known only when every one of its variants could be served.
 */

export interface RunningExperiments {
  /** Those that are started, and those that will start: their times are compared with the clock at each request. */
  list(hold: Hold): Promise<readonly RunningExperiment[]>;
  /** The same at once; undefined when it takes a question, to be asked by `list`. */
  fresh(): readonly RunningExperiment[] | undefined;
  /** Reads them now: after a start or stop the same isolate acts on it at once. */
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
    fresh: () => cache.fresh(KEY),
    // While nothing is known of them, requests are served what is live.
    list: async (hold) => (await cache.get(KEY, hold).catch(() => null)) ?? [],
    async refresh(hold) {
      await cache.refresh(KEY, hold);
    },
  };
}

/**
 * Null for one whose set cannot be read: it must not take the others with it. Sets are read one after the other, since
 * the text of one has up to 2 MB and takes several times that while it is decoded.
 */
async function toRunning(
  experiment: StoredExperiment,
  table: Pick<RoutingTable, 'versionOf'>,
  held: HeldSets,
): Promise<RunningExperiment | null> {
  const { id, owner, definition } = experiment;
  try {
    const arms: RunningExperiment['arms'][number][] = [];
    for (const { name, weight, mask_set } of definition.variants) {
      const set = mask_set === DENSE_VARIANT ? null : await table.versionOf(owner, mask_set, held);
      arms.push({ name, weight, set });
    }
    const { sticky, shadow_share: shadowShare } = definition;
    return { id, owner, scope: scopeOf(experiment), sticky, arms, shadowShare };
  } catch (error) {
    if (!(error instanceof z.ZodError) && !(error instanceof SyntaxError)) throw error;
    log('error', 'experiment_unusable', { experiment: id, reason: reasonOf(error) });
    return null;
  }
}
