/**
 * Dashboard sessions: a signed token (a JWT, HS256) in place of the admin key, so that the browser does not store the
 * key. The signing key is derived from ADMIN_KEY (HKDF-SHA256, RFC 5869): changing ADMIN_KEY ends every session, once
 * ADMIN_KEY_2 no longer has the old key. D1 has the sessions that were ended early, single ones or all of a key.
 */
import { hkdf } from '@noble/hashes/hkdf.js';
import { sha256 } from '@noble/hashes/sha2.js';
import { bytesToHex, utf8ToBytes } from '@noble/hashes/utils.js';
import { sign, verify } from 'hono/jwt';
import { LRUCache } from 'lru-cache';
import { z } from 'zod';
import { ROLES } from '../../shared/admin/admin-wire.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { randomHex } from '../base/secrets.ts';
import { type SourceHealth, SwrCache } from '../base/swr-cache.ts';
import { type Hold, notNow } from '../base/waiting.ts';
import { d1 } from '../db/d1.ts';
import { keySubject, sessionSubject } from '../db/key-rows.ts';
import { SESSION_ENDS, SESSION_ENDS_KNOWN_MAX, SESSION_LIFETIME_s } from '../limits.ts';
import { tenantDisabled } from './api-keys.ts';

const INFO = 'maskroute dashboard session v1';
const KEY_BYTES = 32;
const CSRF_RANDOM_BYTES = 16;
const ID_RANDOM_BYTES = 12;

/** The token's payload, and what its short names mean. */
const claimsSchema = z
  .object({
    jti: z.string().min(ID_RANDOM_BYTES * 2),
    /** The id of the key that opened it, or `root`. */
    sub: z.string().min(1),
    /** The key's SHA-256, to find it again, so that revoking it ends its sessions; null for the root key. */
    key: z
      .string()
      .regex(/^[0-9a-f]{64}$/)
      .nullable(),
    /** The role of a sign-in without a key; null for keys. */
    grant: z.object({ role: z.enum(ROLES), tenant: z.string().nullable() }).nullable(),
    csrf: z.string().min(CSRF_RANDOM_BYTES * 2),
    /** `iat` has only seconds; a login right after all sessions were ended must not count as ended. */
    iat_ms: z.int(),
    exp: z.int(),
  })
  .transform(({ jti, sub, key, grant, csrf, iat_ms, exp }) => ({
    id: jti,
    actor: sub,
    keySha256: key,
    grant,
    csrf,
    issuedAt_ms: iat_ms,
    expiresAt_s: exp,
  }));
export type SessionClaims = Readonly<z.output<typeof claimsSchema>>;
export type Grant = NonNullable<SessionClaims['grant']>;

export interface Sessions {
  issue(
    actor: string,
    of: Pick<SessionClaims, 'keySha256' | 'grant'>,
  ): Promise<{ token: string; claims: SessionClaims }>;
  /**
   * The token's claims, whether its session was ended or not. @throws MaskrouteError `invalid_session`: forged,
   * malformed or too old.
   */
  verify(token: string): Promise<SessionClaims>;
  /**
   * @throws MaskrouteError `invalid_session` for a session that was ended, `tenant_disabled` when a grant's tenant is
   * disabled, `configuration_unavailable` when that cannot be checked.
   */
  requireLive(claims: SessionClaims, hold: Hold): Promise<void>;
  /**
   * Ends a session, in this isolate at once even if D1 fails. @throws MaskrouteError `configuration_unavailable`: it
   * continues in other isolates.
   */
  end(claims: SessionClaims): Promise<void>;
  /** Ends all sessions that a key, or `root`, has opened until now; returns that time. @throws as `end`. */
  endAll(actor: string): Promise<number>;
  /** Notes an end that D1 already has from a key's revocation or rotation, so that it takes effect here at once. */
  noteEndOfAll(actor: string, endedAt_ms: number): void;
}

/** Stored ends of sessions, and the state of tenants. */
type SessionStore = {
  /** When the subject was ended; 0: it was not. */
  findEnd(subject: string): Promise<number>;
  saveEnd(subject: string, endedAt_ms: number, over_ms: number): Promise<void>;
  isEnabled(tenant: string): Promise<boolean>;
};

/** The first key signs; sessions that another key signed stay valid. */
export function createSessions(
  adminKeys: readonly string[],
  store: SessionStore,
  health: SourceHealth,
): Sessions {
  const secrets = adminKeys.map((adminKey) =>
    bytesToHex(hkdf(sha256, utf8ToBytes(adminKey), undefined, utf8ToBytes(INFO), KEY_BYTES)),
  );
  const cache = new SwrCache('ended sessions', store.findEnd, SESSION_ENDS, { health });
  const enabled = new SwrCache('tenants of sessions', store.isEnabled, SESSION_ENDS, { health });
  const known = new LRUCache<string, number>({ max: SESSION_ENDS_KNOWN_MAX });
  const note = (subject: string, endedAt_ms: number): void => {
    known.set(subject, Math.max(endedAt_ms, known.get(subject) ?? 0));
  };
  const save = async (subject: string, endedAt_ms: number): Promise<void> => {
    note(subject, endedAt_ms);
    await d1(store.saveEnd(subject, endedAt_ms, endedAt_ms - SESSION_LIFETIME_s * 1000));
  };
  return {
    async issue(actor, { keySha256, grant }) {
      const now_ms = Date.now();
      const payload = {
        jti: randomHex(ID_RANDOM_BYTES),
        sub: actor,
        key: keySha256,
        grant,
        csrf: randomHex(CSRF_RANDOM_BYTES),
        iat_ms: now_ms,
        exp: Math.floor(now_ms / 1000) + SESSION_LIFETIME_s,
      };
      return { token: await sign(payload, secrets[0]!, 'HS256'), claims: claimsSchema.parse(payload) };
    },
    async verify(token) {
      try {
        const payload = await Promise.any(secrets.map((one) => verify(token, one, 'HS256')));
        return claimsSchema.parse(payload);
      } catch (error) {
        throw hasEnded(error);
      }
    },
    async requireLive({ id, actor, grant, issuedAt_ms }, hold) {
      const [session, key] = [sessionSubject(id), keySubject(actor)];
      const isEnded = (sessionEnd_ms = 0, keyEnd_ms = 0) => sessionEnd_ms > 0 || keyEnd_ms >= issuedAt_ms;
      // An end is final, so a known end needs no query.
      if (isEnded(known.get(session), known.get(key))) throw hasEnded();
      if (isEnded(cache.peek(session), cache.peek(key))) throw hasEnded();
      const [sessionEnd_ms, keyEnd_ms, isEnabled] = await Promise.all([
        cache.get(session, hold),
        cache.get(key, hold),
        grant?.tenant == null ? true : enabled.get(grant.tenant, hold),
      ]).catch((error) => {
        throw notNow('configuration_unavailable', 'Sessions cannot be checked right now.', error);
      });
      if (isEnded(sessionEnd_ms ?? 0, keyEnd_ms ?? 0)) throw hasEnded();
      if (isEnabled === false) throw tenantDisabled();
    },
    async end({ id }) {
      await save(sessionSubject(id), Date.now());
    },
    async endAll(actor) {
      const now_ms = Date.now();
      await save(keySubject(actor), now_ms);
      return now_ms;
    },
    noteEndOfAll: (actor, endedAt_ms) => note(keySubject(actor), endedAt_ms),
  };
}

const hasEnded = (cause?: unknown): MaskrouteError =>
  new MaskrouteError('invalid_session', 'The session has ended. Log in again.', { cause });
