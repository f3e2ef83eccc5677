/** Backends: where they are, whether they answer, how busy they are and which masks they hold hot. */
import { useState } from 'preact/hooks';
import { deletedSchema, listSchema } from '../../../shared/admin/admin-wire.ts';
import { isFinished, type Job, jobSchema } from '../../../shared/admin/job-wire.ts';
import { maskSetSummarySchema } from '../../../shared/admin/publication-wire.ts';
import { type BackendEntry, backendSchema } from '../../../shared/wire/backend-load.ts';
import { admin, query } from '../api.ts';
import { ForChange, IdField, itemsIn, RowButton, Search, useSearch } from '../components/controls.tsx';
import { Confirm, Detail, Failure, FormDialog, Loaded, Notice } from '../components/dialog.tsx';
import { emptyText, Table, Version } from '../components/table.tsx';
import { useAddress, useAnswer, useRetried, useScope } from '../hooks.ts';
import { duration, percent, unreadableHere, when, whose } from '../look.ts';
import { JobFields, jobIn, Schedules } from './backend-schedules.tsx';

const REFRESH_ms = 5_000;
const BREAKER = { closed: 'answers', open: 'does not answer', half_open: 'is being tried again' } as const;

type Open = { readonly what: 'add' } | { readonly what: 'remove'; readonly id: string };

export function Backends() {
  const [open, setOpen] = useState<Open>();
  const [shown, setShown] = useAddress('jobs', '');
  const { error, attempt } = useRetried();
  const { q, search } = useSearch('Search backends: an id, an address or a region');
  const backends = useAnswer(listSchema(backendSchema), `/backends${query({ q })}`, REFRESH_ms);
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
      <Search {...search} />
      <Loaded load={backends}>
        {({ data }) => (
          <>
            <BackendTable
              backends={data}
              q={q}
              onSwitch={change}
              onRemove={(id) => setOpen({ what: 'remove', id })}
              onShow={setShown}
            />
            {data.some(({ id }) => id === shown) && (
              <Jobs key={shown} backend={shown} onClose={() => setShown('')} />
            )}
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

function BackendTable(props: {
  readonly backends: readonly BackendEntry[];
  readonly q: string | undefined;
  readonly onSwitch: (id: string, enabled: boolean) => void;
  readonly onRemove: (id: string) => void;
  readonly onShow: (id: string) => void;
}) {
  return (
    <Table
      caption="Backends, as seen by the edge location that answered"
      empty={emptyText(props.q, 'No backends yet.')}
      rows={props.backends}
      rowKey={({ id }) => id}
      columns={[
        { title: 'Id', cell: ({ id }) => <code>{id}</code> },
        { title: 'Address', cell: ({ url }) => url },
        { title: 'Regions', cell: ({ regions }) => regions.join(', ') },
        {
          title: 'State',
          cell: ({ enabled, state, unreadable }) =>
            (enabled ? (unreadable === undefined ? BREAKER[state.breaker] : 'switched on') : 'switched off') +
            unreadableHere(unreadable),
        },
        { title: 'Running', cell: ({ state }) => state.running ?? '–', isNumber: true },
        { title: 'Waiting', cell: ({ state }) => state.waiting ?? '–', isNumber: true },
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
                  title={enabled ? 'Disable' : 'Enable'}
                  about={id}
                  onClick={() => props.onSwitch(id, !enabled)}
                />{' '}
                <RowButton title="Remove" about={id} destroys onClick={() => props.onRemove(id)} />
              </>
            ),
        },
        {
          title: 'Jobs',
          isActions: true,
          cell: ({ id }) => (
            <RowButton title="Jobs" reads about={`of ${id}`} onClick={() => props.onShow(id)} />
          ),
        },
      ]}
    />
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
      <IdField />
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

/* The jobs of one backend: how far they are, how they end, and what is done with what they learned. */

const JOBS_REFRESH_ms = 2_000;

type OpenJob = { readonly what: 'new' } | { readonly what: 'cancel' | 'store'; readonly id: string };

function Jobs({ backend, onClose }: { readonly backend: string; readonly onClose: () => void }) {
  const { tenant } = useScope();
  const [open, setOpen] = useState<OpenJob>();
  const [stored, setStored] = useState<string>();
  const path = `/backends/${backend}/jobs`;
  const { q, search } = useSearch('Search jobs: an id, a name, a model or a state', 'job');
  const jobs = useAnswer(listSchema(jobSchema), path + query({ q }), JOBS_REFRESH_ms);
  const close = () => setOpen(undefined);
  return (
    <Detail title={`Jobs of ${backend}`} onClose={onClose}>
      <ForChange>
        <button type="button" onClick={() => setOpen({ what: 'new' })}>
          Learn masks
        </button>
      </ForChange>
      {stored !== undefined && (
        <Notice kind="info">
          {stored} is stored for {whose(tenant)}. You can activate it on the Releases page.
        </Notice>
      )}
      <Search {...search} />
      <Loaded load={jobs}>{({ data }) => <JobList jobs={data} q={q} onOpen={setOpen} />}</Loaded>
      <Schedules backend={backend} />
      {open?.what === 'new' && (
        <FormDialog
          title={`Learn masks on ${backend}`}
          action="Start"
          onClose={close}
          onSubmit={async (form) => {
            await admin(jobSchema, path, { method: 'POST', body: await jobIn(form, path) });
            close();
          }}
        >
          <JobFields />
        </FormDialog>
      )}
      {open?.what === 'cancel' && (
        <Confirm
          title="End this job?"
          action={`End ${open.id}`}
          destroys
          onClose={close}
          act={async () => {
            await admin(jobSchema, `${path}/${open.id}/cancel`, { method: 'POST' });
          }}
        >
          <p>
            The results of <code>{open.id}</code> so far are lost.
          </p>
        </Confirm>
      )}
      {open?.what === 'store' && (
        <Confirm
          title="Store this mask set?"
          action="Store"
          onClose={close}
          act={async () => {
            const call = { method: 'POST', body: { tenant } };
            setStored((await admin(maskSetSummarySchema, `${path}/${open.id}/store`, call)).version);
          }}
        >
          <p>It is stored for {whose(tenant)} and does not go live.</p>
        </Confirm>
      )}
    </Detail>
  );
}

function JobList(props: {
  readonly jobs: readonly Job[];
  readonly q: string | undefined;
  readonly onOpen: (open: OpenJob) => void;
}) {
  return (
    <Table
      caption="Jobs, newest first"
      empty={emptyText(props.q, 'No jobs on this backend yet.')}
      rows={props.jobs}
      rowKey={({ id }) => id}
      columns={[
        { title: 'Job', cell: ({ id }) => <code title={id}>{id.slice(0, 12)}</code> },
        { title: 'Name', cell: ({ request }) => request.name ?? 'learned' },
        { title: 'Model', cell: ({ request }) => request.model ?? '–' },
        { title: 'Clusters', cell: ({ request }) => request.clusters, isNumber: true },
        { title: 'Blocks skipped', cell: ({ request }) => percent(request.sparsity), isNumber: true },
        { title: 'Created', cell: ({ created_at }) => when(created_at) },
        { title: 'State', cell: (job) => <JobState job={job} /> },
        {
          title: 'Change',
          isActions: true,
          cell: (job) => {
            if (!isFinished(job)) {
              const cancel = () => props.onOpen({ what: 'cancel', id: job.id });
              return <RowButton title="End" about={job.id} onClick={cancel} destroys />;
            }
            if (job.result === null) return '–';
            const store = () => props.onOpen({ what: 'store', id: job.id });
            return <RowButton title="Store" about={job.result.version} onClick={store} />;
          },
        },
      ]}
    />
  );
}

function JobState({ job: { status, progress, error, result, id } }: { readonly job: Job }) {
  if (progress !== null) {
    const { stage, done, total, left_s, detail } = progress;
    const left = left_s === null ? '' : `, ${duration(1000 * left_s)} left`;
    return (
      <>
        <progress max={total} value={done} aria-label={`${id}: ${stage}`} /> {stage}
        {detail !== '' && `, ${detail}`}
        {left}
      </>
    );
  }
  if (error !== null)
    return (
      <>
        {status}: {error}
      </>
    );
  if (result !== null) return <Version of={result.version} />;
  return <>{status}</>;
}
