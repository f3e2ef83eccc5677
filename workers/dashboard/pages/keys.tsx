/** API keys: creating (a key is shown once), listing, rotating and revoking. */
import { useState } from 'preact/hooks';
import {
  API_KEY_KINDS,
  type ApiKey,
  type ApiKeyKind,
  apiKeySchema,
  type CreatedKey,
  createdKeySchema,
  ROTATION_OVERLAP_MAX_s,
} from '../../../shared/admin/admin-wire.ts';
import { admin, edgeNow_ms } from '../api.ts';
import {
  Choice,
  ForChange,
  NameField,
  RowButton,
  type SearchProps,
  TenantChoice,
  TimeField,
  timeIn,
  useSearch,
} from '../components/controls.tsx';
import { Confirm, Dialog, Failure, FormDialog } from '../components/dialog.tsx';
import { ListTable } from '../components/table.tsx';
import { type List, useAddressOf, useCopy, useList, useScope, useUnsaved } from '../hooks.ts';
import { tenantFilter, when } from '../look.ts';

const KIND_NAMES: Record<ApiKeyKind, string> = {
  tenant: 'sends completions',
  viewer: 'reads only',
  tenant_admin: 'administers its tenant',
  admin: 'administers everything',
};

type Open =
  | { readonly what: 'form' }
  | { readonly what: 'created'; readonly key: CreatedKey }
  | { readonly what: 'rotate' | 'revoke'; readonly key: ApiKey };

export function Keys() {
  const { tenant } = useScope();
  const [open, setOpen] = useState<Open>();
  const [shown, setShown] = useAddressOf('keys', ['working', 'all'] as const, 'working');
  const { q, search } = useSearch('Search keys: a name, a tenant, or how a key begins');
  const state = shown === 'working' ? shown : undefined;
  const keys = useList(apiKeySchema, '/keys', { tenant: tenant || undefined, state, q });
  return (
    <>
      <div class="row spread">
        <ForChange>
          <button type="button" onClick={() => setOpen({ what: 'form' })}>
            New key
          </button>
        </ForChange>
        <label>
          <input
            type="checkbox"
            checked={shown === 'all'}
            onChange={(event) => setShown(event.currentTarget.checked ? 'all' : 'working')}
          />
          Show expired and revoked keys
        </label>
      </div>
      <KeyTable keys={keys} search={search} onAct={(what, key) => setOpen({ what, key })} />
      {open !== undefined && <OpenDialog open={open} onOpen={setOpen} />}
    </>
  );
}

function KeyTable(props: {
  readonly keys: List<ApiKey>;
  readonly search: SearchProps;
  readonly onAct: (what: 'rotate' | 'revoke', key: ApiKey) => void;
}) {
  const { mayChange } = useScope();
  const button = (title: string, what: 'rotate' | 'revoke', key: ApiKey) => (
    <RowButton
      title={title}
      about={key.prefix}
      destroys={what === 'revoke'}
      onClick={() => props.onAct(what, key)}
    />
  );
  return (
    <ListTable
      caption="API keys"
      list={props.keys}
      search={props.search}
      rowKey={({ id }) => id}
      columns={[
        { title: 'Key', cell: (key) => <code>{key.prefix}…</code> },
        { title: 'Name', cell: (key) => key.name, sort: (key) => key.name },
        { title: 'Tenant', cell: (key) => key.tenant || '–', sort: (key) => key.tenant },
        { title: 'Role', cell: (key) => KIND_NAMES[key.kind], sort: (key) => key.kind },
        { title: 'Created', cell: (key) => when(key.created_at), sort: (key) => key.created_at },
        { title: 'Expires', cell: (key) => (key.expires_at === null ? 'never' : when(key.expires_at)) },
        {
          title: 'State',
          isActions: true,
          cell: (key) => {
            if (stateOf(key) !== 'works') return stateOf(key);
            if (!mayChange) return key.replaced_by === null ? 'works' : 'was rotated';
            return (
              <>
                {key.replaced_by === null ? button('Rotate', 'rotate', key) : 'was rotated'}{' '}
                {button('Revoke', 'revoke', key)}
              </>
            );
          },
        },
      ]}
    />
  );
}

function stateOf(key: ApiKey): 'works' | 'revoked' | 'expired' {
  if (key.revoked_at !== null) return 'revoked';
  return key.expires_at !== null && Date.parse(key.expires_at) <= edgeNow_ms() ? 'expired' : 'works';
}

function OpenDialog(props: { readonly open: Open; readonly onOpen: (open: Open | undefined) => void }) {
  const { open, onOpen } = props;
  const close = () => onOpen(undefined);
  switch (open.what) {
    case 'form':
      return <NewKey onCreated={(key) => onOpen({ what: 'created', key })} onClose={close} />;
    case 'created':
      return <ShowOnce created={open.key} onClose={close} />;
    case 'rotate':
      return (
        <RotateKey rotated={open.key} onCreated={(key) => onOpen({ what: 'created', key })} onClose={close} />
      );
    case 'revoke':
      return (
        <Confirm
          title="Revoke this key?"
          action={`Revoke ${open.key.prefix}…`}
          destroys
          onClose={close}
          act={async () => {
            await admin(apiKeySchema, `/keys/${open.key.id}`, { method: 'DELETE' });
          }}
        >
          <p>
            <code>{open.key.prefix}…</code> ({open.key.name}) stops working within seconds, for good.{' '}
            {open.key.kind === 'tenant' ? 'Answers that stream under it end.' : 'Its dashboard sessions end.'}
          </p>
        </Confirm>
      );
  }
}

function RotateKey(props: {
  readonly rotated: ApiKey;
  readonly onCreated: (key: CreatedKey) => void;
  readonly onClose: () => void;
}) {
  const { rotated } = props;
  return (
    <FormDialog
      title="Rotate this key?"
      action="Rotate"
      onClose={props.onClose}
      onSubmit={async (form) => {
        const body = { overlap_s: Math.round(Number(form.get('overlap_s')) * 3600) };
        props.onCreated(
          await admin(createdKeySchema, `/keys/${rotated.id}/rotate`, { method: 'POST', body }),
        );
      }}
    >
      <p>
        A new key replaces <code>{rotated.prefix}…</code> ({rotated.name}). Both work until the old key
        expires.{rotated.kind !== 'tenant' && ' Dashboard sessions of the old key end at once.'}
      </p>
      <label>
        Hours until the old key expires
        <input
          name="overlap_s"
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

function NewKey(props: { readonly onCreated: (key: CreatedKey) => void; readonly onClose: () => void }) {
  const { tenant, isGlobal } = useScope();
  const [kind, setKind] = useState<ApiKeyKind>('tenant');
  const [owner, setOwner] = useState(tenant);
  return (
    <FormDialog
      title="New key"
      action="Create"
      onClose={props.onClose}
      onSubmit={async (form) => {
        const body = { ...Object.fromEntries(form), ...timeIn(form, 'expires_at') };
        props.onCreated(await admin(createdKeySchema, '/keys', { method: 'POST', body }));
      }}
    >
      <NameField />
      <Choice
        name="kind"
        title="Role"
        value={kind}
        options={API_KEY_KINDS.filter((name) => isGlobal || name !== 'admin').map((name) => [
          name,
          KIND_NAMES[name],
        ])}
        onPick={setKind}
      />
      {isGlobal && kind !== 'admin' && (
        <TenantChoice
          name="tenant"
          title="Tenant"
          value={owner}
          {...(kind === 'viewer' ? { none: tenantFilter('') } : {})}
          onPick={setOwner}
        />
      )}
      <TimeField name="expires_at" title="Expires (empty: never)" />
    </FormDialog>
  );
}

function ShowOnce({ created, onClose }: { readonly created: CreatedKey; readonly onClose: () => void }) {
  useUnsaved(true);
  const { isCopied, error, copy } = useCopy();
  return (
    <Dialog
      title="The new key"
      // The key is shown only once, so Escape does not close the dialog.
      onEscape={() => undefined}
      footer={
        <>
          <button type="button" class="secondary" onClick={() => copy(created.key)}>
            {isCopied ? 'Copied' : 'Copy'}
          </button>
          <button type="button" onClick={onClose}>
            Done
          </button>
        </>
      }
    >
      <p>Copy it now: it is shown only once, as only its hash is stored.</p>
      <input
        readOnly
        value={created.key}
        aria-label="The new key"
        onFocus={(event) => event.currentTarget.select()}
      />
      {error !== undefined && <Failure error={error} />}
    </Dialog>
  );
}
