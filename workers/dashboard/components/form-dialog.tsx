/** A form in a dialog: sent when it is complete, open with the reason when the edge refuses it. */
import type { ComponentChildren } from 'preact';
import { useId } from 'preact/hooks';
import { useAttempt } from '../use-attempt.ts';
import { Dialog } from './dialog.tsx';
import { Failure } from './notice.tsx';

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
  return (
    <Dialog
      title={props.title}
      onClose={props.onClose}
      footer={
        <>
          <button type="button" class="secondary" onClick={props.onClose}>
            Cancel
          </button>
          <button type="submit" form={formId} aria-busy={busy} disabled={busy}>
            {props.action}
          </button>
        </>
      }
    >
      <form id={formId} onSubmit={submit}>
        {props.children}
      </form>
      {error !== undefined && <Failure error={error} />}
    </Dialog>
  );
}
