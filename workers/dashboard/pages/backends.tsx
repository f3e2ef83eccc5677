/** Backends: where they are, whether they answer, how busy they are and which masks they hold hot. */
import { useState } from 'preact/hooks';
import { deletedSchema, listSchema } from '../../../shared/admin/admin-wire.ts';
import { backendSchema } from '../../../shared/wire/backend-load.ts';
import { admin, query } from '../api.ts';
import { ForChange, itemsIn, RowButton, Search } from '../components/controls.tsx';
import { Confirm, FormDialog } from '../components/dialog.tsx';
import { Failure, Loaded } from '../components/notice.tsx';
import { Table } from '../components/table.tsx';
import { useAddress, useLoad, useRetried } from '../hooks.ts';
import { when } from '../look.ts';
import { Jobs } from './backend-jobs.tsx';

const REFRESH_ms = 5_000;
const BREAKER = { closed: 'answers', open: 'does not answer', half_open: 'is being tried again' } as const;

type Open = { readonly what: 'add' } | { readonly what: 'remove'; readonly id: string };

export function Backends() {
  const [open, setOpen] = useState<Open>();
  const [shown, setShown] = useAddress('jobs', '');
  const { error, attempt } = useRetried();
  const [q, setQ] = useAddress('q', '');
  const backends = useLoad(
    ['backends', q],
    (signal) => admin(listSchema(backendSchema), `/backends${query({ q: q || undefined })}`, { signal }),
    REFRESH_ms,
  );
  const change = (id: string, enabled: boolean) =>
    attempt(async () => {
      await admin(backendSchema, `/backends/${id}`, { method: 'PATCH', body: { enabled } });
    });
  const close = () => setOpen(undefined);
  return (
    <>
      <ForChange>
        <button type="button" onClick={() => setOpen({ what: 'add' })}>
          New backend
        </button>
      </ForChange>
      {error !== undefined && <Failure error={error} />}
      <Search title="Search backends: an id, an address or a region" value={q} onSearch={setQ} />
      <Loaded load={backends}>
        {({ data }) => (
          <>
            <Table
              caption="Backends, as the part of the edge that answered knows them"
              empty={q === '' ? 'No backends yet.' : `Nothing matches “${q}”.`}
              rows={data}
              rowKey={({ id }) => id}
              columns={[
                { title: 'Id', cell: ({ id }) => <code>{id}</code> },
                { title: 'Address', cell: ({ url }) => url },
                { title: 'Regions', cell: ({ regions }) => regions.join(', ') },
                {
                  title: 'State',
                  cell: ({ enabled, state }) => (enabled ? BREAKER[state.breaker] : 'switched off'),
                },
                { title: 'Running', cell: ({ state }) => state.running ?? '–', isNumber: true },
                { title: 'Waiting', cell: ({ state }) => state.waiting ?? '–', isNumber: true },
                { title: 'Hot masks', cell: ({ state }) => state.hot_masks.length, isNumber: true },
                { title: 'Reported', cell: ({ state }) => when(state.reported_at) },
                { title: 'Weight', cell: ({ weight }) => weight, isNumber: true },
                {
                  title: 'Change',
                  cell: ({ id, enabled, created_at }) =>
                    created_at === null ? (
                      'from the configuration'
                    ) : (
                      <>
                        <RowButton
                          title={enabled ? 'Switch off' : 'Switch on'}
                          about={id}
                          onClick={() => change(id, !enabled)}
                        />{' '}
                        <RowButton
                          title="Remove"
                          about={id}
                          destroys
                          onClick={() => setOpen({ what: 'remove', id })}
                        />
                      </>
                    ),
                },
                {
                  title: 'Jobs',
                  isActions: true,
                  cell: ({ id }) => (
                    <RowButton title="Jobs" reads about={`of ${id}`} onClick={() => setShown(id)} />
                  ),
                },
              ]}
            />
            {data.some(({ id }) => id === shown) && <Jobs key={shown} backend={shown} />}
          </>
        )}
      </Loaded>
      {open?.what === 'add' && <NewBackend onClose={close} />}
      {open?.what === 'remove' && (
        <Confirm
          title="Remove this backend?"
          action={`Remove ${open.id}`}
          destroys
          onClose={close}
          act={async () => {
            await admin(deletedSchema, `/backends/${open.id}`, { method: 'DELETE' });
          }}
        >
          <p>
            <code>{open.id}</code> gets no new requests; what runs there ends as it would have.
          </p>
        </Confirm>
      )}
    </>
  );
}

function NewBackend({ onClose }: { readonly onClose: () => void }) {
  return (
    <FormDialog
      title="New backend"
      action="Add"
      onClose={onClose}
      onSubmit={async (form) => {
        const body = {
          id: form.get('id'),
          url: form.get('url'),
          regions: itemsIn(form, 'regions', /[\s,]+/),
          weight: Number(form.get('weight') ?? 1),
        };
        await admin(backendSchema, '/backends', { method: 'POST', body });
        onClose();
      }}
    >
      <label>
        Id
        <input name="id" required maxLength={63} />
      </label>
      <label>
        Address
        <input name="url" type="url" required placeholder="https://backend-eu.example.com" />
      </label>
      <label>
        Regions: continents, countries or data centres, or * for everywhere
        <input name="regions" defaultValue="*" required />
      </label>
      <label>
        Weight
        <input name="weight" type="number" min={0.01} max={100} step="any" defaultValue="1" required />
      </label>
    </FormDialog>
  );
}
