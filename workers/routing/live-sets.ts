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
import { completesAt_ms, type Rollout, seesNew, shareAt } from '../../shared/mask/sticky.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { createVerifier, isFor } from '../../shared/wire/service-token.ts';
import { createRoom, type SourceHealth, SwrCache } from '../base/swr-cache.ts';
import { log, reasonOf } from '../base/telemetry.ts';
import type { Hold } from '../base/waiting.ts';
import { type Database, d1 } from '../db/d1.ts';
import type { StoredMaskSet } from '../db/mask-set-rows.ts';
import { findLive, findPublication, type LiveState, type PublicationState } from '../db/publication-rows.ts';
import type { Config } from '../env.ts';
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
  readonly surrogate: boolean;
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
  findLive(tenant: string): Promise<Pick<LiveState, 'owner' | 'version' | 'schedule' | 'base'> | null>;
  findMaskSet(owner: string, version: string): Promise<StoredMaskSet | null>;
};

/** Sets that a caller already holds. A version names its content, so they are valid however old they are. */
export type HeldSets = readonly (LiveSet | null | undefined)[];

export interface RoutingTable {
  /**
   * The tenant's own live set, or the default one; null when nothing was ever published. During a rollout `stickyKey`
   * decides whether this request sees the new version; it is called only then.
   * @throws what D1 threw, only if the tenant is not cached (it is new here, or was evicted).
   */
  liveFor(tenant: string, stickyKey: () => string, hold: Hold): Promise<LiveSet | null>;
  /** The same without waiting; undefined when D1 must be asked, which `liveFor` does. */
  fresh(tenant: string, stickyKey: () => string): LiveSet | null | undefined;
  /** Age of this tenant's cached pointer; undefined if it is not cached. */
  age_ms(tenant: string): number | undefined;
  /** Reads a tenant's pointer now, so that this isolate serves a new publication at once. */
  refresh(tenant: string, hold: Hold): Promise<void>;
  /**
   * A stored set, decoded; D1 is not asked if it is cached or among `held`.
   * @throws MaskrouteError `not_found` when it is not stored, and what D1 threw.
   */
  versionOf(owner: string, version: string, held?: HeldSets): Promise<LiveSet>;
  /** A cached set that has this mask, if there is one. */
  findMask(id: string): { set: LiveSet; cluster: LiveCluster } | undefined;
}

/**
 * A tenant's newest publication, decoded. `rollout`: null once everyone sees it; until then some requests see `base`, and
 * null is nothing of the tenant's own.
 */
type Pointer = {
  readonly set: LiveSet;
  readonly rollout: { readonly schedule: Rollout; readonly base: LiveSet | null } | null;
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

  const load = async (tenant: string): Promise<Loaded> => {
    const live = await source.findLive(tenant);
    if (live === null) return { pointer: null };
    const before = pointers.peek(tenant)?.pointer;
    const held = [before?.set, before?.rollout?.base];
    // What is complete stays so, though the clock may be set back before the next load: its base is not at hand.
    const isComplete = completesAt_ms(live.schedule) <= Date.now();
    const [set, base] = await Promise.all([
      versionOf(live.owner, live.version, held),
      isComplete || live.base === null ? null : versionOf(live.base.owner, live.base.version, held),
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
    fresh(tenant, stickyKey) {
      const own = pointers.fresh(tenant);
      const shared = tenant === DEFAULT_TENANT ? own : pointers.fresh(DEFAULT_TENANT);
      if (own === undefined || shared === undefined) return undefined;
      return seenSet(own.pointer, stickyKey) ?? seenSet(shared.pointer, stickyKey);
    },
    async liveFor(tenant, stickyKey, hold) {
      const [own, shared] = await Promise.all([
        pointers.get(tenant, hold),
        tenant === DEFAULT_TENANT ? null : pointers.get(DEFAULT_TENANT, hold),
      ]);
      return seenSet(own?.pointer, stickyKey) ?? seenSet(shared?.pointer, stickyKey);
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
  [pointer?.set, pointer?.rollout?.base].filter((set) => set != null);

/** The objects, ids and labels of a cluster. */
const CLUSTER_BYTES = 500;

const bytesOf = ({ centroids, clusters }: LiveSet): number =>
  centroids.values.byteLength + CLUSTER_BYTES * clusters.length;

function seenSet(pointer: Pointer | null | undefined, stickyKey: () => string): LiveSet | null {
  if (pointer == null) return null;
  const { set, rollout } = pointer;
  const now_ms = Date.now();
  if (rollout === null || completesAt_ms(rollout.schedule) <= now_ms) return set;
  return seesNew(rollout.schedule, stickyKey(), now_ms) ? set : rollout.base;
}

/** @throws ZodError or SyntaxError when the stored text is not a mask set. */
export function decodeMaskSet(stored: Pick<StoredMaskSet, 'version' | 'content'>): LiveSet {
  const set = maskSetSchema.parse(JSON.parse(stored.content));
  return {
    version: stored.version,
    name: set.name,
    model: set.model,
    encoder: set.encoder,
    surrogate: set.surrogate,
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

/* The versions in use for a tenant, for the admin API; requests use the table above. */

type SeenPart = {
  /** Null: these run dense. */
  readonly publication: PublicationState | null;
  /** Share of the tenant's conversations. */
  readonly share: number;
};

/**
 * The publications that a tenant's conversations see: the newest one and, for those that do not see it, its base or the
 * default.
 */
export async function findSeen(db: Database, tenant: string, now_ms: number): Promise<SeenPart[]> {
  const newest = await d1(findLive(db, tenant));
  const share = newest === null ? 0 : shareAt(newest.schedule, now_ms);
  const parts: SeenPart[] = share === 0 ? [] : [{ publication: newest, share }];
  if (share < 1) {
    const before = newest?.previousId == null ? null : await d1(findPublication(db, newest.previousId));
    const rest =
      before !== null || tenant === DEFAULT_TENANT
        ? [{ publication: before, share: 1 }]
        : await findSeen(db, DEFAULT_TENANT, now_ms);
    parts.push(...rest.map((part) => ({ ...part, share: part.share * (1 - share) })));
  }
  return parts.sort((a, b) => b.share - a.share);
}

/*
 * Masks that clients name. A mask that no cached set has needs a database query (by the edge for a tenant with a
 * ceiling, else by the backend), and clients can make ids up. So unknown ids have a rate limit for each tenant; ids
 * that turned out to exist do not count.
 */

export interface NamedMasks {
  /**
   * Checks the rate limit; undefined when no check is needed.
   * @throws MaskrouteError `rate_limit_exceeded`.
   */
  enter(tenant: string, id: string): Promise<void> | undefined;
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
    enter: (tenant, id) =>
      id === DENSE_MASK_ID || known.has(id) || isHeld(id) ? undefined : burst.enter(`mask:${tenant}`),
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

/* Masks that backends ask for. */

/**
 * Authenticates backends that fetch masks, by a token that a backend signed for this edge with the scope `masks`. The
 * edge's own tokens for backends are refused, and so is the backend key. Replays are not detected: isolates do not
 * share used nonces, and a mask's content is the same every time. The result throws MaskrouteError `invalid_api_key`,
 * `expired_token`, or `configuration_unavailable` when `EDGE_URL` is not set.
 */
export function createMaskDoor({
  BACKEND_KEY,
  BACKEND_KEY_2,
  EDGE_URL,
}: Pick<Config, 'BACKEND_KEY' | 'BACKEND_KEY_2' | 'EDGE_URL'>): (token: string) => Promise<void> {
  const verify = createVerifier(
    [BACKEND_KEY, ...(BACKEND_KEY_2 === undefined ? [] : [BACKEND_KEY_2])],
    'edge',
  );
  return async (token) => {
    const claims = await verify(token, Math.floor(Date.now() / 1000));
    if (claims.scope !== 'masks') {
      throw new MaskrouteError('invalid_api_key', 'The service token is not for masks.');
    }
    if (EDGE_URL === undefined) {
      const message = 'This edge does not know its own address: EDGE_URL is not configured.';
      throw new MaskrouteError('configuration_unavailable', message);
    }
    if (!isFor(claims, EDGE_URL)) {
      throw new MaskrouteError('invalid_api_key', 'The service token is for another edge.');
    }
  };
}
