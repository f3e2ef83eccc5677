/** Modal dialogs that ask before something is changed; the browser keeps the focus inside. */
import type { ComponentChildren } from 'preact';
import { useEffect, useId, useRef } from 'preact/hooks';
import { useAttempt } from '../hooks.ts';
import { Failure } from './notice.tsx';

export function Dialog(props: {
  readonly title: string;
  readonly onClose: () => void;
  readonly children: ComponentChildren;
  readonly footer?: ComponentChildren;
}) {
  const ref = useRef<HTMLDialogElement>(null);
  const titleId = useId();
  useEffect(() => ref.current!.showModal(), []);
  return (
    <dialog ref={ref} aria-labelledby={titleId} onClose={props.onClose}>
      <article>
        <h2 id={titleId}>{props.title}</h2>
        {props.children}
        {props.footer !== undefined && <footer>{props.footer}</footer>}
      </article>
    </dialog>
  );
}

/** `act` runs when the person agrees; the dialog stays open with the reason when it fails. */
export function Confirm(props: {
  readonly title: string;
  readonly action: string;
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
  const button = (
    <button type="button" onClick={agree} aria-busy={busy} disabled={busy}>
      {props.action}
    </button>
  );
  return (
    <Question title={props.title} onClose={props.onClose} button={button} error={error}>
      {props.children}
    </Question>
  );
}

/** A form in a dialog: sent when it is complete, open with the reason when the edge refuses it. */
export function FormDialog(props: {
  readonly title: string;
  readonly action: string;
  /** Closes the dialog itself when all is well. Fields that were left empty are not in the form. */
  readonly onSubmit: (form: FormData) => Promise<void>;
  readonly onClose: () => void;
  readonly children: ComponentChildren;
}) {
  const formId = useId();
  const { busy, error, attempt } = useAttempt();
  const submit = (event: SubmitEvent) => {
    event.preventDefault();
    const form = new FormData(event.currentTarget as HTMLFormElement);
    for (const [name, value] of [...form]) if (value === '') form.delete(name);
    return attempt(() => props.onSubmit(form));
  };
  const button = (
    <button type="submit" form={formId} aria-busy={busy} disabled={busy}>
      {props.action}
    </button>
  );
  return (
    <Question title={props.title} onClose={props.onClose} button={button} error={error}>
      <form id={formId} onSubmit={submit}>
        {props.children}
      </form>
    </Question>
  );
}

function Question(props: {
  readonly title: string;
  readonly onClose: () => void;
  /** What goes on; the other one cancels. */
  readonly button: ComponentChildren;
  readonly error: Error | undefined;
  readonly children: ComponentChildren;
}) {
  const footer = (
    <>
      <button type="button" class="secondary" onClick={props.onClose}>
        Cancel
      </button>
      {props.button}
    </>
  );
  return (
    <Dialog title={props.title} onClose={props.onClose} footer={footer}>
      {props.children}
      {props.error !== undefined && <Failure error={props.error} />}
    </Dialog>
  );
}
