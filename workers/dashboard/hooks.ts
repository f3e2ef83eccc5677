/** Hooks that all pages share: loading, actions, the chosen tenant, and state in the URL. */

import { QueryClient, useInfiniteQuery, useQuery } from '@tanstack/preact-query';
import { createContext } from 'preact';
import { useCallback, useContext, useEffect, useMemo, useState } from 'preact/hooks';
import { useSearchParams } from 'wouter-preact';
import { z } from 'zod';
import { listSchema, type Session } from '../../shared/admin/admin-wire.ts';
import { type PublicationInUse, publicationInUseSchema } from '../../shared/admin/publication-wire.ts';
import { type MaskSet, maskSetSchema } from '../../shared/mask/mask-set.ts';
import { check } from '../../shared/wire/parse-body.ts';
import { admin, afterChange, noneIfNotFound, query } from './api.ts';

/** Old data, because reloading failed. */
export type Stale = { readonly error: Error; readonly since_ms: number };

type Load<T> =
  | { readonly state: 'loading' }
  | { readonly state: 'failed'; readonly error: Error }
  | { readonly state: 'ready'; readonly data: T; readonly stale: Stale | null };

export type Loading<T> = Load<T> & { readonly reload: () => void };

/**
 * Cached queries by key. A failed query keeps the last data. The first load is not retried: the error is shown at once
 * and the person may retry; pages that refresh retry by themselves.
 */
export const queries = new QueryClient({
  defaultOptions: { queries: { retry: false, networkMode: 'always' } },
});

// Any change may affect any open list.
afterChange(() => void queries.invalidateQueries());

/** `key`: identifies the data with everything that they depend on; equal keys share one load. */
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

/** The answer of the admin API at `path`. */
export const useAnswer = <T extends z.ZodType>(
  schema: T,
  path: string,
  every_ms?: number,
): Loading<z.output<T>> => useLoad(['answer', path], (signal) => admin(schema, path, { signal }), every_ms);

type Found<T> = {
  readonly data: T | undefined;
  readonly error: Error | null;
  readonly dataUpdatedAt: number;
};

function toLoad<T>({ data, error, dataUpdatedAt }: Found<T>): Load<T> {
  if (data === undefined) return error === null ? { state: 'loading' } : { state: 'failed', error };
  return { state: 'ready', data, stale: error === null ? null : { error, since_ms: dataUpdatedAt } };
}

/* Paginated lists: the first page at once, further pages on demand; the edge does the searching. */

export type List<T> = Loading<readonly T[]> & {
  /** Loads the next page; undefined when everything is loaded. */
  readonly more: (() => void) | undefined;
  readonly isLoadingMore: boolean;
  /** What and why, for each item that cannot be read: another version of the edge wrote it. */
  readonly unreadable: readonly string[];
};

const PAGE_ROWS = 100;

type ListKey = readonly ['list', path: string, Record<string, string | undefined>, from: string | undefined];

/** Whether two keys differ only in the search text; another tenant's list must not be shown as this one's. */
function isSearchOf(key: ListKey, other: ListKey): boolean {
  const withoutText = ([, path, values, from]: ListKey) =>
    JSON.stringify([path, { ...values, q: undefined }, from]);
  return withoutText(key) === withoutText(other);
}

type ListOptions = {
  /** Refresh interval; absent: never. */
  readonly every_ms?: number;
  /** The name of the cursor parameter. */
  readonly cursor?: 'before' | 'after';
  /** A start time that moves with the clock: `at` computes it for each request, `name` stays the same. */
  readonly from?: { readonly name: string; readonly at: () => string | undefined };
};

/** A list is identified by its path, its `values` and the name of its start. */
export function useList<T extends z.ZodType>(
  item: T,
  path: string,
  values: Record<string, string | undefined>,
  { every_ms, cursor = 'before', from }: ListOptions = {},
): List<z.output<T>> {
  const key: ListKey = ['list', path, values, from?.name];
  const found = useInfiniteQuery({
    queryKey: key,
    queryFn: ({ pageParam, signal }) =>
      admin(
        anyListSchema,
        path + query({ ...values, from: from?.at(), limit: PAGE_ROWS, [cursor]: pageParam }),
        {
          signal,
        },
      ),
    initialPageParam: undefined as string | undefined,
    getNextPageParam: (last) => last.next ?? undefined,
    // While a new search loads, the previous results stay in view.
    placeholderData: (before, of) => (of !== undefined && isSearchOf(of.queryKey, key) ? before : undefined),
    refetchInterval: every_ms ?? false,
  });
  const pages = found.data?.pages;
  const { data, unreadable } = useMemo(() => readItems(item, pages), [item, pages]);
  return {
    ...toLoad({ data, error: found.error, dataUpdatedAt: found.dataUpdatedAt }),
    reload: () => void found.refetch(),
    more: found.hasNextPage ? () => void found.fetchNextPage() : undefined,
    isLoadingMore: found.isFetchingNextPage,
    unreadable,
  };
}

const anyListSchema = listSchema(z.unknown());

/** An item that cannot be read does not hide the others; it is named by its id, if that can be read. */
export function readItems<T extends z.ZodType>(
  item: T,
  pages: readonly z.output<typeof anyListSchema>[] | undefined,
): { readonly data: z.output<T>[] | undefined; readonly unreadable: string[] } {
  const data: z.output<T>[] = [];
  const unreadable: string[] = [];
  for (const one of (pages ?? []).flatMap((page) => page.data)) {
    const read = check(item, one);
    if (read.kind === 'good') data.push(read.value);
    else unreadable.push(`${withIdSchema.safeParse(one).data?.id ?? 'one item'} (${read.message})`);
  }
  return { data: pages === undefined ? undefined : data, unreadable };
}

export const namedSchema = z.object({ id: z.string() });
/** Entries of the audit log have numbers. */
const withIdSchema = z.object({ id: z.union([z.string(), z.int()]) });

/* State in the URL, so that it can be bookmarked, shared and gone back to. */

/** A value of the URL's query by its name; the default is not written there. */
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

/** The same for a fixed set of values. */
export function useAddressOf<T extends string>(
  name: string,
  known: readonly T[],
  preset: T,
): [T, (value: T) => void] {
  const [value, set] = useAddress(name, preset);
  return [known.find((one) => one === value) ?? preset, set];
}

/* An action that may fail: busy while it runs; after a failure it has the error and can be retried. */

export function useAttempt(): {
  readonly busy: boolean;
  readonly error: Error | undefined;
  /** After success it stays busy, since its dialog or row disappears. */
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

/** The same for a button that stays and can be pressed again after success. */
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

/* What somebody typed and did not send yet: a session that ends must not take it away. */

let unsaved = 0;
export const hasUnsaved = (): boolean => unsaved > 0;

/** Says so for as long as the form is there. */
export function useUnsaved(isTouched: boolean): void {
  useEffect(() => {
    if (!isTouched) return;
    unsaved++;
    return () => void unsaved--;
  }, [isTouched]);
}

/** Copies a text to the clipboard. Call `forget` when the text changes. */
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
          // Without https there is no clipboard API.
          throw new Error('This browser does not allow the page to copy; it may with an https address.');
        }
        setCopied(true);
      }),
    forget: () => setCopied(false),
  };
}

/* The scope of every page: the session's rights, and the chosen tenant. */

type Scope = {
  readonly session: Session;
  /** A tenant's id; empty: all tenants, or the default mask set. */
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

/* The live mask set of the chosen tenant: its own, or the default. */

export type LiveSet = { readonly publication: PublicationInUse; readonly set: MaskSet };

/** Null when nothing is live. `version`: one of the versions in use during a rollout; else the most used one. */
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
  return { publication, set: await loadMaskSet(publication.version, tenant, signal) };
}

/** A stored set that the tenant may use. @throws ApiError */
export const loadMaskSet = (version: string, tenant: string, signal: AbortSignal): Promise<MaskSet> =>
  admin(maskSetSchema, `/mask-sets/${version}${query({ tenant })}`, { signal });

/** Null when nothing is live. @throws ApiError */
export async function publicationInUse(
  tenant: string,
  signal: AbortSignal,
): Promise<PublicationInUse | null> {
  const path = `/publications/in-use${query({ tenant })}`;
  return await admin(publicationInUseSchema, path, { signal }).catch(noneIfNotFound);
}
