/**
 * Schedules (recurring jobs) of one backend, with their times, data and publication; and the form fields of any job.
 */
import { useState } from 'preact/hooks';
import {
  apiKeySchema,
  createdKeySchema,
  deletedSchema,
  listSchema,
} from '../../../shared/admin/admin-wire.ts';
import {
  type CreateEdgeJob,
  DATA_NAME_PATTERN,
  type Job,
  jobSchema,
  type Schedule,
  scheduleSchema,
  uploadedDataSchema,
} from '../../../shared/admin/job-wire.ts';
import { ApiError, admin, query } from '../api.ts';
import {
  Choice,
  ForChange,
  RolloutFields,
  RowButton,
  rolloutIn,
  TimeField,
  timeAheadIn,
} from '../components/controls.tsx';
import { Confirm, FormDialog, Loaded } from '../components/dialog.tsx';
import { Table } from '../components/table.tsx';
import { useLoad, useScope } from '../hooks.ts';
import { when, whose } from '../look.ts';

const REFRESH_ms = 5_000;

type Open = { readonly what: 'new' } | { readonly what: 'remove'; readonly id: string };

export function Schedules({ backend }: { readonly backend: string }) {
  const [open, setOpen] = useState<Open>();
  const jobs = `/backends/${backend}/jobs`;
  const found = useLoad(['schedules', backend], (signal) => loadSchedules(jobs, signal), REFRESH_ms);
  const close = () => setOpen(undefined);
  return (
    <section aria-label={`Schedules of ${backend}`}>
      <div class="row spread">
        <h2>Schedules of {backend}</h2>
        <ForChange>
          <button type="button" onClick={() => setOpen({ what: 'new' })}>
            New schedule
          </button>
        </ForChange>
      </div>
      <Loaded load={found}>
        {({ schedules, lastJobs }) => (
          <Table
            caption="Recurring jobs"
            empty="No schedules on this backend yet."
            rows={schedules}
            rowKey={({ id }) => id}
            columns={[
              { title: 'Schedule', cell: ({ id }) => <code title={id}>{id.slice(0, 17)}</code> },
              { title: 'Name', cell: ({ job }) => job.name ?? 'learned' },
              { title: 'Every', cell: ({ every }) => every },
              { title: 'Next', cell: ({ next_at }) => when(next_at) },
              { title: 'Learned mask set', cell: thenOf },
              { title: 'Last job', cell: ({ last_job }) => endOf(lastJobs.get(last_job ?? '')) },
              {
                title: 'Change',
                isActions: true,
                cell: ({ id }) => (
                  <RowButton
                    title="Delete"
                    about={id}
                    destroys
                    onClick={() => setOpen({ what: 'remove', id })}
                  />
                ),
              },
            ]}
          />
        )}
      </Loaded>
      {open?.what === 'new' && <NewSchedule backend={backend} onClose={close} />}
      {open?.what === 'remove' && (
        <Confirm
          title="Delete this schedule?"
          action={`Delete ${open.id}`}
          destroys
          onClose={close}
          act={async () => {
            await admin(deletedSchema, `${jobs}/schedules/${open.id}`, { method: 'DELETE' });
          }}
        >
          <p>
            <code>{open.id}</code> creates no more jobs. Its existing jobs stay, and a running one continues.
          </p>
        </Confirm>
      )}
    </section>
  );
}

async function loadSchedules(jobs: string, signal: AbortSignal) {
  const [schedules, known] = await Promise.all([
    admin(listSchema(scheduleSchema), `${jobs}/schedules`, { signal }),
    admin(listSchema(jobSchema), jobs, { signal }),
  ]);
  return { schedules: schedules.data, lastJobs: new Map(known.data.map((job) => [job.id, job])) };
}

function thenOf({ job: { publish } }: Schedule): string {
  if (publish === undefined) return 'kept with its job';
  if (!publish.activate) return `stored for ${whose(publish.tenant)}`;
  const steps = publish.rollout?.length ?? 0;
  return [
    `goes live for ${whose(publish.tenant)}`,
    ...(steps === 0 ? [] : [`in ${steps + 1} steps`]),
    ...(publish.auto_rollback === undefined ? [] : ['automatic rollback']),
  ].join(', ');
}

const endOf = (job: Job | undefined): string =>
  job === undefined ? '–' : `${job.status}${job.error === null ? '' : `: ${job.error}`}`;

/* The form. */

const UNITS = [
  ['h', 'hours'],
  ['d', 'days'],
  ['m', 'minutes'],
] as const;

const ENDS = ['keep', 'store', 'live'] as const;
type End = (typeof ENDS)[number];

function NewSchedule(props: { readonly backend: string; readonly onClose: () => void }) {
  const { tenant } = useScope();
  const [end, setEnd] = useState<End>('keep');
  const jobs = `/backends/${props.backend}/jobs`;
  const titles: Record<End, string> = {
    keep: 'keep it with its job',
    store: `store it for ${whose(tenant)}`,
    live: `make it live for ${whose(tenant)}`,
  };
  return (
    <FormDialog
      title={`New schedule on ${props.backend}`}
      action="Create"
      onClose={props.onClose}
      onSubmit={async (form) => {
        const times = { every: `${form.get('every')}${form.get('unit')}`, ...timeAheadIn(form, 'first_at') };
        const job = await jobIn(form, jobs);
        const create = (publish?: object) =>
          admin(scheduleSchema, `${jobs}/schedules`, {
            method: 'POST',
            body: { ...times, job: { ...job, publish } },
          });
        if (end === 'keep') await create();
        else {
          const how = end === 'store' ? {} : { activate: true, ...rolloutIn(form) };
          const name = `schedule on ${props.backend}: ${form.get('name')}`;
          await withOwnKey(tenant, name, (admin_key) => create({ tenant, admin_key, ...how }));
        }
        props.onClose();
      }}
    >
      <div class="pairs">
        <label>
          Every
          <input name="every" type="number" min={1} max={9999} defaultValue="24" required />
        </label>
        <label>
          Unit
          <select name="unit">
            {UNITS.map(([value, title]) => (
              <option key={value} value={value}>
                {title}
              </option>
            ))}
          </select>
        </label>
      </div>
      <TimeField name="first_at" title="First run (empty: after one interval)" />
      <JobFields />
      <Choice
        title="When learned"
        value={end}
        options={ENDS.map((one) => [one, titles[one]])}
        onPick={setEnd}
      />
      {end === 'live' && <RolloutFields />}
      {end !== 'keep' && (
        <p>
          <small>
            The schedule gets its own admin key for publishing. You can revoke it on the Keys page.
          </small>
        </p>
      )}
    </FormDialog>
  );
}

/**
 * Creates a key for `use`, and revokes it if the edge or the backend refuses `use`. After any other failure the key
 * stays: the schedule may exist and need it.
 */
async function withOwnKey(
  tenant: string,
  name: string,
  use: (key: string) => Promise<unknown>,
): Promise<void> {
  const body = { kind: tenant === '' ? 'admin' : 'tenant_admin', tenant, name };
  const { id, key } = await admin(createdKeySchema, '/keys', { method: 'POST', body });
  try {
    await use(key);
  } catch (error) {
    const isRefused = error instanceof ApiError && error.status >= 400 && error.status < 500;
    if (isRefused) await admin(apiKeySchema, `/keys/${id}`, { method: 'DELETE' }).catch(() => undefined);
    throw error;
  }
}

/* The form fields of a job: its data are uploaded first, then the job is created. */

/**
 * A sparsity is above 0 % and below 100 %. A field's bounds are inclusive, so they are half a block of the largest
 * model (1,024 blocks) away from both.
 */
const SPARSITY_percent = { min: 0.05, max: 99.95 };

export const JobFields = () => (
  <>
    <label>
      Prompts, JSONL files; each file’s name is the kind of its rows
      <input name="files" type="file" multiple accept=".jsonl,.ndjson,application/x-ndjson" />
    </label>
    <label>
      Or a file in the backend’s job data folder
      <input name="path" maxLength={500} placeholder="support.jsonl" />
    </label>
    <div class="pairs">
      <label>
        Clusters (empty: chosen automatically)
        <input name="clusters" type="number" min={1} max={256} />
      </label>
      <label>
        Blocks skipped, %
        <input
          name="sparsity"
          type="number"
          min={SPARSITY_percent.min}
          max={SPARSITY_percent.max}
          step="any"
          defaultValue="12.5"
          required
        />
      </label>
      <label>
        Measured
        <select name="cost">
          <option value="blocks">in blocks</option>
          <option value="time">in time</option>
        </select>
      </label>
      <label>
        Max rows (empty: all)
        <input name="rows" type="number" min={1} max={10_000_000} />
      </label>
    </div>
    <label>
      Name of the mask set
      <input
        name="name"
        required
        defaultValue="learned"
        pattern="[A-Za-z0-9][A-Za-z0-9_\-]{0,63}"
        title="letters, digits, _ and -"
      />
    </label>
    <label>
      <input name="quick" type="checkbox" />A first set in minutes, with less text and a shorter search
    </label>
    <label>
      <input name="from" type="checkbox" value="last" />
      Start from the masks of the last job of this name (takes two thirds of the time)
    </label>
  </>
);

/**
 * The job that the form describes. `jobs`: the path of the backend's jobs, where its files are uploaded.
 * @throws Error when it has no prompts, before anything is uploaded.
 */
export async function jobIn(form: FormData, jobs: string): Promise<object> {
  // A field without files has one without a name.
  const files = form.getAll('files').filter((file) => file instanceof File && file.name !== '') as File[];
  const path = form.get('path');
  const empty = files.find(({ size }) => size === 0);
  if (empty !== undefined) throw new Error(`${empty.name} is empty.`);
  if (files.length === 0 && path === null) {
    throw new Error('Choose files with prompts, or name one in the backend’s job data folder.');
  }
  const uploads: CreateEdgeJob['data'] = [];
  for (const file of files) uploads.push({ upload: await upload(jobs, file) });
  const clusters = form.get('clusters');
  const rows = form.get('rows');
  return {
    kind: 'learn',
    data: [...uploads, ...(path === null ? [] : [{ path }])],
    clusters: clusters === null ? 'auto' : Number(clusters),
    sparsity: Number(form.get('sparsity')) / 100,
    cost: form.get('cost'),
    name: form.get('name'),
    ...(rows === null ? {} : { rows: Number(rows) }),
    ...(form.get('quick') === null ? {} : { quick: true }),
    ...(form.get('from') === null ? {} : { from: 'last' }),
  };
}

/** The id of the data. */
async function upload(jobs: string, file: File): Promise<string> {
  const plain = file.name.replace(/\.[^.]*$/, '').replaceAll(/[^A-Za-z0-9_-]/g, '-');
  const name = DATA_NAME_PATTERN.test(plain) ? plain : 'data';
  const path = `${jobs}/data${query({ name })}`;
  return (await admin(uploadedDataSchema, path, { method: 'POST', file })).id;
}
