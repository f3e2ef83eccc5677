/** The audit log: who changed what, when, from where, and the state before and after. */
import { type AuditEntry, auditEntrySchema } from '../../../shared/admin/admin-wire.ts';
import { query } from '../api.ts';
import { RowButton, useSearch } from '../components/controls.tsx';
import { Detail, Empty, Loaded } from '../components/dialog.tsx';
import { Facts, ListTable, LongText, When } from '../components/table.tsx';
import { useAddress, useAnswer, useList, useScope } from '../hooks.ts';
import { whenExactly } from '../look.ts';

const REFRESH_ms = 15_000;

export function Audit() {
  const { tenant } = useScope();
  const { q, search } = useSearch('Search: who, what, from where, or an x-request-id');
  const [shown, show] = useAddress('entry', '');
  const scope = { tenant: tenant || undefined };
  const list = useList(auditEntrySchema, '/audit', { ...scope, q }, { every_ms: REFRESH_ms });
  return (
    <>
      <p class="row">
        <a href={`/admin/v1/audit/export${query(scope)}`} download>
          Export as JSONL
        </a>
      </p>
      {shown !== '' && <Entry key={shown} id={shown} onClose={() => show('')} />}
      <ListTable
        caption="Changes by administrators"
        list={list}
        empty="No changes yet."
        search={search}
        rowKey={({ id }) => String(id)}
        columns={[
          { title: 'When', cell: ({ created_at }) => <When at={created_at} /> },
          { title: 'Who', cell: ({ actor }) => <code>{actor}</code> },
          { title: 'Action', cell: ({ action }) => action },
          { title: 'Target', cell: ({ target }) => <code>{target}</code> },
          { title: 'Tenant', cell: (row) => row.tenant || '–' },
          { title: 'From', cell: ({ address }) => address ?? 'unknown' },
          { title: 'Result', cell: ({ is_known }) => (is_known ? 'done' : 'unknown') },
          {
            title: 'Change',
            isActions: true,
            cell: ({ id, target }) => (
              <RowButton title="Open" reads about={`${id} ${target}`} onClick={() => show(String(id))} />
            ),
          },
        ]}
      />
    </>
  );
}

function Entry({ id, onClose }: { readonly id: string; readonly onClose: () => void }) {
  const found = useAnswer(auditEntrySchema, `/audit/${encodeURIComponent(id)}`);
  return (
    <Detail title={`Change ${id}`} onClose={onClose}>
      <Loaded load={found}>{(entry) => <Change entry={entry} />}</Loaded>
    </Detail>
  );
}

function Change({ entry }: { readonly entry: AuditEntry }) {
  return (
    <>
      <Facts
        facts={[
          ['What', `${entry.action} of ${entry.target}`],
          ['When', whenExactly(entry.created_at)],
          ['Who', entry.actor],
          ['From', entry.address ?? 'unknown'],
          ['x-request-id', entry.request_id],
        ]}
      />
      <div class="sides">
        <State title="Before" state={entry.before} none="It did not exist, or was not recorded." />
        <State
          title="After"
          state={entry.after}
          none={entry.is_known ? 'Nothing is left.' : 'The edge failed before it could write that down.'}
        />
      </div>
    </>
  );
}

function State(props: { readonly title: string; readonly state: unknown; readonly none: string }) {
  return (
    <div>
      <h3>{props.title}</h3>
      {props.state === null ? (
        <Empty>{props.none}</Empty>
      ) : (
        <LongText label={props.title} text={JSON.stringify(props.state, null, 2)} />
      )}
    </div>
  );
}
