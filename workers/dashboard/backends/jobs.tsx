/** The jobs of one backend: how far they are, how they end, and what is done with what they learned. */
import { useState } from 'preact/hooks';
import { listSchema, maskSetSummarySchema } from '../../../shared/admin.ts';
import { isFinished, type Job, jobSchema } from '../../../shared/jobs.ts';
import { admin } from '../api.ts';
import { Confirm } from '../components/dialog.tsx';
import { Loaded, Notice } from '../components/notice.tsx';
import { Table } from '../components/table.tsx';
import { useScope } from '../context.ts';
import { percent, shortVersion, tenantName, when } from '../format.ts';
import { useLoad } from '../use-load.ts';
import { NewJob } from './new-job.tsx';

const REFRESH_ms = 2_000;

type Open =
  | { readonly what: 'new' }
  | { readonly what: 'cancel'; readonly id: string }
  | { readonly what: 'store'; readonly id: string };

export function Jobs({ backend }: { readonly backend: string }) {
  const { tenant } = useScope();
  const [open, setOpen] = useState<Open>();
  const [stored, setStored] = useState<string>();
  const path = `/backends/${backend}/jobs`;
  const jobs = useLoad((signal) => admin(listSchema(jobSchema), path, { signal }), [backend], REFRESH_ms);
  const close = () => {
    setOpen(undefined);
    jobs.reload();
  };
  return (
    <section aria-label={`Jobs of ${backend}`}>
      <div class="row spread">
        <h2>Jobs of {backend}</h2>
        <button type="button" onClick={() => setOpen({ what: 'new' })}>
          Learn masks
        </button>
      </div>
      {stored !== undefined && (
        <Notice kind="info">
          {stored} is stored for {tenantName(tenant)}: the Publications page makes it live.
        </Notice>
      )}
      <Loaded load={jobs}>{({ data }) => <List jobs={data} onOpen={setOpen} />}</Loaded>
      {open?.what === 'new' && <NewJob backend={backend} onClose={close} onCreated={close} />}
      {open?.what === 'cancel' && (
        <Confirm
          title="End this job?"
          action="End it"
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
          <p>For {tenantName(tenant)}. Nothing goes live by that.</p>
        </Confirm>
      )}
    </section>
  );
}

function List(props: { readonly jobs: readonly Job[]; readonly onOpen: (open: Open) => void }) {
  return (
    <Table
      caption="Jobs, the newest first"
      empty="No job was started on this backend yet."
      rows={props.jobs}
      rowKey={({ id }) => id}
      columns={[
        { title: 'Job', cell: ({ id }) => <code title={id}>{id.slice(0, 12)}</code> },
        { title: 'Name', cell: ({ request }) => request.name ?? 'learned' },
        { title: 'Model', cell: ({ request }) => request.model ?? '–' },
        { title: 'Clusters', cell: ({ request }) => request.clusters, isNumber: true },
        { title: 'Blocks out', cell: ({ request }) => percent(request.sparsity), isNumber: true },
        { title: 'Asked for', cell: ({ created_at }) => when(created_at) },
        { title: 'State', cell: (job) => <State job={job} /> },
        {
          title: 'Change',
          cell: (job) => {
            if (!isFinished(job)) {
              return (
                <button
                  type="button"
                  class="small outline"
                  onClick={() => props.onOpen({ what: 'cancel', id: job.id })}
                >
                  End <span class="hidden">{job.id}</span>
                </button>
              );
            }
            if (job.result === null) return '–';
            return (
              <button
                type="button"
                class="small outline"
                onClick={() => props.onOpen({ what: 'store', id: job.id })}
              >
                Store <span class="hidden">{job.result.version}</span>
              </button>
            );
          },
        },
      ]}
    />
  );
}

function State({ job: { status, progress, error, result, id } }: { readonly job: Job }) {
  if (progress !== null) {
    const { stage, done, total, left_s } = progress;
    const left = left_s === null ? '' : `, ${duration(left_s)} left`;
    return (
      <>
        <progress max={total} value={done} aria-label={`${id}: ${stage}`} /> {stage}
        {left}
      </>
    );
  }
  if (error !== null) return <>failed: {error}</>;
  if (result !== null) return <code title={result.version}>{shortVersion(result.version)}</code>;
  return <>{status}</>;
}

const duration = (s: number): string => (s < 90 ? `${Math.ceil(s)} s` : `${Math.round(s / 60)} min`);
