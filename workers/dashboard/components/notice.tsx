/** What went wrong, what is loading, what there is not. */
import type { ComponentChildren } from 'preact';
import { ApiError } from '../api.ts';
import type { Loading, Stale } from '../hooks.ts';
import { time } from '../look.ts';

export function Failure({ error, retry }: { readonly error: Error; readonly retry?: () => void }) {
  const code = error instanceof ApiError ? error.code : undefined;
  return (
    <div class="notice failure" role="alert">
      <p>
        {error.message} {code !== undefined && <code>{code}</code>}
      </p>
      {retry !== undefined && (
        <button type="button" class="outline" onClick={retry}>
          Try again
        </button>
      )}
    </div>
  );
}

export function Notice({
  kind,
  children,
}: {
  readonly kind: 'info' | 'warning';
  readonly children: ComponentChildren;
}) {
  return (
    <div class={`notice ${kind}`} role={kind === 'warning' ? 'alert' : 'note'}>
      {children}
    </div>
  );
}

export const Empty = ({ children }: { readonly children: ComponentChildren }) => (
  <p class="empty">{children}</p>
);

/** Shows what was loaded, or how far loading is. What could not be loaded again stays, and says how old it is. */
export function Loaded<T>(props: {
  readonly load: Loading<T>;
  readonly children: (data: T) => ComponentChildren;
}) {
  const { load } = props;
  switch (load.state) {
    case 'loading':
      return <p aria-busy="true">Loading…</p>;
    case 'failed':
      return <Failure error={load.error} retry={load.reload} />;
    case 'ready':
      return (
        <>
          {load.stale !== null && <IsStale {...load.stale} retry={load.reload} />}
          {props.children(load.data)}
        </>
      );
  }
}

const IsStale = ({ error, since_ms, retry }: Stale & { readonly retry: () => void }) => (
  <div class="notice warning stale" role="status">
    <p>
      This is as of {time(since_ms)}. It could not be read again: {error.message}
    </p>
    <button type="button" class="small outline" onClick={retry}>
      Try again
    </button>
  </div>
);
