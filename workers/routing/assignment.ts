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
import { type StoredExperiment, scopeOf } from '../db/experiment-rows.ts';
import { log, reasonOf } from '../http/log.ts';
import type { Hold } from '../http/waiting.ts';
import { EXPERIMENTS } from '../limits.ts';
import type { HeldSets, LiveSet, RoutingTable } from './live-sets.ts';
import { createSwrCache, type SourceHealth } from './swr-cache.ts';

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
 * A request takes part only if every arm could serve it: one that is turned away from some arms and not from
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
  const cache = createSwrCache<readonly RunningExperiment[]>(
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
    health,
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

/*
 * Where a request came in: what experiments are limited to, answers are labelled with, and wrong keys are counted by.
 * Whoever stands before the worker says so, and anybody can write the same into a request. So nothing is believed unless
 * the operator says who stands there (`TRUSTED_FRONT`): on one machine nobody does.
 */

/** `cloudflare` replaces what clients send as `cf-connecting-ip`, and fills `request.cf`. */
export const FRONTS = ['none', 'cloudflare'] as const;
type Front = (typeof FRONTS)[number];

export const LOCAL_REGION = 'local';

const CODE = /^[A-Z0-9]{2,4}$/;

/** Continent, country and the data centre's code, as far as the front knows them. */
export function placeOf(request: Request, front: Front): Place {
  const cf = front === 'cloudflare' ? (request.cf as Record<string, unknown> | undefined) : undefined;
  const code = (name: string): string | undefined => {
    const value = cf?.[name];
    return typeof value === 'string' && CODE.test(value) ? value : undefined;
  };
  return { continent: code('continent'), country: code('country'), colo: code('colo') };
}

/** `EU/DE/FRA`, as far as it is known; else `local`. */
export function regionOf({ continent, country, colo }: Place): string {
  return [continent, country, colo].filter((part) => part !== undefined).join('/') || LOCAL_REGION;
}

/** The client's address, or its network where one customer has many addresses; undefined where nobody can be believed. */
export function networkOf(request: Request, front: Front): string | undefined {
  const address = front === 'cloudflare' ? request.headers.get('cf-connecting-ip') : null;
  return address === null ? undefined : addressGroup(address);
}

const GROUPS_OF_A_NETWORK = 4;
const GROUPS = 8;

/** An IPv6 customer has a network of 2^64 addresses, so its network is what counts. */
export function addressGroup(address: string): string {
  if (!address.includes(':')) return address;
  const [head = '', tail] = address.toLowerCase().split('::');
  const groups = (text: string) => text.split(':').filter((group) => group !== '');
  const [before, after] = [groups(head), groups(tail ?? '')];
  const zeros = Array<string>(Math.max(0, GROUPS - before.length - after.length)).fill('0');
  return [...before, ...zeros, ...after]
    .slice(0, GROUPS_OF_A_NETWORK)
    .map((group) => group.replace(/^0+(?=.)/, ''))
    .join(':');
}
