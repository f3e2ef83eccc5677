/** API keys: made (and shown this once), told apart by their first characters, revoked. */
import { useState } from 'preact/hooks';
import { type ApiKey, apiKeySchema, type CreatedKey, listSchema } from '../../../shared/admin.ts';
import { admin, query } from '../api.ts';
import { Confirm } from '../components/dialog.tsx';
import { Loaded } from '../components/notice.tsx';
import { Table } from '../components/table.tsx';
import { useScope } from '../context.ts';
import { when } from '../format.ts';
import { KIND_NAMES, NewKey, RotateKey, ShowOnce } from '../keys/dialogs.tsx';
import { useLoad } from '../use-load.ts';

type Open =
  | { readonly what: 'form' }
  | { readonly what: 'created'; readonly key: CreatedKey }
  | { readonly what: 'rotate' | 'revoke'; readonly key: ApiKey };

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
            onAct={(what, key) => setOpen({ what, key })}
          />
        )}
      </Loaded>
      {open !== undefined && <OpenDialog open={open} onOpen={setOpen} onChange={keys.reload} />}
    </>
  );
}

function KeyTable(props: {
  readonly keys: readonly ApiKey[];
  readonly onAct: (what: 'rotate' | 'revoke', key: ApiKey) => void;
}) {
  const button = (title: string, what: 'rotate' | 'revoke', key: ApiKey) => (
    <button type="button" class="small outline" onClick={() => props.onAct(what, key)}>
      {title} <span class="hidden">{key.prefix}</span>
    </button>
  );
  return (
    <Table
      caption="API keys"
      rows={props.keys}
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
              <>
                {key.replaced_by === null ? button('Rotate', 'rotate', key) : 'was rotated'}{' '}
                {button('Revoke', 'revoke', key)}
              </>
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
    case 'rotate':
      return (
        <RotateKey
          rotated={open.key}
          onCreated={(key) => onOpen({ what: 'created', key })}
          onClose={close}
          onChange={onChange}
        />
      );
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
