/**
 * The routing table: live mask sets, decoded once for each version and cached in the isolate, and single masks that
 * clients and backends name. A request uses one `LiveSet` by reference, so it sees either the old or the new version
 * throughout.
 */
import { LRUCache } from 'lru-cache';
import { DEFAULT_TENANT } from '../../shared/admin/admin-wire.ts';
import { type Centroids, packCentroids } from '../../shared/mask/centroids.ts';
import { DENSE_MASK_ID, type MaskId, type SurrogatesId } from '../../shared/mask/mask.ts';
import {
  clusterSparsity,
  type EncoderSpec,
  heldOutAgreement,
  type MaskSet,
  maskSetSchema,
} from '../../shared/mask/mask-set.ts';
import { completesAt_ms, type Rollout, seesNew } from '../../shared/mask/sticky.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { check } from '../../shared/wire/parse-body.ts';
import { createRoom, type SourceHealth, SwrCache } from '../base/swr-cache.ts';
import { log, reasonOf } from '../base/telemetry.ts';
import type { Hold } from '../base/waiting.ts';
import type { StoredMaskSet } from '../db/mask-set-rows.ts';
import type { LiveState } from '../db/publication-rows.ts';
import { DECODED_SETS_BYTES_MAX, LIVE_SETS_BYTES_MAX, NAMED_MASKS_MAX, TABLE } from '../limits.ts';
import type { BurstLimit } from '../tenants/budgets.ts';

type LiveCluster = {
  readonly mask: MaskId;
  readonly bits: string;
  readonly sparsity: number;
  readonly label: string | undefined;
};

export type LiveSet = {
  readonly version: string;
  readonly name: string;
  readonly model: MaskSet['model'];
  readonly encoder: EncoderSpec;
  /** The table of surrogates for skipped blocks; undefined with plain skipping. */
  readonly surrogates: SurrogatesId | undefined;
  /** Agreement with the dense model on held-out text, 0 to 1; null if the set lacks it. */
  readonly agreement: number | null;
  readonly centroids: Centroids;
  readonly clusters: readonly LiveCluster[];
};

/** What the table reads from D1. */
type TableSource = {
  /** The newest publication of exactly this tenant, and its base, which requests see that do not see it yet. */
  findLive(
    tenant: string,
  ): Promise<Pick<LiveState, 'id' | 'owner' | 'version' | 'schedule' | 'base' | 'unreadable'> | null>;
  findMaskSet(owner: string, version: string): Promise<StoredMaskSet | null>;
};

/** Sets that a caller already holds. A version names its content, so they are valid however old they are. */
export type HeldSets = readonly (LiveSet | null | undefined)[];

export interface RoutingTable {
  /**
   * The tenant's own live set, or the default one; null when nothing was ever published. During a rollout `stickyKey`
   * decides whether this request sees the new version; it is called only then.
   * @throws what D1 threw, only if the tenant is not cached (it is new here, or was evicted); Error when this request sees
   * a set that cannot be read.
   */
  liveFor(tenant: string, stickyKey: () => string, hold: Hold): Promise<LiveSet | null>;
  /** Age of this tenant's cached pointer; undefined if it is not cached. */
  age_ms(tenant: string): number | undefined;
  /** Reads a tenant's pointer now, so that this isolate serves a new publication at once. */
  refresh(tenant: string, hold: Hold): Promise<void>;
  /**
   * A stored set, decoded; D1 is not asked if it is cached or among `held`.
   * @throws MaskrouteError `not_found` when it is not stored, `invalid_mask_set` when it cannot be read, and what D1 threw.
   */
  versionOf(owner: string, version: string, held?: HeldSets): Promise<LiveSet>;
  /** A cached set that has this mask, if there is one. */
  findMask(id: string): { set: LiveSet; cluster: LiveCluster } | undefined;
}

/** A stored set that this version of the edge cannot read: another version wrote it. */
const UNREADABLE = 'unreadable';
type SeenSet = LiveSet | typeof UNREADABLE;

/**
 * A tenant's newest publication, decoded. `rollout` is null once everyone sees `set`. Until then some requests see `base`, or
 * nothing of the tenant's own if that is null.
 */
type Pointer = {
  readonly set: SeenSet;
  readonly rollout: { readonly schedule: Rollout; readonly base: SeenSet | null } | null;
};
/** `pointer` null: the tenant has no publication of its own. */
type Loaded = { readonly pointer: Pointer | null };

export function createRoutingTable(
  source: TableSource,
  health?: SourceHealth,
  { decodedMax_bytes = DECODED_SETS_BYTES_MAX, liveMax_bytes = LIVE_SETS_BYTES_MAX } = {},
): RoutingTable {
  /** By owner and version: sets are immutable, so an entry is never wrong, only unused. */
  const decoded = new LRUCache<string, LiveSet>({ maxSize: decodedMax_bytes, sizeCalculation: bytesOf });

  const versionOf = async (owner: string, version: string, held: HeldSets = []): Promise<LiveSet> => {
    const key = `${owner}/${version}`;
    const known = decoded.get(key) ?? held.find((set) => set?.version === version);
    if (known != null) {
      if (!decoded.has(key)) decoded.set(key, known);
      return known;
    }
    const stored = await source.findMaskSet(owner, version);
    if (stored === null) throw new MaskrouteError('not_found', `There is no mask set ${version}.`);
    const set = decodeMaskSet(stored);
    decoded.set(key, set);
    log('info', 'mask_set_loaded', { owner, version: set.version, clusters: set.clusters.length });
    return set;
  };

  /** An unreadable set is no failure of D1: other requests of the tenant, and other tenants, must not wait for it. */
  const readOf = async (owner: string, version: string, held: HeldSets): Promise<SeenSet> => {
    try {
      return await versionOf(owner, version, held);
    } catch (error) {
      if (!isUnreadable(error)) throw error;
      log('error', 'mask_set_unreadable', { owner, version, reason: reasonOf(error) });
      return UNREADABLE;
    }
  };

  const load = async (tenant: string): Promise<Loaded> => {
    const live = await source.findLive(tenant);
    if (live === null) return { pointer: null };
    if (live.unreadable !== undefined) {
      log('error', 'publication_unreadable', { tenant, publication: live.id, reason: live.unreadable });
    }
    const before = pointers.peek(tenant);
    const held = before === undefined ? [] : setsOf(before);
    // What is complete stays so, though the clock may be set back before the next load: its base is not at hand.
    const isComplete = completesAt_ms(live.schedule) <= Date.now();
    const [set, base] = await Promise.all([
      readOf(live.owner, live.version, held),
      isComplete || live.base === null ? null : readOf(live.base.owner, live.base.version, held),
    ]);
    return { pointer: { set, rollout: isComplete ? null : { schedule: live.schedule, base } } };
  };

  const pointers = new SwrCache(
    'the routing table',
    (tenant) =>
      load(tenant).catch((error) => {
        log('error', 'routing_table_load_failed', { tenant, reason: reasonOf(error) });
        throw error;
      }),
    TABLE,
    { health, room: createRoom(liveMax_bytes, setsOf, bytesOf) },
  );

  return {
    async liveFor(tenant, stickyKey, hold) {
      const [own, shared] = await Promise.all([
        pointers.get(tenant, hold),
        tenant === DEFAULT_TENANT ? null : pointers.get(DEFAULT_TENANT, hold),
      ]);
      const seen = seenSet(own?.pointer, stickyKey) ?? seenSet(shared?.pointer, stickyKey);
      if (seen === UNREADABLE) throw new Error('the mask set that this request sees cannot be read');
      return seen;
    },
    age_ms: (tenant) => pointers.age_ms(tenant),
    async refresh(tenant, hold) {
      await pointers.refresh(tenant, hold);
    },
    versionOf,
    findMask(id) {
      for (const set of decoded.values()) {
        const cluster = set.clusters.find((candidate) => candidate.mask === id);
        if (cluster !== undefined) return { set, cluster };
      }
      return undefined;
    },
  };
}

const setsOf = ({ pointer }: Loaded): LiveSet[] =>
  [pointer?.set, pointer?.rollout?.base].filter((set) => set != null && set !== UNREADABLE);

/** The objects, ids and labels of a cluster. */
const CLUSTER_BYTES = 500;

const bytesOf = ({ centroids, clusters }: LiveSet): number =>
  centroids.values.byteLength + CLUSTER_BYTES * clusters.length;

function seenSet(pointer: Pointer | null | undefined, stickyKey: () => string): SeenSet | null {
  if (pointer == null) return null;
  const { set, rollout } = pointer;
  const now_ms = Date.now();
  if (rollout === null || completesAt_ms(rollout.schedule) <= now_ms) return set;
  return seesNew(rollout.schedule, stickyKey(), now_ms) ? set : rollout.base;
}

/** Whether a stored set cannot be read; else the database failed. */
export const isUnreadable = (error: unknown): boolean =>
  error instanceof SyntaxError || (error instanceof MaskrouteError && error.code === 'invalid_mask_set');

/** @throws SyntaxError, or MaskrouteError `invalid_mask_set`, when the stored text is none that this version of the edge reads. */
export function decodeMaskSet(stored: Pick<StoredMaskSet, 'version' | 'content'>): LiveSet {
  const read = check(maskSetSchema, JSON.parse(stored.content), 'the mask set');
  if (read.kind === 'bad') {
    const message = `Another version of the edge wrote ${stored.version}, and this one cannot read it: ${read.message}.`;
    throw new MaskrouteError('invalid_mask_set', message);
  }
  const set = read.value;
  return {
    version: stored.version,
    name: set.name,
    model: set.model,
    encoder: set.encoder,
    surrogates: set.surrogates as SurrogatesId | undefined,
    agreement: heldOutAgreement(set),
    centroids: packCentroids(set.clusters.map((cluster) => cluster.centroid)),
    clusters: set.clusters.map((cluster) => ({
      mask: cluster.mask as MaskId,
      bits: cluster.bits,
      sparsity: clusterSparsity(set, cluster),
      label: cluster.label,
    })),
  };
}

/*
 * Masks that clients name. A mask that no cached set has needs a database query (by the edge for a tenant with a
 * ceiling, else by the backend), and clients can make ids up. So unknown ids have a rate limit for each tenant; ids
 * that turned out to exist do not count.
 */

export interface NamedMasks {
  /** Counts a mask that is not known here. @throws MaskrouteError `rate_limit_exceeded`. */
  enter(tenant: string, id: string): Promise<void>;
  /** Notes that a backend knows the mask. */
  met(id: string): void;
  /** The mask's sparsity; null if it is unknown. */
  sparsityOf(id: string): Promise<number | null>;
}

export function createNamedMasks(
  burst: BurstLimit,
  isHeld: (id: string) => boolean,
  find: (id: string) => Promise<number | null>,
): NamedMasks {
  /** Known masks, with sparsities where they were read. An id is its content's hash, so entries never become stale. */
  const known = new LRUCache<string, { readonly sparsity: number | null }>({ max: NAMED_MASKS_MAX });
  return {
    async enter(tenant, id) {
      const isKnown = id === DENSE_MASK_ID || known.has(id) || isHeld(id);
      if (!isKnown) await burst.enter(`mask:${tenant}`);
    },
    met(id) {
      if (!known.has(id)) known.set(id, { sparsity: null });
    },
    async sparsityOf(id) {
      const sparsity = known.get(id)?.sparsity ?? (await find(id));
      if (sparsity !== null) known.set(id, { sparsity });
      return sparsity;
    },
  };
}
