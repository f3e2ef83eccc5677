/** What went wrong, what is loading, what there is not. */
import type { ComponentChildren } from 'preact';
import { ApiError } from '../api.ts';
import type { Load } from '../hooks.ts';

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

/** Shows what was loaded, or how far loading is. */
export function Loaded<T>(props: {
  readonly load: Load<T> & { readonly reload: () => void };
  readonly children: (data: T) => ComponentChildren;
}) {
  const { load } = props;
  switch (load.state) {
    case 'loading':
      return <p aria-busy="true">Loading…</p>;
    case 'failed':
      return <Failure error={load.error} retry={load.reload} />;
    case 'ready':
      return <>{props.children(load.data)}</>;
  }
}
