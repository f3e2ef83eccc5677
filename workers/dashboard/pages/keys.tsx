/** API keys: made (and shown this once), told apart by their first characters, revoked. */
import { useState } from 'preact/hooks';
import {
  API_KEY_KINDS,
  type ApiKey,
  type ApiKeyKind,
  apiKeySchema,
  type CreatedKey,
  createdKeySchema,
  listSchema,
} from '../../../shared/admin.ts';
import { admin, query } from '../api.ts';
import { Confirm, Dialog } from '../components/dialog.tsx';
import { FormDialog } from '../components/form-dialog.tsx';
import { Loaded } from '../components/notice.tsx';
import { Table } from '../components/table.tsx';
import { useScope } from '../context.ts';
import { when } from '../format.ts';
import { useLoad } from '../use-load.ts';

const KIND_NAMES: Record<ApiKeyKind, string> = {
  tenant: 'sends completions',
  tenant_admin: 'administrates its tenant',
  admin: 'administrates everything',
};

type Open =
  | { readonly what: 'form' }
  | { readonly what: 'created'; readonly key: CreatedKey }
  | { readonly what: 'revoke'; readonly key: ApiKey };

export function Keys() {
  const { tenant } = useScope();
  const [open, setOpen] = useState<Open>();
  const [isAll, setAll] = useState(false);
  const keys = useLoad(
    (signal) => admin(listSchema(apiKeySchema), `/keys${query({ tenant })}`, { signal }),
    [tenant],
  );
  return (
    <>
      <div class="row spread">
        <button type="button" onClick={() => setOpen({ what: 'form' })}>
          New key
        </button>
        <label>
          <input type="checkbox" checked={isAll} onChange={(event) => setAll(event.currentTarget.checked)} />
          Show keys that no longer work
        </label>
      </div>
      <Loaded load={keys}>
        {({ data }) => (
          <KeyTable
            keys={data.filter((key) => isAll || stateOf(key) === 'works')}
            onRevoke={(key) => setOpen({ what: 'revoke', key })}
          />
        )}
      </Loaded>
      {open !== undefined && <OpenDialog open={open} onOpen={setOpen} onChange={keys.reload} />}
    </>
  );
}

function KeyTable({
  keys,
  onRevoke,
}: {
  readonly keys: readonly ApiKey[];
  readonly onRevoke: (key: ApiKey) => void;
}) {
  return (
    <Table
      caption="API keys"
      rows={keys}
      rowKey={({ id }) => id}
      columns={[
        { title: 'Key', cell: (key) => <code>{key.prefix}…</code> },
        { title: 'Name', cell: (key) => key.name },
        { title: 'Tenant', cell: (key) => key.tenant || '–' },
        { title: 'What for', cell: (key) => KIND_NAMES[key.kind] },
        { title: 'Made', cell: (key) => when(key.created_at) },
        { title: 'Expires', cell: (key) => (key.expires_at === null ? 'never' : when(key.expires_at)) },
        {
          title: 'State',
          cell: (key) =>
            stateOf(key) === 'works' ? (
              <button type="button" class="small outline" onClick={() => onRevoke(key)}>
                Revoke <span class="hidden">{key.prefix}</span>
              </button>
            ) : (
              stateOf(key)
            ),
        },
      ]}
    />
  );
}

function stateOf(key: ApiKey): 'works' | 'revoked' | 'expired' {
  if (key.revoked_at !== null) return 'revoked';
  return key.expires_at !== null && Date.parse(key.expires_at) <= Date.now() ? 'expired' : 'works';
}

function OpenDialog(props: {
  readonly open: Open;
  readonly onOpen: (open: Open | undefined) => void;
  readonly onChange: () => void;
}) {
  const { open, onOpen, onChange } = props;
  const close = () => onOpen(undefined);
  switch (open.what) {
    case 'form':
      return (
        <NewKey onCreated={(key) => onOpen({ what: 'created', key })} onClose={close} onChange={onChange} />
      );
    case 'created':
      return <ShowOnce created={open.key} onClose={close} />;
    case 'revoke':
      return (
        <Confirm
          title="Revoke this key?"
          action="Revoke"
          onClose={close}
          act={async () => {
            await admin(apiKeySchema, `/keys/${open.key.id}`, { method: 'DELETE' });
            onChange();
          }}
        >
          <p>
            <code>{open.key.prefix}…</code> ({open.key.name}) stops working within seconds, for good.
          </p>
        </Confirm>
      );
  }
}

function NewKey(props: {
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

function ShowOnce({ created, onClose }: { readonly created: CreatedKey; readonly onClose: () => void }) {
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
