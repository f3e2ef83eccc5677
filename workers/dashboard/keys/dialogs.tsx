/** The dialogs about keys: a new one, one in another's place, and the only time that a key is shown. */
import { useState } from 'preact/hooks';
import {
  API_KEY_KINDS,
  type ApiKey,
  type ApiKeyKind,
  type CreatedKey,
  createdKeySchema,
  ROTATION_OVERLAP_MAX_s,
} from '../../../shared/admin.ts';
import { admin } from '../api.ts';
import { Dialog } from '../components/dialog.tsx';
import { FormDialog } from '../components/form-dialog.tsx';
import { useScope } from '../context.ts';

export const KIND_NAMES: Record<ApiKeyKind, string> = {
  tenant: 'sends completions',
  tenant_admin: 'administrates its tenant',
  admin: 'administrates everything',
};

export function RotateKey(props: {
  readonly rotated: ApiKey;
  readonly onCreated: (key: CreatedKey) => void;
  readonly onClose: () => void;
  readonly onChange: () => void;
}) {
  const { rotated } = props;
  return (
    <FormDialog
      title="Rotate this key?"
      action="Rotate"
      onClose={props.onClose}
      onSubmit={async (form) => {
        const body = { overlap_s: Math.round(Number(form.get('hours')) * 3600) };
        props.onCreated(
          await admin(createdKeySchema, `/keys/${rotated.id}/rotate`, { method: 'POST', body }),
        );
        props.onChange();
      }}
    >
      <p>
        A new key takes the place of <code>{rotated.prefix}…</code> ({rotated.name}). Both work until the old
        one ends.
      </p>
      <label>
        Hours until the old key ends
        <input
          name="hours"
          type="number"
          min={0}
          max={ROTATION_OVERLAP_MAX_s / 3600}
          step="any"
          defaultValue="1"
          required
        />
      </label>
    </FormDialog>
  );
}

export function NewKey(props: {
  readonly onCreated: (key: CreatedKey) => void;
  readonly onClose: () => void;
  readonly onChange: () => void;
}) {
  const { tenant, isGlobal } = useScope();
  const [kind, setKind] = useState<ApiKeyKind>('tenant');
  return (
    <FormDialog
      title="New key"
      action="Create"
      onClose={props.onClose}
      onSubmit={async (form) => {
        const expires = form.get('expires_at');
        const body = {
          ...Object.fromEntries(form),
          ...(expires === null ? {} : { expires_at: new Date(String(expires)).toISOString() }),
        };
        props.onCreated(await admin(createdKeySchema, '/keys', { method: 'POST', body }));
        props.onChange();
      }}
    >
      <label>
        Name
        <input name="name" required maxLength={200} />
      </label>
      <label>
        What for
        <select
          name="kind"
          value={kind}
          onChange={(event) => setKind(event.currentTarget.value as ApiKeyKind)}
        >
          {API_KEY_KINDS.filter((name) => isGlobal || name !== 'admin').map((name) => (
            <option key={name} value={name}>
              {KIND_NAMES[name]}
            </option>
          ))}
        </select>
      </label>
      {isGlobal && kind !== 'admin' && (
        <label>
          Tenant
          <input name="tenant" required defaultValue={tenant} />
        </label>
      )}
      <label>
        Expires (empty: never)
        <input name="expires_at" type="datetime-local" />
      </label>
    </FormDialog>
  );
}

export function ShowOnce({
  created,
  onClose,
}: {
  readonly created: CreatedKey;
  readonly onClose: () => void;
}) {
  const [isCopied, setCopied] = useState(false);
  const copy = async () => {
    await navigator.clipboard.writeText(created.key);
    setCopied(true);
  };
  return (
    <Dialog
      title="The new key"
      onClose={onClose}
      footer={
        <>
          <button type="button" class="secondary" onClick={copy}>
            {isCopied ? 'Copied' : 'Copy'}
          </button>
          <button type="button" onClick={onClose}>
            Done
          </button>
        </>
      }
    >
      <p>Keep it now: it is shown this once, and only its hash is stored.</p>
      <input
        readOnly
        value={created.key}
        aria-label="The new key"
        onFocus={(event) => event.currentTarget.select()}
      />
    </Dialog>
  );
}
