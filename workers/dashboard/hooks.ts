/** What the components of every page share: loading, acting, what is in view, and what the address says of it. */

import { QueryClient, useInfiniteQuery, useQuery } from '@tanstack/preact-query';
import { createContext } from 'preact';
import { useCallback, useContext, useMemo, useState } from 'preact/hooks';
import { useSearchParams } from 'wouter-preact';
import type { z } from 'zod';
import { listSchema, type Session } from '../../shared/admin/admin-wire.ts';
import { type PublicationInUse, publicationInUseSchema } from '../../shared/admin/publication-wire.ts';
import { type MaskSet, maskSetSchema } from '../../shared/mask/mask-set.ts';
import { admin, afterChange, noneIfNotFound, query } from './api.ts';

/** Data that is older than it should be, since asking for it again failed. */
export type Stale = { readonly error: Error; readonly since_ms: number };

type Load<T> =
  | { readonly state: 'loading' }
  | { readonly state: 'failed'; readonly error: Error }
  | { readonly state: 'ready'; readonly data: T; readonly stale: Stale | null };

export type Loading<T> = Load<T> & { readonly reload: () => void };

/**
 * What was loaded, by key. A failed question keeps the last data. A question that fails at first says so at once: the
 * person decides about a second try, and pages that refresh try by themselves.
 */
export const queries = new QueryClient({
  defaultOptions: { queries: { retry: false, networkMode: 'always' } },
});

// Whatever changes something may change what any open list shows.
afterChange(() => void queries.invalidateQueries());

/** `key` names what is loaded, all that it depends on included: two loads of one key are one. */
export function useLoad<T>(
  key: readonly unknown[],
  load: (signal: AbortSignal) => Promise<T>,
  every_ms?: number,
): Loading<T> {
  const found = useQuery({
    queryKey: key,
    queryFn: ({ signal }) => load(signal),
    refetchInterval: every_ms ?? false,
  });
  const reload = useCallback(() => void found.refetch(), [found.refetch]);
  return { ...toLoad(found), reload };
}

type Found<T> = {
  readonly data: T | undefined;
  readonly error: Error | null;
  readonly dataUpdatedAt: number;
};

function toLoad<T>({ data, error, dataUpdatedAt }: Found<T>): Load<T> {
  if (data === undefined) return error === null ? { state: 'loading' } : { state: 'failed', error };
  return { state: 'ready', data, stale: error === null ? null : { error, since_ms: dataUpdatedAt } };
}

/* Lists that have pages: the first at once, each further one on demand, and what is looked for is found by the edge. */

export type List<T> = Loading<readonly T[]> & {
  /** Undefined when all of it is here. */
  readonly more: (() => void) | undefined;
  readonly isLoadingMore: boolean;
};

const PAGE_ROWS = 100;

type ListKey = readonly ['list', path: string, Record<string, string | undefined>, from: string | undefined];

/** Whether it is the same list but for the text that is looked for: another tenant's must not be shown as this one's. */
function isSearchOf(key: ListKey, other: ListKey): boolean {
  const withoutText = ([, path, values, from]: ListKey) =>
    JSON.stringify([path, { ...values, q: undefined }, from]);
  return withoutText(key) === withoutText(other);
}

type ListOptions = {
  /** How often it is asked for again by itself; never unless given. */
  readonly every_ms?: number;
  /** What the list calls the place where a page begins. */
  readonly cursor?: 'before' | 'after';
  /** A beginning that moves on with the clock: `at` says where it is when the list is asked for, `name` stays the same. */
  readonly from?: { readonly name: string; readonly at: () => string | undefined };
};

/** A list is another one when its path, its `values` or the name of its beginning are others. */
export function useList<T extends z.ZodType>(
  item: T,
  path: string,
  values: Record<string, string | undefined>,
  { every_ms, cursor = 'before', from }: ListOptions = {},
): List<z.output<T>> {
  const schema = useMemo(() => listSchema(item), [item]);
  const key: ListKey = ['list', path, values, from?.name];
  const found = useInfiniteQuery({
    queryKey: key,
    queryFn: ({ pageParam, signal }) =>
      admin(schema, path + query({ ...values, from: from?.at(), limit: PAGE_ROWS, [cursor]: pageParam }), {
        signal,
      }),
    initialPageParam: undefined as string | undefined,
    getNextPageParam: (last) => last.next ?? undefined,
    // While a search is typed, what was found before stays in view.
    placeholderData: (before, of) => (of !== undefined && isSearchOf(of.queryKey, key) ? before : undefined),
    refetchInterval: every_ms ?? false,
  });
  const pages = found.data?.pages;
  const data = useMemo(() => pages?.flatMap((page) => page.data as z.output<T>[]), [pages]);
  return {
    ...toLoad({ data, error: found.error, dataUpdatedAt: found.dataUpdatedAt }),
    reload: () => void found.refetch(),
    more: found.hasNextPage ? () => void found.fetchNextPage() : undefined,
    isLoadingMore: found.isFetchingNextPage,
  };
}

/* What the address says, so that it can be kept, shared and gone back to. */

/** A value of the address by its name; the preset is not written there. */
export function useAddress(name: string, preset: string): [string, (value: string) => void] {
  const [params, setParams] = useSearchParams();
  const set = (value: string) =>
    setParams(
      (before) => {
        const after = new URLSearchParams(before);
        if (value === preset) after.delete(name);
        else after.set(name, value);
        return after;
      },
      { replace: true },
    );
  return [params.get(name) ?? preset, set];
}

/** The same where only some values mean anything. */
export function useAddressOf<T extends string>(
  name: string,
  known: readonly T[],
  preset: T,
): [T, (value: T) => void] {
  const [value, set] = useAddress(name, preset);
  return [known.find((one) => one === value) ?? preset, set];
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

/** The same for a button that stays: it can be pressed again after success, too. */
export function useRetried(): Pick<ReturnType<typeof useAttempt>, 'error' | 'attempt'> {
  const [error, setError] = useState<Error>();
  return {
    error,
    async attempt(act) {
      setError(undefined);
      await act().catch(setError);
    },
  };
}

/** For a button that copies a text; `forget` when there is another text to copy. */
export function useCopy() {
  const [isCopied, setCopied] = useState(false);
  const { error, attempt } = useRetried();
  return {
    isCopied,
    error,
    copy: (text: string) =>
      attempt(async () => {
        try {
          await navigator.clipboard.writeText(text);
        } catch {
          // Without TLS there is no clipboard at all.
          throw new Error(
            'This browser lets the page copy nothing; it may where the address begins with https.',
          );
        }
        setCopied(true);
      }),
    forget: () => setCopied(false),
  };
}

/* What every page needs to know: who looks, and at which tenant. */

type Scope = {
  readonly session: Session;
  /** A tenant's id; empty for all of them, and for the default that tenants without their own use. */
  readonly tenant: string;
  /** Whether the session manages all tenants. */
  readonly isGlobal: boolean;
  /** Whether the session may change anything. */
  readonly mayChange: boolean;
};

export const ScopeContext = createContext<Scope | undefined>(undefined);

export function useScope(): Scope {
  const scope = useContext(ScopeContext);
  if (scope === undefined) throw new Error('there is no session here');
  return scope;
}

/* The mask set that the requests of the tenant in view are routed by: its own, or the default one. */

export type LiveSet = { readonly publication: PublicationInUse; readonly set: MaskSet };

/** Null when nothing is live. `version`: of those that serve while a publication takes hold; else what most see. */
export function useLiveSet(version: string): Loading<LiveSet | null> {
  const { tenant } = useScope();
  return useLoad(['live set', tenant, version], (signal) => loadLive(tenant, version, signal));
}

async function loadLive(tenant: string, picked: string, signal: AbortSignal): Promise<LiveSet | null> {
  const found = await publicationInUse(tenant, signal);
  if (found === null) return null;
  const part = found.parts.find(({ version }) => version === picked);
  const publication =
    part?.version == null ? found : { ...found, version: part.version, tenant: part.tenant };
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
