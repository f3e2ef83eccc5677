/** The jobs of one backend: how far they are, how they end, and what is done with what they learned. */

import { useState } from 'preact/hooks';
import { listSchema } from '../../../shared/admin/admin-wire.ts';
import { isFinished, type Job, jobSchema } from '../../../shared/admin/job-wire.ts';
import { maskSetSummarySchema } from '../../../shared/admin/publication-wire.ts';
import { admin, query } from '../api.ts';
import { ForChange, RowButton, Search } from '../components/controls.tsx';
import { Confirm, FormDialog } from '../components/dialog.tsx';
import { Loaded, Notice } from '../components/notice.tsx';
import { Table } from '../components/table.tsx';
import { useAddress, useLoad, useScope } from '../hooks.ts';
import { percent, shortVersion, when, whose } from '../look.ts';
import { Schedules } from './backend-schedules.tsx';
import { JobFields, jobIn } from './job-form.tsx';

const REFRESH_ms = 2_000;

type Open = { readonly what: 'new' } | { readonly what: 'cancel' | 'store'; readonly id: string };

export function Jobs({ backend }: { readonly backend: string }) {
  const { tenant } = useScope();
  const [open, setOpen] = useState<Open>();
  const [stored, setStored] = useState<string>();
  const path = `/backends/${backend}/jobs`;
  const [q, setQ] = useAddress('job', '');
  const jobs = useLoad(
    ['jobs', backend, q],
    (signal) => admin(listSchema(jobSchema), path + query({ q: q || undefined }), { signal }),
    REFRESH_ms,
  );
  const close = () => setOpen(undefined);
  return (
    <section aria-label={`Jobs of ${backend}`}>
      <div class="row spread">
        <h2>Jobs of {backend}</h2>
        <ForChange>
          <button type="button" onClick={() => setOpen({ what: 'new' })}>
            Learn masks
          </button>
        </ForChange>
      </div>
      {stored !== undefined && (
        <Notice kind="info">
          {stored} is stored for {whose(tenant)}: the Releases page makes it live.
        </Notice>
      )}
      <Search title="Search jobs: an id, a name, a model or a state" value={q} onSearch={setQ} />
      <Loaded load={jobs}>{({ data }) => <List jobs={data} q={q} onOpen={setOpen} />}</Loaded>
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
            What <code>{open.id}</code> has found so far is lost.
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
          <p>For {whose(tenant)}. Nothing goes live by that.</p>
        </Confirm>
      )}
    </section>
  );
}

function List(props: {
  readonly jobs: readonly Job[];
  readonly q: string;
  readonly onOpen: (open: Open) => void;
}) {
  return (
    <Table
      caption="Jobs, the newest first"
      empty={props.q === '' ? 'No jobs on this backend yet.' : `Nothing matches “${props.q}”.`}
      rows={props.jobs}
      rowKey={({ id }) => id}
      columns={[
        { title: 'Job', cell: ({ id }) => <code title={id}>{id.slice(0, 12)}</code> },
        { title: 'Name', cell: ({ request }) => request.name ?? 'learned' },
        { title: 'Model', cell: ({ request }) => request.model ?? '–' },
        { title: 'Clusters', cell: ({ request }) => request.clusters, isNumber: true },
        { title: 'Blocks skipped', cell: ({ request }) => percent(request.sparsity), isNumber: true },
        { title: 'Created', cell: ({ created_at }) => when(created_at) },
        { title: 'State', cell: (job) => <State job={job} /> },
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

function State({ job: { status, progress, error, result, id } }: { readonly job: Job }) {
  if (progress !== null) {
    const { stage, done, total, left_s, detail } = progress;
    const left = left_s === null ? '' : `, ${duration(left_s)} left`;
    return (
      <>
        <progress max={total} value={done} aria-label={`${id}: ${stage}`} /> {stage}
        {detail !== '' && `, ${detail}`}
        {left}
      </>
    );
  }
  if (error !== null) return <>failed: {error}</>;
  if (result !== null) return <code title={result.version}>{shortVersion(result.version)}</code>;
  return <>{status}</>;
}

const duration = (s: number): string => (s < 90 ? `${Math.ceil(s)} s` : `${Math.round(s / 60)} min`);
