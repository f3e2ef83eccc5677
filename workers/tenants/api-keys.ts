/**
 * API keys. Keys are looked up by their hash in D1 and cached in the isolate. An unknown key is refused while D1 can't
 * be reached: it fails closed.
 */
import type { ApiKeyKind } from '../../shared/admin/admin-wire.ts';
import type { RoutingPolicy } from '../../shared/embedding/encoder.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { randomHex, sha256Hex } from '../base/secrets.ts';
import { type SourceHealth, SwrCache } from '../base/swr-cache.ts';
import { log } from '../base/telemetry.ts';
import { type Hold, notNow, steadyNow_ms } from '../base/waiting.ts';
import type { KnownKey } from '../db/key-rows.ts';
import type { TenantPolicy } from '../db/tenant-rows.ts';
import { KEY_WATCH_ms, KEYS } from '../limits.ts';

export type Caller = {
  readonly keyId: string;
  /** SHA-256 of the key, for looking it up again. */
  readonly keySha256: string;
  readonly kind: ApiKeyKind;
  /** Empty for a key of kind `admin`. */
  readonly tenant: string;
  readonly routingPolicy: RoutingPolicy;
  readonly policy: TenantPolicy;
};

/** Keys are named by their SHA-256. */
export interface ApiKeys {
  /**
   * @throws MaskrouteError `invalid_api_key` for an unknown, revoked or expired key, `tenant_disabled`,
   * `configuration_unavailable` for a key never seen before while D1 can't be asked, and for one of a tenant whose limits
   * cannot be read: without them its requests would have none.
   */
  authenticate(sha256: string, hold: Hold): Promise<Caller>;
  /** Whether the key is cached, so that checking it needs no query. */
  isKnown(sha256: string): boolean;
  /** Drops the key from the cache, so that a revocation takes effect in this isolate at once. */
  forget(sha256: string): void;
}

const BEARER = /^Bearer +([\x21-\x7e]{1,2048}) *$/i;

/** @throws MaskrouteError `invalid_api_key` when the header is missing or malformed. */
export function bearerKey(authorization: string | null | undefined): string {
  const key = BEARER.exec(authorization ?? '')?.[1];
  if (key === undefined) {
    throw new MaskrouteError('invalid_api_key', 'Send an API key as "Authorization: Bearer <key>".');
  }
  return key;
}

const KEY_PREFIXES: Record<ApiKeyKind, string> = {
  tenant: 'mr_live_',
  viewer: 'mr_view_',
  tenant_admin: 'mr_tadm_',
  admin: 'mr_admin_',
};
const KEY_RANDOM_BYTES = 24;
const PREFIX_RANDOM_CHARS = 6;

/** A new key, its stored hash, and the prefix by which people recognise it. */
export function generateKey(kind: ApiKeyKind): { key: string; sha256: string; prefix: string } {
  const random = randomHex(KEY_RANDOM_BYTES);
  const key = KEY_PREFIXES[kind] + random;
  return { key, sha256: sha256Hex(key), prefix: KEY_PREFIXES[kind] + random.slice(0, PREFIX_RANDOM_CHARS) };
}

/* Ids of keys. The id of a key that is made in a rotation begins with the id of the first one, so that it names its holder, too. */

const ID_RANDOM_BYTES = 8;
const NEXT_ID_RANDOM_BYTES = 4;

export const newKeyId = (): string => `k_${randomHex(ID_RANDOM_BYTES)}`;
/** Random, so that of two rotations at once only one finds its own key. */
export const nextKeyId = (id: string): string => `${firstKeyId(id)}-${randomHex(NEXT_ID_RANDOM_BYTES)}`;
export const firstKeyId = (id: string): string => id.split('-', 1)[0]!;

/** `find` returns null for an unknown key. */
export function createApiKeys(
  find: (sha256: string) => Promise<KnownKey | null>,
  health: SourceHealth,
): ApiKeys {
  const load = async (sha256: string): Promise<KnownKey | null> => {
    const known = await find(sha256);
    const reason = known?.policy.unreadable ?? null;
    if (reason !== null) log('error', 'tenant_unreadable', { tenant: known?.tenant, reason });
    return known;
  };
  const cache = new SwrCache('API keys', load, KEYS, { health });
  return {
    async authenticate(sha256, hold) {
      const known = await cache.get(sha256, hold).catch((error) => {
        throw notNow('configuration_unavailable', 'API keys cannot be checked right now.', error);
      });
      if (known === null || known.revokedAt_ms !== null) throw invalidKey('The API key is not valid.');
      if (known.expiresAt_ms !== null && known.expiresAt_ms <= Date.now()) {
        throw invalidKey('The API key has expired.');
      }
      if (!known.policy.enabled) throw tenantDisabled();
      if (known.kind === 'tenant' && known.policy.unreadable !== null) throw limitsUnreadable(known.tenant);
      const { id: keyId, kind, tenant, routingPolicy, policy } = known;
      return { keyId, keySha256: sha256, kind, tenant, routingPolicy, policy };
    },
    isKnown: (sha256) => cache.holds(sha256),
    forget: (sha256) => cache.forget(sha256),
  };
}

/**
 * For long answers: returns a function that checks the key again from time to time, and throws once it no longer works.
 * It is called as chunks pass, so it needs no timer. While the database does not answer, the last known state is used.
 */
export function createKeyWatch(
  apiKeys: Pick<ApiKeys, 'authenticate'>,
  { keySha256 }: Caller,
  hold: Hold,
): () => Promise<void> {
  let checked_ms = steadyNow_ms();
  return async () => {
    const now_ms = steadyNow_ms();
    if (now_ms - checked_ms < KEY_WATCH_ms) return;
    checked_ms = now_ms;
    try {
      await apiKeys.authenticate(keySha256, hold);
    } catch (error) {
      if (error instanceof MaskrouteError && error.code !== 'configuration_unavailable') throw error;
    }
  };
}

export const tenantDisabled = (): MaskrouteError =>
  new MaskrouteError('tenant_disabled', 'This tenant is disabled.');

const limitsUnreadable = (tenant: string): MaskrouteError =>
  notNow(
    'configuration_unavailable',
    `The limits of the tenant ${tenant} cannot be read: its operator finds the reason in the log.`,
  );

const invalidKey = (message: string): MaskrouteError => new MaskrouteError('invalid_api_key', message);
