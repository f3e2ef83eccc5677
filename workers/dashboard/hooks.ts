/** What the components of every page share: loading, acting, and what is in view. */

import { createContext } from 'preact';
import { useCallback, useContext, useEffect, useState } from 'preact/hooks';
import type { Session } from '../../shared/admin/admin-wire.ts';
import { type PublicationInUse, publicationInUseSchema } from '../../shared/admin/publication-wire.ts';
import { type MaskSet, maskSetSchema } from '../../shared/mask/mask-set.ts';
import { admin, noneIfNotFound, query } from './api.ts';

export type Load<T> =
  | { readonly state: 'loading' }
  | { readonly state: 'failed'; readonly error: Error }
  | { readonly state: 'ready'; readonly data: T };

/**
 * Loads when what it depends on changes, on demand, and every so often. While it loads again, the last data stays: a page
 * that refreshes does not flicker.
 */
export function useLoad<T>(
  load: (signal: AbortSignal) => Promise<T>,
  dependencies: readonly unknown[],
  every_ms?: number,
): Load<T> & { readonly reload: () => void } {
  const [round, setRound] = useState(0);
  const [current, setCurrent] = useState<Load<T>>({ state: 'loading' });
  const reload = useCallback(() => setRound((before) => before + 1), []);
  useEffect(() => setCurrent({ state: 'loading' }), dependencies);
  useEffect(() => {
    const controller = new AbortController();
    load(controller.signal).then(
      (data) => controller.signal.aborted || setCurrent({ state: 'ready', data }),
      (error) => controller.signal.aborted || setCurrent({ state: 'failed', error }),
    );
    const timer = every_ms === undefined ? undefined : setTimeout(reload, every_ms);
    return () => {
      controller.abort();
      clearTimeout(timer);
    };
  }, [...dependencies, round]);
  return { ...current, reload };
}

/* An action that the edge may refuse: busy while it runs; when it failed, why, and it can be tried again. */

export function useAttempt(): {
  readonly busy: boolean;
  readonly error: Error | undefined;
  /** After success it stays busy: what was acted on goes away. */
  attempt(act: () => Promise<void>): Promise<void>;
} {
  const [error, setError] = useState<Error>();
  const [busy, setBusy] = useState(false);
  return {
    busy,
    error,
    async attempt(act) {
      setBusy(true);
      try {
        await act();
      } catch (thrown) {
        setError(thrown as Error);
        setBusy(false);
      }
    },
  };
}

/* What every page needs to know: who looks, and at which tenant. */

type Scope = {
  readonly session: Session;
  /** A tenant's id; empty for the default that tenants without their own use. */
  readonly tenant: string;
  /** Whether the session manages all tenants. */
  readonly isGlobal: boolean;
};

export const ScopeContext = createContext<Scope | undefined>(undefined);

export function useScope(): Scope {
  const scope = useContext(ScopeContext);
  if (scope === undefined) throw new Error('there is no session here');
  return scope;
}

/* The mask set that the requests of the tenant in view are routed by: its own, or the default one. */

export type LiveSet = { readonly publication: PublicationInUse; readonly set: MaskSet };

/** Null when nothing is live. */
export function useLiveSet(): Load<LiveSet | null> & { readonly reload: () => void } {
  const { tenant } = useScope();
  return useLoad((signal) => loadLive(tenant, signal), [tenant]);
}

async function loadLive(tenant: string, signal: AbortSignal): Promise<LiveSet | null> {
  const publication = await publicationInUse(tenant, signal);
  if (publication === null) return null;
  const path = `/mask-sets/${publication.version}${query({ tenant })}`;
  return { publication, set: await admin(maskSetSchema, path, { signal }) };
}

/** Null when nothing is live. @throws ApiError */
export async function publicationInUse(
  tenant: string,
  signal: AbortSignal,
): Promise<PublicationInUse | null> {
  const path = `/publications/in-use${query({ tenant })}`;
  return await admin(publicationInUseSchema, path, { signal }).catch(noneIfNotFound);
}
