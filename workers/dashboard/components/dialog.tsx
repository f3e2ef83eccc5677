/**
 * Modal dialogs (confirmations, forms, details) and notices (errors, loading, empty). The browser keeps the focus
 * inside a dialog. A poll that fails in the background does not change an open dialog, and Escape asks before it
 * discards what somebody typed.
 */
import type { ComponentChildren } from 'preact';
import { useEffect, useId, useRef, useState } from 'preact/hooks';
import { ApiError } from '../api.ts';
import { type Loading, type Stale, useAttempt, useUnsaved } from '../hooks.ts';
import { time } from '../look.ts';

export function Dialog(props: {
  readonly title: string;
  /** What Escape does. */
  readonly onEscape: () => void;
  /** Nothing behind it can be seen. */
  readonly covers?: boolean;
  readonly children: ComponentChildren;
  readonly footer?: ComponentChildren;
}) {
  const ref = useRef<HTMLDialogElement>(null);
  const titleId = useId();
  const onEscape = useRef(props.onEscape);
  onEscape.current = props.onEscape;
  useEffect(() => {
    const dialog = ref.current!;
    dialog.showModal();
    // Listens on the document: a pressed button that is busy has lost the focus.
    const onKey = (event: KeyboardEvent) => {
      // Of several the last one is above the others.
      const isTop = [...document.querySelectorAll('dialog')].at(-1) === dialog;
      if (event.key !== 'Escape' || !isTop) return;
      // Otherwise the browser closes the dialog at the second Escape, even if the cancel event is prevented.
      event.preventDefault();
      onEscape.current();
    };
    document.addEventListener('keydown', onKey);
    return () => {
      document.removeEventListener('keydown', onKey);
      // Closed, and not only removed, it gives the focus back to what opened it.
      dialog.close();
    };
  }, []);
  return (
    <dialog
      ref={ref}
      class={props.covers === true ? 'covers' : undefined}
      aria-labelledby={titleId}
      onCancel={(event) => {
        event.preventDefault();
        onEscape.current();
      }}
    >
      <article>
        <h2 id={titleId}>{props.title}</h2>
        {props.children}
        {props.footer !== undefined && <footer>{props.footer}</footer>}
      </article>
    </dialog>
  );
}

/** What another version of the edge, or a hand, wrote, and this one cannot read. */
export const Unreadable = (props: { readonly what: readonly string[]; readonly advice?: string }) =>
  props.what.length > 0 && (
    <div class="notice warning" role="status">
      <p>
        Another version of the edge wrote this, and this one cannot read it: {props.what.join('; ')}.{' '}
        {props.advice}
      </p>
    </div>
  );

/**
 * A confirmation. `act` runs when the person confirms; if it fails, the dialog stays open with the error. With
 * `destroys` the button is red.
 */
export function Confirm(props: {
  readonly title: string;
  readonly action: string;
  readonly destroys?: boolean;
  readonly act: () => Promise<void>;
  readonly onClose: () => void;
  readonly children: ComponentChildren;
}) {
  const { busy, error, attempt } = useAttempt();
  const agree = () =>
    attempt(async () => {
      await props.act();
      props.onClose();
    });
  // A sent request cannot be cancelled, and closing the dialog would hide its result.
  const leave = () => {
    if (!busy) props.onClose();
  };
  const footer = (
    <>
      <Cancel onClick={leave} busy={busy} />
      <button
        type="button"
        class={props.destroys === true ? 'danger' : undefined}
        onClick={agree}
        aria-busy={busy}
        disabled={busy}
      >
        {props.action}
      </button>
    </>
  );
  return (
    <Dialog title={props.title} onEscape={leave} footer={footer}>
      {props.children}
      {error !== undefined && <Failure error={error} />}
    </Dialog>
  );
}

/**
 * A form in a dialog; if the edge refuses it, the dialog stays open with the error. Fields have the names of the API, so that
 * the error can name them by their labels.
 */
export function FormDialog(props: {
  readonly title: string;
  readonly action: string;
  /** Whether the form's choices are loaded; it cannot be submitted before. Default: true. */
  readonly isReady?: boolean;
  /** Must close the dialog on success. `form` does not contain empty fields. */
  readonly onSubmit: (form: FormData) => Promise<void>;
  readonly onClose: () => void;
  readonly children: ComponentChildren;
}) {
  const formId = useId();
  const [isTouched, setTouched] = useState(false);
  useUnsaved(isTouched);
  const [asks, setAsks] = useState(false);
  const { busy, error, attempt } = useAttempt();
  const submit = (event: SubmitEvent) => {
    event.preventDefault();
    const element = event.currentTarget as HTMLFormElement;
    const form = new FormData(element);
    for (const [name, value] of [...form]) if (value === '') form.delete(name);
    return attempt(() =>
      props.onSubmit(form).catch((error: Error) => {
        error.message = inLabels(error.message, element);
        throw error;
      }),
    );
  };
  const leave = () => {
    if (busy) return;
    if (isTouched) setAsks(!asks);
    else props.onClose();
  };
  const footer = asks ? (
    <div role="alertdialog" aria-label="Discard your changes?" class="asks">
      <p>Discard your changes?</p>
      <button type="button" class="secondary" ref={(button) => button?.focus()} onClick={leave}>
        Keep editing
      </button>
      <button type="button" class="danger" onClick={props.onClose}>
        Discard
      </button>
    </div>
  ) : (
    <>
      <Cancel onClick={leave} busy={busy} />
      <button type="submit" form={formId} aria-busy={busy} disabled={busy || props.isReady === false}>
        {props.action}
      </button>
    </>
  );
  return (
    <Dialog title={props.title} onEscape={leave} footer={footer}>
      <form id={formId} onSubmit={submit} onInput={() => setTouched(true)}>
        {props.children}
      </form>
      {error !== undefined && <Failure error={error} />}
    </Dialog>
  );
}

/** What a message says of fields: a path before a colon, and names with underscores anywhere. */
const FIELDS = /(?<=^|; )[a-z_]+(?:[.[][\w.[\]]*)?(?=: )|\b[a-z]+(?:_[a-z]+)+\b/g;

const inLabels = (message: string, form: HTMLFormElement): string =>
  message.replace(FIELDS, (path) => {
    const names = path.match(/[a-z_]+/g) ?? [];
    return names.map((name) => labelOf(form.elements.namedItem(name))).findLast(Boolean) ?? path;
  });

/** The first words of a field's label, without its unit and what an empty field means. */
function labelOf(found: RadioNodeList | Element | null): string | undefined {
  const field = found instanceof RadioNodeList ? (found[0] as Element) : found;
  const title = field?.closest('.several')?.querySelector('legend') ?? field?.closest('label');
  const texts = [...(title?.childNodes ?? [])].filter(({ nodeType }) => nodeType === Node.TEXT_NODE);
  const text = texts.map(({ textContent }) => textContent).join('');
  return text.split(/[:,(]/, 1)[0]!.trim() || undefined;
}

const Cancel = ({ onClick, busy }: { readonly onClick: () => void; readonly busy: boolean }) => (
  <button type="button" class="secondary" onClick={onClick} disabled={busy}>
    Cancel
  </button>
);

/** The details of an item of a list, shown on its page until closed. */
export const Detail = (props: {
  readonly title: string;
  readonly onClose: () => void;
  readonly children: ComponentChildren;
}) => (
  <section aria-label={props.title} class="detail">
    <div class="row spread">
      <h2>{props.title}</h2>
      <button type="button" class="small outline" onClick={props.onClose}>
        Close
      </button>
    </div>
    {props.children}
  </section>
);

/* Notices. */

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

/** Shows loaded data, or the state of loading. If reloading fails, the old data stay, with their age. */
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
